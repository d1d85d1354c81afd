"""
Deterministic return after training with the constructor's defaults, over seeds.

    python benchmarks/learning.py --env CartPole-v1                      # the quickstart
    python benchmarks/learning.py --env CartPole-v1 --algo VPG A2C PPO   # compared with SB3's defaults
    python benchmarks/learning.py --env CartPole-v1 --formulations       # one line per formulation

Each line: interquartile mean over seeds of the mean return of 100 evaluation episodes [95 % bootstrap interval], number of
seeds that reach the threshold, median seconds of training, and the return of each seed.
"""

import argparse
import time
from typing import Any, NamedTuple

from harness import in_processes, result_line

FORMULATIONS: dict[str, dict[str, Any]] = {
    "total_return": {"estimator": "total_return"},
    "total_return, mean": {"estimator": "total_return", "baseline": "mean"},
    "total_return, time": {"estimator": "total_return", "baseline": "time"},
    "total_return, leave_one_out": {"estimator": "total_return", "baseline": "leave_one_out"},
    "total_return, value": {"estimator": "total_return", "baseline": "value"},
    "reward_to_go": {"estimator": "reward_to_go"},
    "reward_to_go, mean": {"estimator": "reward_to_go", "baseline": "mean"},
    "reward_to_go, time": {"estimator": "reward_to_go", "baseline": "time"},
    "reward_to_go, leave_one_out": {"estimator": "reward_to_go", "baseline": "leave_one_out"},
    "reward_to_go, value": {"estimator": "reward_to_go", "baseline": "value"},
    "td_residual": {"estimator": "td_residual"},
    "gae": {"estimator": "gae"},
}
THRESHOLDS = {"CartPole-v1": 475, "Acrobot-v1": -100, "Pendulum-v1": -250}


class Job(NamedTuple):
    algo: str
    env: str
    kwargs: dict[str, Any]
    timesteps: int
    seed: int
    episodes: int


def run(job: Job) -> tuple[float, float]:
    """:return: mean return of the deterministic policy, seconds of training"""
    import gymnasium as gym
    import stable_baselines3 as sb3
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    import sb3_vpg

    algorithm = sb3_vpg.VPG if job.algo == "VPG" else getattr(sb3, job.algo)
    start = time.perf_counter()
    model = algorithm("MlpPolicy", job.env, seed=job.seed, device="cpu", **job.kwargs).learn(job.timesteps)
    seconds = time.perf_counter() - start
    env = Monitor(gym.make(job.env))
    env.reset(seed=10_000 + job.seed)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=job.episodes, deterministic=True)
    return float(mean), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--algo", nargs="+", default=["VPG"], choices=["VPG", "A2C", "PPO"])
    parser.add_argument(
        "--formulations", action="store_true", help="VPG with each formulation, gamma 0.99, other keywords at their defaults"
    )
    parser.add_argument("--timesteps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    variants: dict[str, tuple[str, dict[str, Any]]] = {algo: (algo, {}) for algo in args.algo}
    if args.formulations:
        variants = {name: ("VPG", {"gamma": 0.99, **kwargs}) for name, kwargs in FORMULATIONS.items()}
    jobs = [
        Job(algo, args.env, kwargs, args.timesteps, seed, args.episodes)
        for algo, kwargs in variants.values()
        for seed in range(args.seeds)
    ]
    threshold = THRESHOLDS.get(args.env)
    results = in_processes(run, jobs, args.processes)
    print(f"{args.env}, {args.timesteps} timesteps, {args.seeds} seeds, {args.episodes} deterministic episodes each")
    for name in variants:
        scores, seconds = zip(*(next(results) for _ in range(args.seeds)))
        print(result_line(name, scores, seconds, threshold), flush=True)


if __name__ == "__main__":
    main()
