"""
Cost of the checks that observations, actions, rewards and values are finite.

    python benchmarks/finite_checks_cost.py

Output: seconds per frame of training with these checks, divided by those without; median [minimum, maximum] over the rounds.
Each round measures both, at learning rate 0. (The checks of losses and gradients are not measured: they use numbers that are
computed anyway.)
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
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate duration of each measurement")
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
