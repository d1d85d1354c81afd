"""
Frames per second of training, VPG against A2C on the same environments, in turns, one thread.

    python benchmarks/throughput.py

Same n_steps, same networks, one gradient step per rollout for both (VPG's further critic passes switched off, and on its own
line: with its defaults). Medians over the rounds, and the median of the rounds' ratios.
"""

import argparse
import time
from typing import Any

import common  # noqa: F401  one thread, before torch is imported
import numpy as np
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG

VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "A2C": (A2C, {}),
    "VPG, gae": (VPG, {"n_critic_updates": 1}),
    "VPG, gae, default critic": (VPG, {}),
    "VPG, reward_to_go": (VPG, {"estimator": "reward_to_go", "partial_episodes": "truncate"}),
}


def frames_per_second(algorithm: type, env_id: str, n_envs: int, timesteps: int, kwargs: dict[str, Any]) -> float:
    env = make_vec_env(env_id, n_envs=n_envs, seed=0)
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    model.learn(timesteps // 10)  # warm-up
    start = time.perf_counter()
    model.learn(timesteps)
    return model.num_timesteps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--n-envs", type=int, default=8)
    parser.add_argument("--n-steps", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    th.set_num_threads(1)

    rounds = [
        {
            name: frames_per_second(algorithm, args.env, args.n_envs, args.timesteps, {"n_steps": args.n_steps, **kwargs})
            for name, (algorithm, kwargs) in VARIANTS.items()
        }
        for _ in range(args.rounds)
    ]
    print(f"{args.env}, DummyVecEnv x {args.n_envs}, n_steps {args.n_steps}, one thread, median of {args.rounds} rounds")
    for name in VARIANTS:
        fps = np.median([r[name] for r in rounds])
        ratios = [r[name] / r["A2C"] for r in rounds]
        print(f"{name:>26} {fps:8.0f} frames/s  {np.median(ratios):5.2f} x A2C  [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
