"""What a search draws is valid, covers every formulation, and is bounded by the budget."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import optuna
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG, RecurrentVPG, zoo
from sb3_vpg.estimators import BASELINES, ESTIMATORS
from sb3_vpg.zoo.runs import StopAtBudget
from sb3_vpg.zoo.search_space import ESTIMATORS_WITH_BASELINES


@pytest.fixture(scope="module")
def search_space() -> ModuleType:
    """
    The zoo's module of search spaces with VPG's added, under its name but not among the imported modules: importing rl_zoo3
    would put another TimeLimit into gymnasium, for all tests that follow.
    """
    folder = Path(importlib.util.find_spec("rl_zoo3").origin).parent
    spec = importlib.util.spec_from_file_location("rl_zoo3.hyperparams_opt", folder / "hyperparams_opt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    zoo.patch(module)
    return module


# The hyperparameter file may have set these; the zoo puts what Optuna draws on top
BASE_CONFIGS = [
    {},
    {"partial_episodes": "bootstrap"},
    {"partial_episodes": "finish"},
    {"partial_episodes": "truncate"},
    {"n_episodes": 1},
    {"n_episodes": 4, "estimator": "total_return", "baseline": "time", "normalize_advantage": "episode"},
    {"estimator": "reward_to_go", "loss_reduction": "trajectory", "discount_state_distribution": True},
]


@pytest.mark.parametrize("base", BASE_CONFIGS, ids=str)
@pytest.mark.parametrize("formulation", ESTIMATORS_WITH_BASELINES)
def test_every_drawn_formulation_is_valid(search_space: ModuleType, formulation: str, base: dict[str, Any]):
    smallest = {
        "formulation": formulation,
        "n_steps_pow": 3,
        "one_minus_gamma": 0.1,
        "one_minus_gae_lambda": 0.2,
        "learning_rate": 0.001,
        "critic_learning_rate": 0.002,
        "n_critic_updates": 5,
        "ent_coef": 0.01,
        "max_grad_norm": 0.5,
        "net_arch": "tiny",
        "activation_fn": "tanh",
    }
    for normalize_advantage in (False, True):
        trial = optuna.trial.FixedTrial({**smallest, "normalize_advantage": normalize_advantage})
        params = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, 8, {})
        model = VPG("MlpPolicy", "CartPole-v1", **{**base, **params})
        assert (model.estimator, model.baseline) == ESTIMATORS_WITH_BASELINES[formulation]
        assert model.normalize_advantage is normalize_advantage
        assert (model.n_steps, model.gamma, model.gae_lambda) == (8, 0.9, 0.8)
        assert (model.n_critic_updates, model.ent_coef, model.max_grad_norm) == (5, 0.01, 0.5)
        assert (model.lr_schedule(1), model.critic_lr_schedule(1)) == (0.001, 0.002)


def test_every_valid_formulation_can_be_drawn_and_only_once():
    def is_valid(estimator: str, baseline: str | None) -> bool:
        try:
            VPG("MlpPolicy", gym.make("CartPole-v1"), estimator=estimator, baseline=baseline, n_steps=8)
        except ValueError:
            return False
        return True

    valid = {(estimator, baseline) for estimator in ESTIMATORS for baseline in BASELINES if is_valid(estimator, baseline)}
    # These contain the value function as they are: with baseline="value" they are the same again
    twice = {("td_residual", "value"), ("gae", "value")}
    assert twice < valid
    assert len(ESTIMATORS_WITH_BASELINES) == len(set(ESTIMATORS_WITH_BASELINES.values()))
    assert set(ESTIMATORS_WITH_BASELINES.values()) == valid - twice


def drawn_trials(search_space: ModuleType, algo: str) -> Iterator[tuple[optuna.Trial, dict[str, Any]]]:
    """:return: 60 trials and what they draw, which is what their stored values convert to"""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        trial = study.ask()
        drawn = search_space.HYPERPARAMS_SAMPLER[algo](trial, 2, 1, {})
        assert search_space.HYPERPARAMS_CONVERTER[algo](trial.params) == drawn
        yield trial, drawn


def test_stored_trials_convert_to_what_was_drawn(search_space: ModuleType):
    drawn_formulations = set()
    for trial, drawn in drawn_trials(search_space, "vpg"):
        for name in ("gamma", "gae_lambda", "n_steps"):
            assert trial.user_attrs[name] == drawn[name]
        VPG("MlpPolicy", "CartPole-v1", **drawn)
        drawn_formulations.add((drawn["estimator"], drawn["baseline"]))
    assert drawn_formulations == set(ESTIMATORS_WITH_BASELINES.values())


def test_recurrent_models_draw_their_lstms_too(search_space: ModuleType):
    drawn_lstms = set()
    for _, drawn in drawn_trials(search_space, "vpg_lstm"):
        drawn_lstms.add((drawn["policy_kwargs"]["lstm_hidden_size"], drawn["policy_kwargs"]["enable_critic_lstm"]))
    assert drawn_lstms == {(2**power, critic) for power in range(4, 10) for critic in (False, True)}
    model = RecurrentVPG("MlpLstmPolicy", "CartPole-v1", **drawn)
    assert model.policy.lstm_actor.hidden_size == drawn["policy_kwargs"]["lstm_hidden_size"]
    assert (model.policy.lstm_critic is not None) == drawn["policy_kwargs"]["enable_critic_lstm"]
    # The others are those of VPG
    assert {"estimator", "baseline", "n_steps", "critic_learning_rate"} <= drawn.keys()


@pytest.mark.parametrize("algo", ["vpg", "vpg_mask"])
def test_models_without_memory_draw_no_lstms(search_space: ModuleType, algo: str):
    drawn = search_space.HYPERPARAMS_SAMPLER[algo](optuna.create_study().ask(), 2, 1, {})
    assert drawn["policy_kwargs"].keys() == {"net_arch", "activation_fn"}


def draw_n_steps(search_space: ModuleType, n_envs: int, n_timesteps: int | None) -> set[int]:
    """:return: what 100 trials with this budget draw"""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(100):
        trial = study.ask()
        if n_timesteps is not None:
            trial.set_user_attr("n_timesteps", n_timesteps)
        n_steps = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, n_envs, {})["n_steps"]
        assert trial.user_attrs["batch_size"] == n_envs * n_steps
        drawn.add(n_steps)
    return drawn


@pytest.mark.parametrize(
    ("n_envs", "n_timesteps", "smallest", "largest"),
    [
        # The default entry, with a budget of several sizes, and without one
        (8, 1_000_000, 4, 2048),
        (8, 50_000, 4, 512),
        (8, 1024, 4, 8),
        (8, 300, 4, 4),
        (8, 100, 1, 1),
        (8, 7, 1, 1),
        (8, None, 4, 2048),
        # One step of CartPole's 64 environments is a batch of more than 32 steps
        (64, 50_000, 1, 64),
        (64, 100, 1, 1),
        (1, 1_000_000, 32, 16384),
        (1, 300, 32, 32),
        (1, 100, 8, 8),
        # 4 * 10 is the first of at least 32, 1024 * 10 the last of at most 16384
        (10, None, 4, 1024),
    ],
)
def test_what_a_search_draws_is_the_batch_in_all_bounded_by_the_budget(
    search_space: ModuleType, n_envs: int, n_timesteps: int | None, smallest: int, largest: int
):
    powers_of_two = {2**power for power in range(smallest.bit_length() - 1, largest.bit_length())}
    assert draw_n_steps(search_space, n_envs, n_timesteps) == powers_of_two


@pytest.mark.parametrize("n_timesteps", [1000, 1024, 1100])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_the_longest_rollout_that_is_drawn_leaves_a_trial_eight_updates(
    search_space: ModuleType, n_envs: int, n_timesteps: int
):
    n_steps = max(draw_n_steps(search_space, n_envs, n_timesteps))
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    model = VPG("MlpPolicy", env, n_steps=n_steps, policy_kwargs={"net_arch": [16]}, seed=1)
    model.learn(n_timesteps, callback=StopAtBudget())
    assert model._n_updates >= 8


def test_a_stored_trial_keeps_its_n_steps_whatever_the_environments_and_the_budget(search_space: ModuleType):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for n_envs, n_timesteps in [(1, 300), (64, 50_000), (8, 10**6)]:
        trial = study.ask()
        trial.set_user_attr("n_timesteps", n_timesteps)
        drawn = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, n_envs, {})
        assert search_space.HYPERPARAMS_CONVERTER["vpg"](trial.params) == drawn
