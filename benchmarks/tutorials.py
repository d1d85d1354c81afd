"""
Reproduce the tutorials in hyperparams/tutorials, and compare the results with the numbers that the tutorials report.

    python benchmarks/tutorials.py                      # all tutorials
    python benchmarks/tutorials.py --plots              # and the figures of docs/tutorials.md
    python benchmarks/tutorials.py swingup -params normalize_advantage:True

Output for each tutorial: interquartile mean over seeds [95 % bootstrap interval] of the tutorial's number, of the mean return
of the stochastic policy and of the deterministic policy (100 episodes each); number of seeds that reach the reported number;
median seconds of training.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import in_processes, interquartile_mean, result_line, save

ROOT = Path(__file__).parent.parent
N_EPISODES = 100
#: Points of a learning curve
N_POINTS = 100


class Outcome(NamedTuple):
    """
    :param last_rollout: rewards of the last rollout / episodes that ended in it; None if a callback ended it early
    :param training: returns of the training episodes, in order
    :param sampled: returns of the trained policy, stochastic
    :param deterministic: returns of the trained policy, deterministic
    """

    last_rollout: float | None
    training: list[float]
    sampled: list[float]
    deterministic: list[float]
    steps: int
    seconds: float


class Tutorial(NamedTuple):
    """
    :param counts: description of the tutorial's number
    :param count: computes the tutorial's number
    :param claim: the reported number; if there is none, the return at which the environment is solved
    :param vec_env: value of --vec-env; a single environment is faster without arrays
    """

    env: str
    counts: str
    count: Callable[[Outcome], float]
    claim: float
    vec_env: str = "native"


def last_rollout(outcome: Outcome) -> float:
    return outcome.last_rollout


def last_episodes(n: int) -> Callable[[Outcome], float]:
    return lambda outcome: np.mean(outcome.training[-n:])


def percent_of_200(outcome: Outcome) -> float:
    return 100 * np.mean(np.array(outcome.sampled) == 200)


PER_EPISODE = "rewards of the last rollout / episodes that ended in it"
TUTORIALS = {
    "logistic": Tutorial("CartPole-v0", "% of the evaluation episodes that reach 200", percent_of_200, 100, "dummy"),
    "softmax": Tutorial("CartPole-v0", PER_EPISODE, last_rollout, 200),
    "swingup": Tutorial("CartPoleSwingUp-v0", PER_EPISODE, last_rollout, 5.8),
    "standardized": Tutorial("CartPole-v0", "mean of the last 10 episodes", last_episodes(10), 195, "dummy"),
    "value_baseline": Tutorial("CartPole-v1", "mean of the last 100 episodes", last_episodes(100), 475),
    "spinning_up": Tutorial("CartPole-v1", "mean of the last 100 episodes", last_episodes(100), 475),
}


class Job(NamedTuple):
    name: str
    seed: int
    params: dict[str, Any]


def run(job: Job) -> Outcome:
    from rl_zoo3.exp_manager import ExperimentManager
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import load_results
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_vpg.envs.native_vec_env import NativeVecEnv

    tutorial = TUTORIALS[job.name]
    settings = {"config": str(ROOT / f"hyperparams/tutorials/{job.name}.yml"), "hyperparams": job.params, "seed": job.seed}
    settings |= {"eval_freq": -1, "log_interval": -1, "device": "cpu", "verbose": 0}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        manager = ExperimentManager(argparse.Namespace(), "vpg", tutorial.env, folder, **settings)
        manager.vec_env_class = {"native": NativeVecEnv, "dummy": DummyVecEnv}[tutorial.vec_env]
        model, _ = manager.setup_experiment()
        manager.learn(model)
        seconds = time.perf_counter() - start
        training = load_results(manager.save_path)["r"].tolist()
    rollout = model.rollout_buffer
    per_episode = np.sum(rollout.rewards) / rollout.n_episodes if rollout.full else None
    env = make_vec_env(tutorial.env, N_EPISODES, seed=10_000 + job.seed, vec_env_cls=NativeVecEnv)
    sampled, deterministic = (
        evaluate_policy(model, env, N_EPISODES, deterministic, return_episode_rewards=True)[0]
        for deterministic in (False, True)
    )
    return Outcome(per_episode, training, sampled, deterministic, model.num_timesteps, seconds)


def learning_curve(outcome: Outcome) -> list[float]:
    """:return: mean return in each of up to :data:`N_POINTS` parts of the training episodes, which have as many episodes"""
    parts = np.array_split(outcome.training, min(N_POINTS, len(outcome.training)))
    return [round(float(np.mean(part)), 1) for part in parts]


def plot_curves(lines: list[dict[str, Any]]) -> None:
    """Draw the learning curve of each seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for ax, line in zip(axes.flat, lines):
        for curve in line["curves"]:
            ax.plot(np.linspace(0, 1, len(curve)), curve, linewidth=0.8)
        ax.set_title(f"{line['tutorial']}, {TUTORIALS[line['tutorial']].env}", fontsize=10)
        ax.grid(alpha=0.2)
    figure.supxlabel("fraction of the training episodes", fontsize=9)
    figure.supylabel("return", fontsize=9)
    figure.savefig(ROOT / "docs" / "tutorials.png", dpi=100)


