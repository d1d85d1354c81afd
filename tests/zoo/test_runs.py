"""A budget of timesteps is that of the loaded model and the run together, and of a trial of a search."""

from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG
from sb3_vpg.zoo.runs import StopAtBudget, check_budget, continue_in_place

# ---------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_for_1000_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned for 1000 steps, in rollouts of 50."""
    file = tmp_path_factory.mktemp("trained") / "model.zip"
    policy_kwargs = {"net_arch": [16]}
    VPG("MlpPolicy", "CartPole-v1", n_steps=50, policy_kwargs=policy_kwargs, seed=1).learn(1000).save(file)
    return file


@pytest.mark.parametrize(("n", "steps_more"), [(1001, 50), (1050, 50), (1051, 100), (1500, 500), (2000, 1000)])
def test_n_is_the_budget_of_the_loaded_model_and_the_run_together(trained_for_1000_steps: Path, n: int, steps_more: int):
    check_budget(trained_for_1000_steps, n)
    model = VPG.load(trained_for_1000_steps, env=gym.make("CartPole-v1"))
    continue_in_place(model)
    model.learn(n)
    assert model.num_timesteps == 1000 + steps_more


@pytest.mark.parametrize("n", [1, 999, 1000])
def test_a_budget_that_is_used_up_is_refused(trained_for_1000_steps: Path, n: int):
    message = f"trained for 1000 steps. .* is {n}: no steps are left. To train it for {n} more steps, use -n {1000 + n}$"
    with pytest.raises(ValueError, match=message):
        check_budget(trained_for_1000_steps, n)


def test_where_the_budget_is_used_up_nothing_is_left_to_train(trained_for_1000_steps: Path):
    model = VPG.load(trained_for_1000_steps, env=gym.make("CartPole-v1"))
    continue_in_place(model)
    model.learn(900)
    assert (model.num_timesteps, model._n_updates) == (1000, 20)


# ---------------------------------------------------------------------------------------------------------------
# The search space
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_timesteps", [96, 100])
def test_a_trial_stops_at_its_budget_within_a_rollout_of_whole_episodes(n_timesteps: int):
    env = make_vec_env("CartPole-v1", n_envs=8)
    model = VPG("MlpPolicy", env, n_steps=1, estimator="total_return", policy_kwargs={"net_arch": [16]}, seed=1)
    model.learn(n_timesteps, callback=StopAtBudget())
    # Eight environments step at a time
    assert model.num_timesteps == -(-n_timesteps // 8) * 8
