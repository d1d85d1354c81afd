"""
What it costs to look whether observations, actions, rewards and values are finite.

    python benchmarks/finite_checks_cost.py

Training with the checks, as a ratio to training with these checks taken out: seconds per frame, median [lowest, highest] of
the rounds, each of which measures both in turns, at learning rate 0. (That losses and gradients are finite is looked at in
numbers that are computed anyway.)
"""

import argparse
import time
from unittest.mock import patch

from contestants import SCENARIOS, make_model, training
from harness import median_and_range

from sb3_vpg.rollout import RolloutCollector

CHECKS = ("_check_finite", "_check_finite_rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, roughly")
    parser.add_argument("--contestant", default="VPG, gae")
    args = parser.parse_args()
    for scenario, settings in SCENARIOS.items():
        for setting in settings:
            run = training(make_model(setting, args.contestant, learning_rate=0.0))
            run(setting.n_frames)
            n_frames = setting.n_frames

            def seconds_per_frame(run=run, n_frames=n_frames) -> float:
                start, n_done = time.process_time(), 0
                while (elapsed := time.process_time() - start) < args.seconds:
                    n_done += run(n_frames)
                return elapsed / n_done

            ratios = []
            for _ in range(args.rounds):
                with_checks = seconds_per_frame()
                with patch.multiple(RolloutCollector, **dict.fromkeys(CHECKS, lambda *_: None)):
                    ratios.append(with_checks / seconds_per_frame())
            print(f"({scenario}) {setting.environments} x {setting.n_envs}: {median_and_range(ratios)}", flush=True)


if __name__ == "__main__":
    main()
