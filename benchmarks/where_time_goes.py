"""
Profile of training: microseconds per frame in each part of the training loop, one thread.

    python benchmarks/where_time_goes.py

Scenarios, all with n_steps 32: (a) CartPole-v1 on DummyVecEnv x 8, (b) NativeVecEnv x 256, (c) NativeVecEnv x 2048, (d)
CnnPolicy on 84 x 84 x 4 images, DummyVecEnv x 8. Methods of the model are wrapped in stopwatches. A stopwatch does not count
the time in other wrapped methods, so the parts add up to the wall-clock time. A2C's update is a single part. The learning rate
is 0; throughput.py explains why.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from contestants import SCENARIOS, Setting, make_model, training
from harness import frames_per_second, in_processes, save
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_vpg import VPG


class Methods(NamedTuple):
    """
    Methods of the model, or of the attribute before the dot. VPG calls a method of the policy or of the optimizer that was
    replaced, instead of computing the same without it: the parts of VPG are methods of its own.
    """

    of_vpg: list[str]
    of_a2c: list[str]


PARTS = {
    "environment": Methods(["env.step"], ["env.step"]),
    "sampling actions": Methods(["_sample_actions"], ["policy.forward"]),
    "recording": Methods(["collect_rollouts"], ["collect_rollouts"]),
    "values, advantages": Methods(
        ["_finish_recording", "rollout_buffer.compute_returns_and_advantage"],
        ["policy.predict_values", "rollout_buffer.compute_returns_and_advantage"],
    ),
    "gradient": Methods(["_accumulate_gradients", "_clip_gradient"], []),
    "optimizer step": Methods(["_parameter_groups.step"], ["policy.optimizer.step"]),
    "rest of the update": Methods(["train"], ["train"]),
    "logging and the rest": Methods(["learn"], ["learn"]),
}
CONTESTANTS = ["A2C", "VPG, gae", "VPG, reward_to_go"]


class Job(NamedTuple):
    scenario: str
    rounds: int
    seconds: float


class Stopwatches:
    """Wall-clock seconds of each part, without the time in other parts that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def _timed(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._switch()
        self._running.append(part)
        try:
            return function(*args, **kwargs)
        finally:
            self._switch()
            self._running.pop()

    def attach(self, model: OnPolicyAlgorithm) -> None:
        for part, (of_vpg, of_a2c) in PARTS.items():
            for name in of_vpg if isinstance(model, VPG) else of_a2c:
                path, _, method = name.rpartition(".")
                owner = attrgetter(path)(model) if path else model
                setattr(owner, method, partial(self._timed, part, getattr(owner, method)))


def measure(setting: Setting, contestant: str, seconds: float) -> dict[str, float]:
    """:return: microseconds per frame of each part"""
    model = make_model(setting, contestant, learning_rate=0.0)
    run = training(model)
    n_frames = int(seconds * frames_per_second(run, setting.n_frames, seconds / 4))
    watches = Stopwatches()
    watches.attach(model)
    n_frames = run(n_frames)
    return {part: 1e6 * watches.seconds[part] / n_frames for part in PARTS}


def measure_scenario(job: Job) -> dict[str, dict[str, list[float]]]:
    """:return: microseconds per frame of each contestant, part and round"""
    th.set_num_threads(1)
    # The last setting of a scenario; throughput.py also measures the others
    setting = SCENARIOS[job.scenario][-1]
    rounds = [{name: measure(setting, name, job.seconds) for name in CONTESTANTS} for _ in range(job.rounds)]
    return {name: {part: [r[name][part] for r in rounds] for part in PARTS} for name in CONTESTANTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in which contestants take turns; output is the median")
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of each measurement")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    jobs = [Job(scenario, args.rounds, args.seconds) for scenario in args.scenario]
    results = []
    for job, parts in zip(jobs, in_processes(measure_scenario, jobs, 1)):
        print(f"({job.scenario}) microseconds per frame" + "".join(f"{name:>20}" for name in CONTESTANTS))
        for part in PARTS:
            print(f"{part:>26}" + "".join(f"{np.median(parts[name][part]):20.2f}" for name in CONTESTANTS))
        totals = [np.median(np.sum(list(parts[name].values()), axis=0)) for name in CONTESTANTS]
        print(f"{'sum':>26}" + "".join(f"{total:20.2f}" for total in totals), flush=True)
        results.append({"scenario": job.scenario, "microseconds_per_frame": parts})
        save(args, results)


if __name__ == "__main__":
    main()
