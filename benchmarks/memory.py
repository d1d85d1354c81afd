"""
Peak memory of a rollout and its update, VPG compared with A2C: 2048 steps x 8 environments of 84 x 84 x 4 images (uint8).

    python benchmarks/memory.py

Each algorithm runs in a new process. Output: peak resident set size of the process, in MiB.
"""

import argparse
import resource
import time
from typing import NamedTuple

from harness import in_processes


class Job(NamedTuple):
    contestant: str
    n_steps: int
    n_envs: int


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(job: Job) -> tuple[float, float, float, float]:
    """:return: MiB before the rollout, after it, after the update; seconds"""
    from contestants import Setting, make_model
    from stable_baselines3.common.callbacks import BaseCallback

    class Peaks(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.before = peak()

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.rollout = peak()

    model = make_model(Setting(job.n_envs, images=True, n_steps=job.n_steps), job.contestant)
    peaks = Peaks()
    start = time.perf_counter()
    model.learn(job.n_steps * job.n_envs, callback=peaks)
    return peaks.before, peaks.rollout, peak(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-steps", type=int, default=2048)
    parser.add_argument("--n-envs", type=int, default=8)
    args = parser.parse_args()
    contestants = ("A2C", "VPG, gae")
    print(f"{'':>8} {'before':>10} {'rollout':>10} {'update':>10}")
    results = in_processes(run, [Job(name, args.n_steps, args.n_envs) for name in contestants], 1)
    for name, (*mib, seconds) in zip(contestants, results):
        print(f"{name:>8} " + " ".join(f"{m:6.0f} MiB" for m in mib) + f"   {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
