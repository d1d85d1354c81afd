"""Execute a single run of an ablation study."""

import signal
import time
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_vpg.diagnostics import GradientStatistics, UpdateSpec, gradient_statistics
from sb3_vpg.envs.native_vec_env import NativeVecEnv
from sb3_vpg.estimators import Formulation
from sb3_vpg.study.study import LAST_METRIC, Row, Run, Study
from sb3_vpg.vpg import VPG

#: Number of points of a learning curve
N_BINS = 20
#: Number of evaluation episodes (deterministic policy) after a run, and the seed of their environments
N_EVALUATION_EPISODES, EVALUATION_SEED = 20, 10_000
#: Fractions of the budget after which gradients are measured
MEASURED_AT = (0.0, 0.5, 1.0)


class EpisodeReturns(BaseCallback):
    """Records the return and the end (in timesteps) of each episode that VPG uses for training."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[int] = []
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        for env_index in (self.locals["dones"] & self.locals["recording"]).nonzero()[0]:
            self.timesteps.append(self.num_timesteps)
            self.returns.append(self.locals["infos"][env_index]["episode"]["r"])
        return True


def prepare_process() -> None:
    """Set up a worker process: one thread, and Ctrl-C is handled by the main process only."""
    th.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def execute(study: Study, run: Run) -> list[Row]:
    """
    :param study: the study
    :param run: one of its runs
    :return: the results of the run, see :data:`sb3_vpg.study.study.COLUMNS`
    """
    return measure(study, run) if run.phase == "statistics" else train(study, run)


def make_env(study: Study, env_id: str, n_envs: int, seed: int) -> VecEnv:
    """:return: environments with Monitor and scaled rewards"""
    vec_env_class: Any = NativeVecEnv if gym.spec(env_id).vector_entry_point else DummyVecEnv
    env = VecNormalize(
        make_vec_env(env_id, n_envs, seed=seed, vec_env_cls=vec_env_class),
        training=False,
        norm_obs=False,
        clip_reward=np.inf,
        epsilon=0.0,
    )
    # VecNormalize divides rewards by this standard deviation, which is fixed (training=False)
    env.ret_rms.var = np.array(study.environments[env_id].reward_scale ** -2.0)
    return env


def make_model(study: Study, run: Run) -> VPG:
    env = make_env(study, run.environment, study.environments[run.environment].n_envs, run.seed)
    keywords = study.keywords(run.environment, run.formulation)
    return VPG(env=env, learning_rate=run.learning_rate, seed=run.seed, device="cpu", **keywords)


def train(study: Study, run: Run) -> list[Row]:
    """
    Train, and evaluate the deterministic policy.

    :raises ValueError: if no episode ends in the last tenth of the budget: the final return is the mean of these episodes
    """
    budget = study.environments[run.environment].n_timesteps
    episodes = EpisodeReturns()
    start = time.perf_counter()
    model = make_model(study, run).learn(budget, callback=episodes)
    seconds = time.perf_counter() - start

    timesteps, returns = np.array(episodes.timesteps), np.array(episodes.returns)
    rows: list[tuple[int, str, float]] = []
    for low, high in pairwise(np.linspace(0, budget, N_BINS + 1)):
        in_bin = (low < timesteps) & (timesteps <= high)
        if in_bin.any():
            rows.append((int(high), "return", returns[in_bin].mean()))
    in_last_tenth = (0.9 * budget < timesteps) & (timesteps <= budget)
    if not in_last_tenth.any():
        raise ValueError(f"{run}: no episode ends in the last tenth of n_timesteps={budget}; increase n_timesteps")
    rows.append((budget, "final_return", returns[in_last_tenth].mean()))
    env = make_env(study, run.environment, N_EVALUATION_EPISODES, EVALUATION_SEED)
    evaluation, _ = evaluate_policy(model, env, N_EVALUATION_EPISODES, deterministic=True)
    rows.append((budget, "evaluation_return", float(evaluation)))  # type: ignore[arg-type]
    rows.append((budget, LAST_METRIC, seconds))
    return [(*run, *row) for row in rows]


def measure(study: Study, run: Run) -> list[Row]:
    """Train, and measure gradients at the start, in the middle and at the end, for each formulation with ``n_episodes``."""
    environment = study.environments[run.environment]
    measured = measured_formulations(study, run.environment)
    env = make_env(study, run.environment, environment.n_envs, EVALUATION_SEED + run.seed)
    start = time.perf_counter()
    model = make_model(study, run)
    rows: list[Row] = []
    for fraction in MEASURED_AT:
        timesteps = int(fraction * environment.n_timesteps)
        if timesteps > model.num_timesteps:
            model.learn(timesteps - model.num_timesteps, reset_num_timesteps=False)
        statistics = gradient_statistics(
            model,
            env,
            measured,
            n_episodes=study.statistics.n_episodes,
            reference=study.statistics.reference,
            seed=EVALUATION_SEED + run.seed,
        )
        for name, estimates in statistics.items():
            formulation_run = run._replace(formulation=name)
            rows += [(*formulation_run, timesteps, metric, value) for metric, value in flatten_statistics(estimates).items()]
    # The last row of each formulation that has rows, and of the run itself
    seconds = (environment.n_timesteps, LAST_METRIC, time.perf_counter() - start)
    return rows + [(*run._replace(formulation=name), *seconds) for name in dict.fromkeys([*measured, run.formulation])]


def measured_formulations(study: Study, env_id: str) -> Mapping[str, UpdateSpec]:
    """:return: the updates of the study's formulations with ``n_episodes``, by name"""
    n_envs = study.environments[env_id].n_envs
    measured = {}
    for name in study.formulations:
        keywords: dict[str, Any] = study.keywords(env_id, name)
        if keywords.get("n_episodes") is not None:
            formulation = {field.name: keywords[field.name] for field in fields(Formulation) if field.name in keywords}
            reduction = keywords.get("loss_reduction", "mean")
            measured[name] = UpdateSpec(Formulation(**formulation), n_envs * keywords["n_episodes"], reduction)
    return measured


def flatten_statistics(statistics: GradientStatistics) -> dict[str, float]:
    """:return: the value of each statistic as <name>, and its interval as <name>_low and <name>_high"""
    numbers: dict[str, float] = {}
    for field in fields(statistics):
        estimate = getattr(statistics, field.name)
        numbers |= {field.name: estimate.value, f"{field.name}_low": estimate.low, f"{field.name}_high": estimate.high}
    return numbers
