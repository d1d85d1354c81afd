"""The settings of an ablation study, read from a YAML file, and its runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml

from sb3_vpg.common.checks import check_choice, check_number
from sb3_vpg.envs import register_environments

#: "search" for the learning rate, "final" runs with the selected learning rate, gradient "statistics"
PHASES = ("search", "final", "statistics")
#: Runs of the search have the seeds from this number on, which no other run has
FIRST_SEARCH_SEED = 1000


class Run(NamedTuple):
    """
    One training run.

    :param environment: id of the environment
    :param formulation: name of the formulation
    :param phase: one of :data:`PHASES`
    :param seed: random seed
    :param learning_rate: learning rate of the actor
    """

    environment: str
    formulation: str
    phase: str
    seed: int
    learning_rate: float


# Columns of the results. Each row has one number of one run
COLUMNS = (*Run._fields, "timesteps", "metric", "value")
Row = tuple[str, str, str, int, float, int, str, float]
# Metric of the last row of a run
LAST_METRIC = "seconds"


@dataclass(frozen=True)
class Environment:
    """
    Settings of an environment.

    :param n_timesteps: budget of a run, summed over all environments, >= 1
    :param n_envs: number of environments, >= 1
    :param score_range: returns with the normalized scores 0 and 1
    :param reward_scale: factor of the rewards during training, > 0
    :param keywords: further keywords of VPG, for all formulations
    """

    n_timesteps: int
    n_envs: int
    score_range: tuple[float, float]
    reward_scale: float = 1.0
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("n_timesteps", self.n_timesteps, low=1, integer=True)
        check_number("n_envs", self.n_envs, low=1, integer=True)
        check_number("reward_scale", self.reward_scale, low=0, low_included=False)
        low, high = self.score_range
        check_number("score_range", high, low=low, low_included=False)


@dataclass(frozen=True)
class Statistics:
    """
    Settings of the gradient statistics.

    :param policy_of: formulation that trains the policies at which gradients are measured
    :param reference: formulation with whose gradient directions are compared
    :param n_episodes: number of episodes, at least two batches of each formulation. Typical: 128 to 4096.
    """

    policy_of: str
    reference: str
    n_episodes: int


@dataclass(frozen=True)
class Study:
    """
    Settings of a study.

    :param learning_rates: candidates of the search
    :param common: keywords of VPG for all runs
    :param environments: settings of the environments, by id
    :param formulations: keywords of VPG for each formulation, by name
    :param steps: pairs of formulations; the report compares the second with the first
    :param statistics: settings of the gradient statistics
    """

    learning_rates: Sequence[float]
    common: Mapping[str, Any]
    environments: Mapping[str, Environment]
    formulations: Mapping[str, Mapping[str, Any]]
    steps: Sequence[Sequence[str]]
    statistics: Statistics

    def __post_init__(self) -> None:
        for rate in self.learning_rates:
            check_number("learning_rates", rate, low=0, low_included=False)
        for step in self.steps:
            if len(step) != 2:
                raise ValueError(f"steps: {step} is not allowed; it must be two formulations")
            for name in step:
                check_choice("steps", name, self.formulations)
        check_choice("statistics: policy_of", self.statistics.policy_of, self.formulations)
        check_choice("statistics: reference", self.statistics.reference, self.formulations)

    def keywords(self, env_id: str, formulation: str) -> dict[str, Any]:
        """:return: keywords of VPG for a run, without learning rate and seed"""
        return {**self.common, **self.environments[env_id].keywords, **self.formulations[formulation]}

    def search_runs(self, env_id: str, formulations: Iterable[str], n_seeds: int) -> Iterator[Run]:
        """:return: runs of the search for learning rates"""
        for formulation in formulations:
            for learning_rate in self.learning_rates:
                for seed in range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + n_seeds):
                    yield Run(env_id, formulation, "search", seed, learning_rate)

    def final_runs(self, env_id: str, learning_rates: Mapping[str, float], n_seeds: int) -> Iterator[Run]:
        """
        :param env_id: id of the environment
        :param learning_rates: learning rate of each formulation
        :param n_seeds: number of runs of each formulation
        :return: runs with these learning rates
        """
        for seed in range(n_seeds):
            for formulation, learning_rate in learning_rates.items():
                yield Run(env_id, formulation, "final", seed, learning_rate)

    def statistics_runs(self, env_id: str, learning_rate: float, n_seeds: int) -> Iterator[Run]:
        """:return: runs that measure gradients at the start, in the middle and at the end of training"""
        for seed in range(n_seeds):
            yield Run(env_id, self.statistics.policy_of, "statistics", seed, learning_rate)


def load_study(path: Path) -> Study:
    """
    :param path: YAML file; hyperparams/ablation/ladder.yml explains the keys
    :return: the study
    :raises ValueError: if a key is missing or unknown, or a value is not allowed
    """
    register_environments()
    settings = yaml.safe_load(path.read_text())
    expected = {"learning_rates", "common", "environments", "formulations", "steps", "statistics"}
    if not isinstance(settings, dict) or set(settings) != expected:
        given = sorted(settings) if isinstance(settings, dict) else settings
        raise ValueError(f"{path}: expected the keys {', '.join(sorted(expected))}, got {given}")
    for env_id in settings["environments"]:
        if env_id not in gym.registry:
            raise ValueError(f"{path}: the environment {env_id!r} is not registered")
    own = ("n_timesteps", "n_envs", "score_range", "reward_scale")
    environments = {
        env_id: Environment(
            **{key: value for key, value in entry.items() if key in own},
            keywords={key: value for key, value in entry.items() if key not in own},
        )
        for env_id, entry in settings["environments"].items()
    }
    return Study(**{**settings, "environments": environments, "statistics": Statistics(**settings["statistics"])})
