"""
Compare algorithms with their entries in the zoo's hyperparameter files, trained by the zoo's own command.

    python benchmarks/zoo_entries.py --env CartPole-v1 --algo vpg ppo a2c --seeds 10

Output for each algorithm: interquartile mean over seeds [95 % bootstrap interval] of the mean return of the final model
(deterministic, 100 episodes, without the entry's environment arguments and without normalized rewards), mean length of these
episodes, return of the stochastic policy, environment steps of training, and median processor seconds of the `rl_zoo3.train`
process (equal to the wall-clock time if nothing else runs). `--output runs.jsonl` saves the result and the learning curve of
each run when it ends. A second call with the same file executes only the missing runs: start a new file if an entry changes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import in_processes, interquartile_mean, result_line

#: Points of a learning curve
N_POINTS = 100


class Job(NamedTuple):
    algo: str
    env: str
    seed: int
    train_arguments: tuple[str, ...]


class Result(NamedTuple):
    score: float
    length: float
    score_with_noise: float
    steps: int
    processor_seconds: float
    #: mean return of the episodes that ended in each hundredth of training; None if no episode ended
    curve: list[float | None]


def train(job: Job, folder: str) -> None:
    """Run ``rl_zoo3.train`` on one thread, without evaluations."""
    settings = {"algo": job.algo, "env": job.env, "seed": job.seed, "log-folder": folder, "eval-freq": -1}
    settings |= {"num-threads": 1, "device": "cpu", "verbose": 0}
    command = [sys.executable, "-m", "rl_zoo3.train", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run([*command, *job.train_arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}")


def learning_curve(folder: str) -> list[float | None]:
    """:return: the learning curve, computed from the monitor files of a training run; see :class:`Result`"""
    from stable_baselines3.common.monitor import load_results
    from stable_baselines3.common.results_plotter import ts2xy

    steps, returns = ts2xy(load_results(folder), "timesteps")
    parts = np.minimum(steps * N_POINTS // steps[-1], N_POINTS - 1)
    groups = [returns[parts == part] for part in range(N_POINTS)]
    return [round(float(np.mean(group)), 2) if len(group) else None for group in groups]


def run(job: Job, n_episodes: int = 100) -> Result:
    import rl_zoo3.import_envs  # noqa: F401  registers the environments of the zoo and of packages that it knows
    from rl_zoo3.utils import ALGOS, create_test_env, get_model_path, get_saved_hyperparams
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_vpg.envs.native_vec_env import NativeVecEnv

    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        train(job, folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        _, model_path, log_path = get_model_path(0, folder, job.algo, job.env)
        hyperparams, stats_path = get_saved_hyperparams(os.path.join(log_path, job.env), test_mode=True)
        env = create_test_env(job.env, n_episodes, stats_path, job.seed, None, False, hyperparams, vec_env_cls=NativeVecEnv)
        model = ALGOS[job.algo].load(model_path, device="cpu")
        (returns, lengths), (noisy_returns, _) = (
            evaluate_policy(model, env, n_episodes, deterministic, return_episode_rewards=True)
            for deterministic in (True, False)
        )
        env.close()
        curve = learning_curve(log_path)
    means = (float(np.mean(x)) for x in (returns, lengths, noisy_returns))
    return Result(*means, model.num_timesteps, seconds, curve)


def results_of(jobs: list[Job], processes: int, output: Path | None) -> Iterator[Result]:
    """
    :param jobs: the runs
    :param processes: number of parallel runs
    :param output: file of the results, one JSON object per line; runs with a result in the file are not executed again
    :return: the results of the jobs, in order
    """
    kept: dict[Job, Result] = {}
    if output is not None and output.exists():
        for line in map(json.loads, output.read_text().splitlines()):
            job, result = ({name: line[name] for name in kind._fields} for kind in (Job, Result))
            kept[Job(**job | {"train_arguments": tuple(job["train_arguments"])})] = Result(**result)
    missing = [job for job in jobs if job not in kept]
    new = in_processes(run, missing, processes)
    for job in jobs:
        if job in kept:
            yield kept[job]
            continue
        result = next(new)
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps({**job._asdict(), **result._asdict()}) + "\n")
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1"])
    parser.add_argument("--algo", nargs="+", default=["vpg", "ppo", "a2c"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, help="return; the number of seeds that reach it is shown")
    parser.add_argument("--processes", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", type=Path, help="save results in this file, and skip the runs that it has")
    parser.add_argument("--train-arguments", default="", help="further arguments of rl_zoo3.train, in one string")
    args = parser.parse_args()

    further = tuple(args.train_arguments.split())
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    groups = {(env, algo): [Job(algo, env, seed, further) for seed in seeds] for env in args.env for algo in args.algo}
    results = results_of([job for jobs in groups.values() for job in jobs], args.processes, args.output)
    print(f"{args.seeds} seeds {args.train_arguments}")
    for (env, algo), jobs in groups.items():
        scores, lengths, noisy_scores, steps, seconds, _ = zip(*(next(results) for _ in jobs))
        details = f"length {np.mean(lengths):.0f}, stochastic {interquartile_mean(noisy_scores)}, {steps[0] / 1e6:.3g} M steps"
        print(result_line(f"{env} {algo}", scores, seconds, args.threshold, details), flush=True)


if __name__ == "__main__":
    main()
