"""
RL Baselines3 Zoo's own commands, algorithm against algorithm: each with its entry in the zoo's hyperparameters.

    python benchmarks/zoo.py --env CartPole-v1 --algo vpg ppo a2c --seeds 10

For each algorithm: interquartile mean over seeds of the mean return of the final model in `rl_zoo3.enjoy` (deterministic,
100 episodes' worth of steps) [95 % bootstrap interval], median wall-clock seconds of `rl_zoo3.train` as a whole process.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from common import in_processes, result_line


class Job(NamedTuple):
    algo: str
    env: str
    seed: int
    enjoy_steps: int
    train_arguments: tuple[str, ...]


def zoo(module: str, *arguments: str, cwd: str) -> str:
    """Run a module of rl_zoo3 and return what it prints."""
    command = [sys.executable, "-m", f"rl_zoo3.{module}", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def run(job: Job) -> tuple[float, float]:
    """:return: mean return of the final model, wall-clock seconds of the training process"""
    common = (
        "--algo",
        job.algo,
        "--env",
        job.env,
        "--seed",
        str(job.seed),
        "-f",
        "logs",
        "--num-threads",
        "1",
        "--device",
        "cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        zoo("train", *common, "--eval-freq", "-1", *job.train_arguments, cwd=folder)
        seconds = time.perf_counter() - start
        printed = zoo("enjoy", *common, "--no-render", "-n", str(job.enjoy_steps), "--deterministic", cwd=folder)
    mean = re.search(r"^Mean reward: (\S+)", printed, re.MULTILINE)
    if mean is None:
        raise RuntimeError(f"No episode ended in `enjoy`:\n{printed}")
    return float(mean[1]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--algo", nargs="+", default=["vpg", "ppo", "a2c"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--enjoy-steps", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=1, help="more than 1 makes the wall-clock less telling")
    parser.add_argument("--train-arguments", default="", help="further arguments of rl_zoo3.train, in one string")
    args = parser.parse_args()

    further = tuple(args.train_arguments.split())
    jobs = [Job(algo, args.env, seed, args.enjoy_steps, further) for seed in range(args.seeds) for algo in args.algo]
    results = dict(zip(jobs, in_processes(run, jobs, args.processes)))
    print(f"{args.env}, {args.seeds} seeds {args.train_arguments}")
    for algo in args.algo:
        scores, seconds = zip(*(result for job, result in results.items() if job.algo == algo))
        print(result_line(algo, scores, seconds), flush=True)


if __name__ == "__main__":
    main()
