"""
Peak memory of a rollout of n_steps 2048 x 8 image observations (84 x 84 x 4, uint8) and of the update on it, VPG against A2C.

    python benchmarks/memory.py

Each in a fresh process; the peak resident set size of the process as the operating system counts it, in MiB.
"""

import argparse
import resource
import time
from typing import NamedTuple

from common import in_processes


class Job(NamedTuple):
    algo: str
    n_steps: int
    n_envs: int


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(job: Job) -> tuple[float, float, float, float]:
    """:return: MiB before the rollout, after it, after the update; seconds"""
    import gymnasium as gym
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3 import A2C
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_vpg import VPG

    class Noise(gym.Env):
        observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
        action_space = spaces.Discrete(4)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 1.0, self.np_random.random() < 0.01, False, {}

    class Peaks(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.before = peak()

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.rollout = peak()

    algorithm, kwargs = (VPG, {"n_critic_updates": 1}) if job.algo == "VPG" else (A2C, {})
    model = algorithm("CnnPolicy", make_vec_env(Noise, n_envs=job.n_envs, seed=0), n_steps=job.n_steps, device="cpu", **kwargs)
    peaks = Peaks()
    start = time.perf_counter()
    model.learn(job.n_steps * job.n_envs, callback=peaks)
    return peaks.before, peaks.rollout, peak(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-steps", type=int, default=2048)
    parser.add_argument("--n-envs", type=int, default=8)
    args = parser.parse_args()
    algos = ("A2C", "VPG")
    print(f"{'':>5} {'before':>10} {'rollout':>10} {'update':>10}")
    for algo, result in zip(algos, in_processes(run, [Job(algo, args.n_steps, args.n_envs) for algo in algos], 1)):
        *mib, seconds = result
        print(f"{algo:>5} " + " ".join(f"{m:6.0f} MiB" for m in mib) + f"   {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
