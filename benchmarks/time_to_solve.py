"""
Wall-clock seconds and environment steps until an environment is solved: VPG, PPO and A2C, each with its entry in the zoo.

    python benchmarks/time_to_solve.py --output solve.json --plot solve.png
    python benchmarks/time_to_solve.py --results solve.json --plot solve.png    # only table and plot of earlier results
    python benchmarks/time_to_solve.py --env LunarLander-v3 --vec-env envpool --first-seed 100 --output solve.json

An environment is solved when the mean return of 100 episodes of the stochastic policy first reaches the reward threshold of
gymnasium's registry (CartPole-v1: 475, CartPoleSwingUp-v0: 300). Returns are not normalized. Which 100 episodes?

- CartPole-v1: the last 100 training episodes (`ep_info_buffer`), checked after each episode.
- The swing-ups: their entries have ExploringStarts, so training episodes do not show the return of the task. After every 1/40
  of the budget, at the end of a rollout, the policy that collected it runs 100 episodes of the environment itself, with the
  noise of gSDE resampled as often as in training. The clock is paused during this evaluation, and training is not affected.
  The recorded time is the end of the rollout, so its resolution is 1/40 of the budget.
- With `--vec-env envpool`: as on the swing-ups, 100 episodes in gymnasium's own environments, but only at the end of a rollout
  after which the mean return of the last 100 training episodes is at least the threshold. After an evaluation below the
  threshold, the next one is at least 1/40 of the budget later. The learning curve has the training episodes and the
  evaluations.

Training stops when the environment is solved, or when the entry's budget is used up (not solved). The budget is that of the
entry, since schedules and exploring starts depend on it. Seconds are those of `learn()`, including monitor files and the
entry's callbacks, without imports and the construction of model and environments. Steps are those of all environments,
including the steps that VPG does not record while it waits for episodes to end. Each run has a new process and one thread. The
contestants take turns, seed by seed.

"VPG", "PPO" and "A2C" are configured as by `python -m rl_zoo3.train`. On CartPole-v1, VPG then uses NativeVecEnv, and the
others use DummyVecEnv. Contestants with the name of a VecEnv differ only in that VecEnv, to separate the speed of the
environment from that of the algorithm. On the swing-ups, all three use NativeVecEnv. With `--vec-env envpool`, all three train
in EnvPoolVecEnv on one thread.

Interquartile mean [95 % bootstrap interval], minimum and maximum are over the seeds that solved the environment. In medians,
the other seeds count as infinite. The ratio is that of the medians, relative to PPO as in the zoo.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from harness import in_processes, save
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization

from sb3_vpg.envs import ENVIRONMENTS, EnvPoolVecEnv
from sb3_vpg.envs.exploring_starts import ExploringStarts
from sb3_vpg.envs.native_vec_env import NativeVecEnv
from sb3_vpg.study.report import format_estimate
from sb3_vpg.study.statistics import estimate
from sb3_vpg.zoo import register

N_EPISODES = 100
EVALUATIONS_PER_BUDGET = 40
POINTS_PER_CURVE = 200
# The zoo's name of the algorithm, and the class of the VecEnv; None for the zoo's choice
CONTESTANTS: dict[str, tuple[str, type[VecEnv] | None]] = {
    "VPG": ("vpg", None),
    "PPO": ("ppo", None),
    "A2C": ("a2c", None),
    "VPG, DummyVecEnv": ("vpg", DummyVecEnv),
    "PPO, NativeVecEnv": ("ppo", NativeVecEnv),
    "A2C, NativeVecEnv": ("a2c", NativeVecEnv),
}
AS_IN_THE_ZOO = ["VPG", "PPO", "A2C"]


class Job(NamedTuple):
    env: str
    contestant: str
    seed: int
    #: in EnvPool, instead of the contestant's VecEnv
    envpool: bool = False


class UntilSolved(BaseCallback):
    """
    Stops training when the mean return of 100 episodes reaches the threshold. Subclasses choose the episodes.

    :param threshold: mean return to reach
    :param interval: number of environment steps between two points of the learning curve
    """

    #: description of the episodes
    episodes: str

    def __init__(self, threshold: float, interval: float):
        super().__init__()
        self.threshold = threshold
        self.interval = interval
        self.solved = False
        #: seconds, environment steps, mean return
        self.curve: list[tuple[float, int, float]] = []
        self._next_point = 0.0
        self._start = 0.0

    def start_clock(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def check(self, returns: list[float], seconds: float) -> None:
        """
        Check whether the environment is solved, and record a point of the learning curve.

        :param returns: returns of up to 100 episodes
        :param seconds: time at which the last of them ended
        """
        mean = sum(returns) / len(returns)
        self.solved = len(returns) == N_EPISODES and mean >= self.threshold
        if self.solved or self.num_timesteps >= self._next_point:
            self.curve.append((seconds, self.num_timesteps, mean))
            self._next_point = self.num_timesteps + self.interval

    def _on_step(self) -> bool:
        return not self.solved


class LastTrainingEpisodes(UntilSolved):
    """Checks the last training episodes after each episode."""

    episodes = "the last 100 training episodes"
    _last_episode: dict[str, Any] | None = None

    def _on_step(self) -> bool:
        self._look()
        return super()._on_step()

    def _on_rollout_end(self) -> None:
        # The buffer is filled after _on_step, so episodes that ended in the last step are checked here
        self._look()

    def _look(self) -> None:
        buffer = self.model.ep_info_buffer
        if self.solved or not buffer or buffer[-1] is self._last_episode:
            return
        self._last_episode = buffer[-1]
        self.check([episode["r"] for episode in buffer], self.seconds())


class FreshEpisodes(UntilSolved):
    """
    Evaluates the stochastic policy in the environment itself at regular intervals. The clock is paused during evaluations.

    :param threshold: mean return to reach
    :param interval: number of environment steps between two evaluations
    :param env: as many environments as evaluation episodes
    """

    episodes = "100 fresh episodes"

    def __init__(self, threshold: float, interval: float, env: VecEnv):
        super().__init__(threshold, interval)
        self.env = env

    def _on_rollout_end(self) -> None:
        if self.num_timesteps >= self._next_point:
            self.evaluate()

    def evaluate(self) -> None:
        seconds = self.seconds()
        sync_envs_normalization(self.training_env, self.env)
        with th.random.fork_rng(devices=[]):
            returns, _ = evaluate_policy(StochasticPolicy(self.model), self.env, N_EPISODES, return_episode_rewards=True)
        self.check(returns, seconds)
        # Continue the clock from the time before the evaluation
        self._start = time.perf_counter() - seconds


class ConfirmedEpisodes(FreshEpisodes):
    """Evaluates as :class:`FreshEpisodes`, but only when the last training episodes reach the threshold."""

    episodes = "100 episodes in gymnasium's environments"
    _next_training_point = 0.0

    def _on_rollout_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        mean = sum(returns) / max(len(returns), 1)
        if len(returns) == N_EPISODES and mean >= self.threshold and self.num_timesteps >= self._next_point:
            self.evaluate()
        elif returns and self.num_timesteps >= self._next_training_point:
            self.curve.append((self.seconds(), self.num_timesteps, mean))
            self._next_training_point = self.num_timesteps + self.interval


class StochasticPolicy:
    """The policy of a model as in training: the noise of gSDE is resampled as often, for each environment."""

    def __init__(self, model: OnPolicyAlgorithm):
        self.policy = model.policy
        self.use_sde = model.use_sde
        self.sample_every = model.sde_sample_freq if model.sde_sample_freq > 0 else model.n_steps
        self.n_steps = 0

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        if self.use_sde and self.n_steps % self.sample_every == 0:
            self.policy.reset_noise(len(observation))
        self.n_steps += 1
        return self.policy.predict(observation)[0], None


def make_criterion(manager: ExperimentManager, threshold: float) -> UntilSolved:
    in_envpool = manager.vec_env_class is EnvPoolVecEnv
    if not in_envpool and not any(isinstance(callback, ExploringStarts) for callback in manager.callbacks):
        return LastTrainingEpisodes(threshold, manager.n_timesteps / POINTS_PER_CURVE)
    manager.vec_env_class, manager.vec_env_kwargs = DummyVecEnv if in_envpool else NativeVecEnv, {}
    env = manager.create_envs(N_EPISODES, eval_env=True, no_log=True)
    env.seed(10_000 + manager.seed)
    criterion = ConfirmedEpisodes if in_envpool else FreshEpisodes
    return criterion(threshold, manager.n_timesteps / EVALUATIONS_PER_BUDGET, env)


def run(job: Job) -> dict[str, Any]:
    register()
    th.set_num_threads(1)
    algo, vec_env_class = CONTESTANTS[job.contestant]
    threshold = gym.spec(job.env).reward_threshold
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"seed": job.seed, "eval_freq": -1, "log_interval": -1, "verbose": 0, "device": "cpu"}
        manager = ExperimentManager(argparse.Namespace(), algo, job.env, folder, **settings)
        if vec_env_class is not None:
            manager.vec_env_class = vec_env_class
        if vec_env_class is DummyVecEnv:
            # Otherwise, the manager takes it for the zoo's default, and uses NativeVecEnv
            sys.argv += ["--vec-env", "dummy"]
        if job.envpool:
            manager.vec_env_class, manager.vec_env_kwargs = EnvPoolVecEnv, {"num_threads": 1}
        # setup_experiment() prints the hyperparameters even if verbose is 0
        with contextlib.redirect_stdout(io.StringIO()):
            model, _ = manager.setup_experiment()
        vec_env = type(model.get_env().unwrapped).__name__
        criterion = make_criterion(manager, threshold)
        manager.callbacks.append(criterion)
        criterion.start_clock()
        manager.learn(model)
        seconds, steps = criterion.curve[-1][:2] if criterion.solved else (criterion.seconds(), model.num_timesteps)
    return {
        **job._asdict(),
        "vec_env": vec_env,
        "episodes": criterion.episodes,
        "threshold": threshold,
        "budget": manager.n_timesteps,
        "solved": criterion.solved,
        "seconds": seconds,
        "steps": steps,
        "curve": criterion.curve,
    }


def by_contestant(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups = {name: [result for result in results if result["contestant"] == name] for name in CONTESTANTS}
    return {name: runs for name, runs in groups.items() if runs}


def median(runs: list[dict[str, Any]], what: str) -> float:
    """:return: median of seconds or steps; a run that has not solved the environment counts as infinite"""
    return float(np.median([result[what] if result["solved"] else np.inf for result in runs]))


def interquartile_mean(scores: Sequence[float], digits: int = 1) -> str:
    """
    :return: interquartile mean over seeds, and its 95 % percentile bootstrap interval
        (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264)
    """
    return format_estimate(estimate(pd.Series(scores, dtype=float)), digits)


def print_table(env_id: str, results: list[dict[str, Any]]) -> None:
    groups = by_contestant(results)
    print(f"{env_id}: until the mean return of {results[0]['episodes']} is {results[0]['threshold']:g}")
    print(f"{'':>20} {'solved':>7} {'seconds, IQM':>20} {'min':>7} {'max':>7} {'median':>7} {'/ PPO':>6} {'median steps':>13}")
    for name, runs in groups.items():
        seconds = [result["seconds"] for result in runs if result["solved"]]
        solved, middle = f"{len(seconds)}/{len(runs)}", median(runs, "seconds")
        iqm, low, high = (
            (interquartile_mean(seconds, digits=2), min(seconds), max(seconds)) if seconds else ("-", np.inf, np.inf)
        )
        ratio = f"{middle / median(groups['PPO'], 'seconds'):.2f}" if "PPO" in groups else ""
        failed = "" if len(seconds) == len(runs) else "  (IQM, min, max: of the solved)"
        print(
            f"{name:>20} {solved:>7} {iqm:>20} {low:7.2f} {high:7.2f} {middle:7.2f} {ratio:>6} "
            f"{median(runs, 'steps'):13,.0f}{failed}"
        )
    print(flush=True)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """
    Draw learning curves over wall-clock seconds, one line for each seed.

    :param results: results of each environment
    :param path: image file
    """
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(results), figsize=(7 * len(results), 5.5), squeeze=False, layout="constrained")
    for axes, (env_id, env_results) in zip(all_axes[0], results.items()):
        groups = by_contestant(env_results)
        ends = {name: float(np.median([result["seconds"] for result in runs])) for name, runs in groups.items()}
        for row, name in enumerate(sorted(groups, key=lambda name: -ends[name])):
            color = f"C{list(CONTESTANTS).index(name)}"
            for result in groups[name]:
                seconds, _, means = zip(*result["curve"])
                axes.plot(seconds, means, color=color, linewidth=0.7, alpha=0.7)
            # Each label has its own row above the axes, at the time at which the median seed ends
            position = {"xy": (ends[name], 1), "xytext": (0, 5 + 13 * row), "textcoords": "offset points"}
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)}
            middle = median(groups[name], "seconds")
            label = f"{name}, " + (f"{middle:.3g} s" if np.isfinite(middle) else "not solved")
            axes.annotate(label, **position, xycoords=axes.get_xaxis_transform(), color=color, arrowprops=line)
        axes.axhline(env_results[0]["threshold"], color="black", linewidth=1, linestyle="--")
        axes.set(xlabel="wall-clock seconds of training", ylabel=f"mean return of {env_results[0]['episodes']}")
        # The curves hardly differ before
        axes.set(xscale="log", xlim=(min(ends.values()) / 10, None))
        axes.set_title(env_id, loc="left", pad=15 + 13 * len(groups))
    figure.savefig(path, dpi=150)


def contestants_in(env_id: str, vec_env: str | None) -> Iterable[str]:
    """:return: the contestants that differ in this environment"""
    in_the_zoo_only = env_id in ENVIRONMENTS or vec_env or gym.spec(env_id).vector_entry_point is None
    return AS_IN_THE_ZOO if in_the_zoo_only else CONTESTANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1", "CartPoleSwingUp-v0"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: all that differ in the environment")
    parser.add_argument("--vec-env", choices=["envpool"], help="train all contestants in this VecEnv")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=100, help="no search has seen seeds 100 to 109")
    parser.add_argument("--processes", type=int, default=1, help="parallel runs; with more than 1, times are less accurate")
    parser.add_argument("--output", type=Path, help="JSON file, written after each run")
    parser.add_argument("--results", type=Path, help="read the results from this JSON file, do not train")
    parser.add_argument("--plot", type=Path, help="image file")
    args = parser.parse_args()

    results: list[dict[str, Any]] = []
    if args.results:
        results = json.loads(args.results.read_text())["results"]
    else:
        for env in args.env:
            if gym.spec(env).reward_threshold is None:
                parser.error(f"{env} has no reward_threshold, at which it would be solved")
        jobs = [
            Job(env, contestant, seed, args.vec_env == "envpool")
            for env in args.env
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for contestant in args.contestants or contestants_in(env, args.vec_env)
        ]
        for result in in_processes(run, jobs, args.processes):
            results.append(result)
            state = "solved after" if result["solved"] else "not solved in"
            what = f"{result['env']}, {result['contestant']}, seed {result['seed']}"
            print(f"{what}: {state} {result['seconds']:.2f} s, {result['steps']} steps", flush=True)
            save(args, results)
    groups = {env: [result for result in results if result["env"] == env] for env in {result["env"]: 0 for result in results}}
    for env, env_results in groups.items():
        print_table(env, env_results)
    if args.plot:
        plot(groups, args.plot)


if __name__ == "__main__":
    main()
