"""
Cost of gradient statistics during training.

    python benchmarks/gradient_statistics_cost.py

Output: processor time of training with `GradientStatisticsCallback`, divided by that without; median [minimum, maximum] over
the rounds. Each round trains with and without the callback.
"""

import argparse
import time
from typing import Any

from harness import median_and_range
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.diagnostics import GradientStatisticsCallback
from sb3_vpg.envs.native_vec_env import NativeVecEnv

# Number of environments, timesteps, keywords
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "defaults, 8 environments, n_steps=32": (8, 30_000, {"n_steps": 32}),
    "16 whole episodes for each update": (16, 60_000, {"n_episodes": 1}),
    "64 environments, n_steps=32, one critic pass": (64, 200_000, {"n_steps": 32, "n_critic_updates": 1}),
}


def seconds(n_envs: int, timesteps: int, kwargs: dict[str, Any], every_n_rollouts: int | None) -> float:
    env = make_vec_env("CartPole-v1", n_envs, seed=0, vec_env_cls=NativeVecEnv)  # type: ignore[arg-type]
    model = VPG("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    callback = GradientStatisticsCallback(every_n_rollouts) if every_n_rollouts else None
    start = time.process_time()
    model.learn(timesteps, callback=callback)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10], help="computed every n rollouts")
    args = parser.parse_args()
    for name, setting in SETTINGS.items():
        ratios: dict[int, list[float]] = {every: [] for every in args.every}
        for _ in range(args.rounds):
            without = seconds(*setting, every_n_rollouts=None)
            for every, own in ratios.items():
                own.append(seconds(*setting, every_n_rollouts=every) / without)
        columns = (f"every {every}: {median_and_range(own)}" for every, own in ratios.items())
        print(f"{name:>46}  {'  '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
