"""A single run of an ablation study."""

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

#: A learning curve has so many points
N_BINS = 20
#: Episodes of the deterministic policy after a run, and the seed of their environments
N_EVALUATION_EPISODES, EVALUATION_SEED = 20, 10_000
#: Shares of the training after which gradients are measured
MEASURED_AT = (0.0, 0.5, 1.0)


class EpisodeReturns(BaseCallback):
    """Remembers the returns of the episodes that VPG learns from, and when they ended."""

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
    """In each process of a study: one thread, and interruptions are the main process's business."""
    th.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def execute(study: Study, run: Run) -> list[Row]:
    """
    :param study: the study
    :param run: one of its runs
    :return: its results, see :data:`sb3_vpg.study.study.COLUMNS`
    """
    return measure(study, run) if run.phase == "statistics" else train(study, run)


def make_env(study: Study, env_id: str, n_envs: int, seed: int) -> VecEnv:
    """:return: environments with Monitor, their rewards scaled"""
    vec_env_class: Any = NativeVecEnv if gym.spec(env_id).vector_entry_point else DummyVecEnv
    env = VecNormalize(
        make_vec_env(env_id, n_envs, seed=seed, vec_env_cls=vec_env_class),
        training=False,
        norm_obs=False,
        clip_reward=np.inf,
        epsilon=0.0,
    )
    # VecNormalize divides by the standard deviation; it does not learn it here
    env.ret_rms.var = np.array(study.environments[env_id].reward_scale ** -2.0)
    return env


def make_model(study: Study, run: Run) -> VPG:
    env = make_env(study, run.environment, study.environments[run.environment].n_envs, run.seed)
    keywords = study.keywords(run.environment, run.formulation)
    return VPG(env=env, learning_rate=run.learning_rate, seed=run.seed, device="cpu", **keywords)


def train(study: Study, run: Run) -> list[Row]:
    """
    Train, and evaluate the deterministic policy.

    :raises ValueError: if no episode ends in the last tenth of the budget, which is what runs are judged by
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
    at_the_end = (0.9 * budget < timesteps) & (timesteps <= budget)
    if not at_the_end.any():
        raise ValueError(f"{run}: no episode ends in the last tenth of n_timesteps={budget}; give it a larger budget")
    rows.append((budget, "final_return", returns[at_the_end].mean()))
    env = make_env(study, run.environment, N_EVALUATION_EPISODES, EVALUATION_SEED)
    evaluation, _ = evaluate_policy(model, env, N_EVALUATION_EPISODES, deterministic=True)
    rows.append((budget, "evaluation_return", float(evaluation)))  # type: ignore[arg-type]
    rows.append((budget, LAST_METRIC, seconds))
    return [(*run, *row) for row in rows]


def measure(study: Study, run: Run) -> list[Row]:
    """Train, and measure the gradients of all formulations of whole episodes at the start, in the middle and at the end."""
    environment = study.environments[run.environment]
    measured = measured_formulations(study, run.environment)
    env = make_env(study, run.environment, environment.n_envs, EVALUATION_SEED + run.seed)
    start = time.perf_counter()
    model = make_model(study, run)
    rows: list[Row] = []
    for share in MEASURED_AT:
        timesteps = int(share * environment.n_timesteps)
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
        for name, one in statistics.items():
            rows += [(*run._replace(formulation=name), timesteps, metric, value) for metric, value in numbers_of(one).items()]
    # One for each formulation that has rows, and for the run itself
    seconds = (environment.n_timesteps, LAST_METRIC, time.perf_counter() - start)
    return rows + [(*run._replace(formulation=name), *seconds) for name in dict.fromkeys([*measured, run.formulation])]


def measured_formulations(study: Study, env_id: str) -> Mapping[str, UpdateSpec]:
    """:return: the study's formulations of whole episodes"""
    n_envs = study.environments[env_id].n_envs
    measured = {}
    for name in study.formulations:
        keywords: dict[str, Any] = study.keywords(env_id, name)
        if keywords.get("n_episodes") is not None:
            formulation = {field.name: keywords[field.name] for field in fields(Formulation) if field.name in keywords}
            reduction = keywords.get("loss_reduction", "mean")
            measured[name] = UpdateSpec(Formulation(**formulation), n_envs * keywords["n_episodes"], reduction)
    return measured


def numbers_of(statistics: GradientStatistics) -> dict[str, float]:
    """:return: each statistic under its name, its interval as <name>_low and <name>_high"""
    numbers: dict[str, float] = {}
    for field in fields(statistics):
        estimate = getattr(statistics, field.name)
        numbers |= {field.name: estimate.value, f"{field.name}_low": estimate.low, f"{field.name}_high": estimate.high}
    return numbers
