"""
Whether VPG has become slower: frames per second as multiples of A2C's, beside those in benchmarks/results/throughput.json.

    make benchmark
    python benchmarks/slower.py --scenario a b

Scenarios and contestants are those of throughput.py, in the environments of docs/performance.md: (a) DummyVecEnv x 8, (b)
NativeVecEnv x 256, (c) NativeVecEnv x 2048, (d) images. One thread. The contestants take turns, and seconds are those of the
processor, so that other programs on the machine matter less. Output: a table of medians of the rounds' ratios. A ratio that is
more than 15 % below the committed one is marked, and the exit status is 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from contestants import CONTESTANTS, SCENARIOS, make_model, training
from harness import frames_per_second, in_processes, median_and_range

RESULTS = Path(__file__).parent / "results" / "throughput.json"
#: Without PPO, which is no bound on anything
NAMES = [name for name in CONTESTANTS if name != "PPO"]
TOLERANCE = 0.15


class Job(NamedTuple):
    scenario: str
    rounds: int
    seconds: float


def measure(job: Job) -> dict[str, np.ndarray]:
    """:return: for each contestant, its frames per second divided by A2C's in each round"""
    th.set_num_threads(1)
    # The last setting of a scenario is the one that the documentation explains
    setting = SCENARIOS[job.scenario][-1]
    runs = {name: training(make_model(setting, name, learning_rate=0.0)) for name in NAMES}
    rounds = [
        [frames_per_second(run, setting.n_frames, job.seconds, time.process_time) for run in runs.values()]
        for _ in range(job.rounds)
    ]
    speeds = dict(zip(NAMES, np.transpose(rounds)))
    return {name: speed / speeds["A2C"] for name, speed in speeds.items() if name != "A2C"}


def committed(scenario: str, lines: list[dict[str, Any]]) -> dict[str, float]:
    """:return: the committed ratio of each contestant"""
    environments = SCENARIOS[scenario][-1].environments
    lines = [line for line in lines if (line["scenario"], line["environments"]) == (scenario, environments)]
    speeds = {line["contestant"]: np.array(line["frames_per_second"]) for line in lines}
    return {name: float(np.median(speeds[name] / speeds["A2C"])) for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in which the contestants take turns")
    parser.add_argument("--seconds", type=float, default=0.5, help="approximate duration of a measurement")
    args = parser.parse_args()

    jobs = [Job(scenario, args.rounds, args.seconds) for scenario in args.scenario]
    lines, slower = json.loads(RESULTS.read_text())["results"], False
    print(f"{'x A2C':>28}  {'now':>20}  committed", flush=True)
    for job, ratios in zip(jobs, in_processes(measure, jobs, 1)):
        before = committed(job.scenario, lines)
        for name, ratio in ratios.items():
            is_slower = np.median(ratio) < (1 - TOLERANCE) * before[name]
            slower |= bool(is_slower)
            warning = f"  WARNING: more than {TOLERANCE:.0%} slower" if is_slower else ""
            print(f"({job.scenario}) {name:>24}  {median_and_range(ratio):>20}  {before[name]:.2f}{warning}", flush=True)
    sys.exit(int(slower))


if __name__ == "__main__":
    main()