def plot_logistic(outcome: Outcome, seed: int) -> None:
    """Draw the figures of the first tutorial: returns during training and in the evaluation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(outcome.training, ".", markersize=2, label="episode")
    smooth = np.convolve(outcome.training, np.full(50, 1 / 50), mode="valid")
    axes.plot(np.arange(49, len(outcome.training)), smooth, label="mean of the last 50")
    axes.set(xlabel="episode", ylabel="return", title=f"CartPole-v0, logistic policy, training, seed {seed}")
    axes.legend(loc="lower right")
    figure.savefig(ROOT / "docs" / "tutorial_logistic_training.png", dpi=100)

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.hist(outcome.sampled, bins=np.linspace(0, 205, 42))
    axes.set(xlabel="return", ylabel="episodes", title=f"{N_EPISODES} evaluation episodes of the trained policy, stochastic")
    figure.savefig(ROOT / "docs" / "tutorial_logistic_evaluation.png", dpi=100)


def main() -> None:
    from rl_zoo3.utils import StoreDict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tutorials", nargs="*", default=list(TUTORIALS), help=f"of {', '.join(TUTORIALS)}")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="parallel runs; with more than 1, times are less accurate")
    parser.add_argument("-params", "--hyperparams", nargs="+", action=StoreDict, default={}, help="as for rl_zoo3.train")
    parser.add_argument("--plots", action="store_true", help="draw the figures of docs/tutorials.md")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/tutorials.json")
    args = parser.parse_args()

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [Job(name, seed, args.hyperparams) for name in args.tutorials for seed in seeds]
    outcomes = in_processes(run, jobs, args.processes)
    lines = []
    for name in args.tutorials:
        tutorial, group = TUTORIALS[name], [next(outcomes) for _ in seeds]
        counted = [float(tutorial.count(outcome)) for outcome in group]
        means = {kind: [float(np.mean(getattr(outcome, kind))) for outcome in group] for kind in ("sampled", "deterministic")}
        seconds, steps = [outcome.seconds for outcome in group], [outcome.steps for outcome in group]
        details = ", ".join(f"{kind} {interquartile_mean(means[kind])}" for kind in means)
        print(f"{tutorial.counts}; {np.median(steps) / 1e6:.3g} M steps (median)")
        print(result_line(name, counted, seconds, tutorial.claim, details), flush=True)
        curves = [learning_curve(outcome) for outcome in group]
        lines.append({"tutorial": name, "counted": counted, **means, "steps": steps, "seconds": seconds, "curves": curves})
        save(args, lines)
        if args.plots and name == "logistic":
            plot_logistic(group[0], seeds[0])
    if args.plots:
        plot_curves(lines)


if __name__ == "__main__":
    main()
