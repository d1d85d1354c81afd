"""
Environments that take long for a step, in SubprocVecEnv x 8: what share of the time of training is the algorithm's?

    python benchmarks/slow_environments.py --output slow_environments.json

The environments sleep for 0.1, 1 or 10 ms in each step, so that they do not compete for processors. The share is 1 - (time of
the environments alone) / (time of training), both in wall-clock time for the same number of steps. The environments alone get
random actions. MlpPolicy, rollouts of 32 steps, one thread; A2C, and VPG with one critic pass and with the default critic.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from contestants import CONTESTANTS, training
from gymnasium import spaces
from harness import frames_per_second, save
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from throughput import stepping

N_ENVS, N_STEPS = 8, 32
MILLISECONDS = (0.1, 1.0, 10.0)
NAMES = ("A2C", "VPG, gae", "VPG, gae, default critic")


class Slow(gym.Env):
    """Episodes of 100 steps, each of which sleeps."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, milliseconds: float):
        self.seconds = milliseconds / 1000

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        self.n_steps += 1
        return self.observation_space.sample(), 1.0, self.n_steps == 100, False, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in which the contestants take turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate duration of a measurement")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    th.set_num_threads(1)
    results = []
    for milliseconds in MILLISECONDS:
        make_env = partial(
            make_vec_env, Slow, N_ENVS, seed=0, vec_env_cls=SubprocVecEnv, env_kwargs={"milliseconds": milliseconds}
        )
        envs = [make_env() for _ in range(len(NAMES) + 1)]
        rng = np.random.default_rng(0)
        runs = [stepping(envs[0], lambda obs, rng=rng: rng.integers(2, size=N_ENVS))]
        for name, env in zip(NAMES, envs[1:]):
            algorithm, kwargs = CONTESTANTS[name]
            runs.append(training(algorithm("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", **kwargs)))
        speeds = np.array(
            [[frames_per_second(run, N_ENVS * N_STEPS, args.seconds) for run in runs] for _ in range(args.rounds)]
        )
        alone, shares = speeds[:, 0], 1 - speeds[:, 1:] / speeds[:, :1]
        print(f"{milliseconds:g} ms: environments alone {np.median(alone):,.0f} frames/s; share of the algorithm", flush=True)
        for name, share in zip(NAMES, shares.T):
            print(f"{name:>28}  {np.median(share):6.1%} [{share.min():.1%}, {share.max():.1%}]", flush=True)
            results.append({"milliseconds": milliseconds, "contestant": name, "shares": share.tolist()})
        for env in envs:
            env.close()
        save(args, results)


if __name__ == "__main__":
    main()
