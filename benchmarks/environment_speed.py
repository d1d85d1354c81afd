"""
Steps per second of environments without a policy, on one thread.

    python benchmarks/environment_speed.py

For each environment and number of environments N: gymnasium's vectorized form, the same in a NativeVecEnv, and N single
environments in SB3's DummyVecEnv. Each round measures all three. Output: medians over the rounds, and the median of the
ratios to DummyVecEnv within a round.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import harness  # noqa: F401  one thread, before NumPy is imported
import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg.envs.native_vec_env import NativeVecEnv

WAYS: dict[str, Callable[[str, int], Any]] = {
    "vectorized": lambda env_id, n: gym.make_vec(env_id, num_envs=n, vectorization_mode="vector_entry_point"),
    "NativeVecEnv": lambda env_id, n: make_vec_env(env_id, n, vec_env_cls=NativeVecEnv),
    "DummyVecEnv": make_vec_env,
}


def steps_per_second(make: Callable[[str, int], Any], env_id: str, n_envs: int, seconds: float) -> float:
    env = make(env_id, n_envs)
    single = gym.make(env_id).action_space
    actions = [np.stack([single.sample() for _ in range(n_envs)]) for _ in range(50)]
    env.reset()
    n_steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for action in actions:
            env.step(action)
        n_steps += len(actions) * n_envs
    env.close()
    return n_steps / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPoleSwingUp-v1", "CartPole-v1"])
    parser.add_argument("--n-envs", nargs="+", type=int, default=[8, 256, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of each measurement")
    args = parser.parse_args()

    for env_id in args.env:
        for n_envs in args.n_envs:
            rounds = [
                {name: steps_per_second(make, env_id, n_envs, args.seconds) for name, make in WAYS.items()}
                for _ in range(args.rounds)
            ]
            print(f"{env_id} x {n_envs}, one thread, median of {args.rounds} rounds")
            for name in WAYS:
                median = np.median([r[name] for r in rounds])
                ratio = np.median([r[name] / r["DummyVecEnv"] for r in rounds])
                print(f"{name:>16} {median / 1e6:8.3f} M steps/s  {ratio:6.1f} x DummyVecEnv", flush=True)


if __name__ == "__main__":
    main()
