"""The settings of a study, and one of its runs."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.studies import LADDER, SETTINGS, written

from sb3_vpg.estimators import Formulation
from sb3_vpg.study.results import Results
from sb3_vpg.study.study import COLUMNS, LAST_METRIC, Run, load_study
from sb3_vpg.study.training import N_BINS, make_env, make_model, measured_formulations, train


def test_every_step_of_the_ladder_is_a_vpg_in_every_environment():
    study = load_study(LADDER)
    assert {"CartPole-v1", "Acrobot-v1", "CartPoleSwingUp-v0", "CartPoleSwingUp-v1", "Pendulum-v1"} == set(study.environments)
    for env_id in study.environments:
        for name in study.formulations:
            model = make_model(study, Run(env_id, name, "final", 0, 0.01))
            assert model.n_envs == study.environments[env_id].n_envs
            model.env.close()


def test_the_ladder_has_each_step_once_and_most_differ_in_one_keyword():
    study = load_study(LADDER)
    formulations = study.formulations
    assert len({yaml.safe_dump(dict(f), sort_keys=True) for f in formulations.values()}) == len(formulations)
    changed = {
        ("total_return", "total_return_discounted"): {"gamma"},
        ("total_return_discounted", "reward_to_go"): {"estimator"},
        ("reward_to_go", "batch_normalized"): {"normalize_advantage"},
        ("reward_to_go", "episode_normalized"): {"normalize_advantage"},
        ("reward_to_go", "mean_baseline"): {"baseline"},
        ("reward_to_go", "time_baseline"): {"baseline"},
        ("time_baseline", "leave_one_out"): {"baseline"},
        ("reward_to_go", "value_baseline"): {"baseline"},
        ("value_baseline", "gae_0.99"): {"estimator", "baseline", "gae_lambda"},
        ("gae_0.99", "gae_0.95"): {"gae_lambda"},
        ("gae_0.95", "gae_0.8"): {"gae_lambda"},
        ("gae_0.8", "td_residual"): {"estimator", "gae_lambda"},
        ("gae_0.95", "gae_normalized"): {"normalize_advantage"},
        ("batch_normalized", "batch_normalized_4_episodes"): {"n_episodes"},
        ("gae_normalized", "gae_normalized_4_episodes"): {"n_episodes"},
        ("gae_normalized", "gae_normalized_32_steps"): {"n_episodes", "n_steps"},
        ("batch_normalized", "gamma_t"): {"discount_state_distribution"},
        ("batch_normalized", "trajectory_sum"): {"loss_reduction"},
    }
    assert {tuple(step) for step in study.steps} == set(changed)
    assert set().union(*changed) == set(formulations)
    for (one, other), expected in changed.items():
        a, b = (study.keywords("CartPole-v1", name) for name in (one, other))
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} == expected, (one, other)


def test_what_is_measured_is_what_is_trained(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    measured = measured_formulations(study, "CartPole-v1")
    # Pieces of 8 steps are no whole episodes
    assert list(measured) == ["reward_to_go", "gae"]
    assert measured["reward_to_go"].formulation == Formulation("reward_to_go", gamma=0.9, gae_lambda=0.5)
    for name, one in measured.items():
        model = make_model(study, Run("CartPole-v1", name, "final", 0, 0.01))
        assert one.episodes_per_batch == model.n_envs * model.n_episodes
        if name == "reward_to_go":
            assert one.formulation == model.plan.formulation


def test_rewards_are_scaled_and_returns_are_not(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    env = make_env(study, "CartPole-v1", 1, seed=0)
    env.reset()
    rewards, done = [], False
    while not done:
        _, reward, (done,), infos = env.step(np.array([0]))
        rewards.append(reward[0])
    assert rewards == pytest.approx([0.1] * len(rewards))
    assert infos[0]["episode"]["r"] == len(rewards)


def test_a_learning_curve_is_the_mean_of_the_episodes_of_each_bin(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    rows = pd.DataFrame(train(study, Run("CartPole-v1", "gae", "final", 0, 0.001)), columns=list(COLUMNS))
    curve = rows[rows.metric == "return"]
    assert set(curve.timesteps) <= {3000 * (i + 1) // N_BINS for i in range(N_BINS)}
    assert len(curve) > N_BINS // 2
    assert curve.value.between(8, 500).all()
    assert rows.metric.iloc[-1] == LAST_METRIC
    # The last tenth is the last two bins
    ends = curve[curve.timesteps > 2700].value
    assert ends.min() <= rows[rows.metric == "final_return"].value.item() <= ends.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates=0.0"),
        ({"statistics": {**SETTINGS["statistics"], "policy_of": "ppo"}}, "policy_of='ppo'"),
        ({"environments": {"NoSuch-v0": SETTINGS["environments"]["CartPole-v1"]}}, "'NoSuch-v0'"),
        ({"seeds": 3}, "expected the keys"),
        ({"steps": [["gae", "ppo"]]}, "steps='ppo'"),
        ({"steps": [["gae"]]}, "must be two formulations"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 0, "n_envs": 1, "score_range": [0, 1]}}}, "n_timesteps=0"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 9, "n_envs": 1, "score_range": [1, 0]}}}, "score_range=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_named(change: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_study(written({**SETTINGS, **change}, tmp_path))


def test_a_budget_too_small_to_judge_by_is_named(tmp_path: Path):
    # Episodes of two environments end after each 400 steps: none in the last 190 of 1900
    environment = {"n_timesteps": 1900, "n_envs": 2, "score_range": [-1500, 0]}
    study = load_study(written({**SETTINGS, "environments": {"Pendulum-v1": environment}}, tmp_path))
    with pytest.raises(ValueError, match="no episode ends in the last tenth"):
        train(study, Run("Pendulum-v1", "gae", "final", 0, 0.001))


def test_a_file_of_something_else_is_not_taken_for_results(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a file of results"):
        Results(path)
    assert path.read_text() == "a,b\n1,2\n"
