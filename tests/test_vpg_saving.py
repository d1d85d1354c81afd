"""A saved model predicts and goes on training as the one that was saved."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch as th
from helpers.envs import BOX
from helpers.models import (
    ACTOR,
    SMALL,
    assert_same_weights,
    changed,
    counting_envs,
    learning_rates,
    small_model,
    spaces_envs,
    weights,
    with_and_without_critic,
)
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import set_random_seed

from sb3_vpg import VPG


def saved(model, **kwargs):
    file = io.BytesIO()
    model.save(file, **kwargs)
    file.seek(0)
    return file


@pytest.mark.parametrize("critic_learning_rate", [None, 0.02])
@with_and_without_critic
def test_a_loaded_model_predicts_and_goes_on_training_the_same(formulation, critic_learning_rate):
    model = small_model(critic_learning_rate=critic_learning_rate, n_critic_updates=2, **formulation).learn(40)
    file = saved(model)
    model.set_env(spaces_envs())
    loaded = VPG.load(file, env=spaces_envs())

    observations = np.stack([BOX.sample() for _ in range(20)])
    for deterministic in (True, False):
        th.manual_seed(1)
        expected = model.predict(observations, deterministic=deterministic)[0]
        th.manual_seed(1)
        np.testing.assert_array_equal(loaded.predict(observations, deterministic=deterministic)[0], expected)

    for m in (model, loaded):
        m.set_random_seed(5)
        m.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps
    assert model._n_updates == loaded._n_updates > 1
    assert_same_weights(model, loaded)


def test_the_optimizer_is_saved_with_its_two_groups_and_their_learning_rates():
    model = small_model(learning_rate=0.001, critic_learning_rate=0.02).learn(40)
    loaded = VPG.load(saved(model))
    assert learning_rates(model) == learning_rates(loaded) == (0.001, 0.02)
    first, second = model.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict()
    assert len(first["param_groups"]) == 2
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    assert len(first["state"]) == len(list(model.policy.parameters()))
    for key, state in first["state"].items():
        for name, value in state.items():
            assert th.equal(value, second["state"][key][name])


@with_and_without_critic
def test_a_model_can_be_loaded_with_another_number_of_environments(formulation):
    file = saved(small_model(**formulation).learn(40))
    for n_envs in (1, 3):
        file.seek(0)
        loaded = VPG.load(file, env=spaces_envs(n_envs=n_envs))
        before = weights(loaded)
        loaded.learn(20 * n_envs, reset_num_timesteps=False)
        assert loaded.n_envs == loaded.rollout_buffer.rewards.shape[1] == n_envs
        assert changed(before, weights(loaded)) >= set(weights(loaded, ACTOR))


def test_a_model_loaded_without_environment_predicts_and_learns_once_it_has_one(tmp_path):
    model = small_model(spaces_envs(), estimator="total_return", baseline="leave_one_out", n_episodes=1).learn(40)
    model.save(tmp_path / "model")
    loaded = VPG.load(tmp_path / "model")
    assert loaded.get_env() is None
    with pytest.raises(ValueError, match=r"The model has no environment: call set_env\(env\)"):
        loaded.learn(20)
    observation = BOX.sample()
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
    )
    loaded.set_env(spaces_envs())
    loaded.learn(20)
    assert loaded._n_updates > model._n_updates


def test_keywords_are_saved_and_can_be_changed_on_loading():
    keywords = dict(
        estimator="reward_to_go",
        baseline="time",
        normalize_advantage="episode",
        discount_state_distribution=True,
        loss_reduction="trajectory",
        n_critic_updates=3,
        critic_batch_size=16,
        critic_learning_rate=0.02,
        n_episodes=2,
    )
    model = small_model(**keywords)
    loaded = VPG.load(saved(model))
    assert {name: getattr(loaded, name) for name in keywords} == keywords
    assert loaded.rollout_buffer.formulation == model.rollout_buffer.formulation
    other = VPG.load(saved(model), estimator="gae", baseline=None, n_episodes=None)
    assert other.plan.uses_value_function
    assert other.plan.partial_episodes.bootstrap
    assert other.rollout_buffer.formulation.estimator == "gae"


def test_save_excludes_and_includes_what_it_is_told_to():
    model = small_model(tensorboard_log="somewhere")
    data = load_from_zip_file(saved(model))[0]
    assert "tensorboard_log" in data
    assert data.keys().isdisjoint({"policy", "env", "rollout_buffer", "_parameter_groups"})
    data = load_from_zip_file(saved(model, exclude=["tensorboard_log"]))[0]
    assert "tensorboard_log" not in data
    with_env = VPG.load(saved(model, include=["env"], exclude=["tensorboard_log"]))
    with_env.learn(20)
    assert with_env.num_timesteps == 20


def test_parameters_can_be_taken_from_one_model_to_another():
    first, second = small_model(seed=1).learn(40), small_model(seed=2)
    parameters = copy.deepcopy(first.get_parameters())
    assert parameters.keys() == {"policy", "policy.optimizer"}
    second.set_parameters(parameters)
    assert_same_weights(first, second)
    for model in (first, second):
        model.set_env(spaces_envs())
        set_random_seed(3)
        model.learn(20)
    assert_same_weights(first, second)


def test_the_policy_of_an_a2c_model_can_be_taken_over():
    a2c = A2C("MlpPolicy", spaces_envs(), seed=1, policy_kwargs=dict(SMALL)).learn(20)
    model = small_model()
    model.set_parameters({"policy": a2c.policy.state_dict()}, exact_match=False)
    assert_same_weights(model, a2c)
    assert changed(weights(a2c), weights(model.learn(20))) == set(weights(a2c))


@with_and_without_critic
def test_training_goes_on_in_a_new_environment(formulation):
    model = small_model(counting_envs(), **formulation).learn(40)
    n_updates, num_timesteps = model._n_updates, model.num_timesteps
    model.set_env(counting_envs(lengths=(7,)))
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= num_timesteps + 20
    assert model._n_updates > n_updates
    # All that was recorded comes from the new environment: each first step of an episode shows t = 0, and none ends before 7
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.observations[buffer.episode_starts.astype(bool)][:, 1], 0)
    np.testing.assert_array_equal(buffer.rewards[buffer.mask], buffer.observations[buffer.mask][:, 1] + 1)


def test_a_policy_can_be_copied_before_and_after_training():
    model = small_model()
    for _ in range(2):
        twin = copy.deepcopy(model.policy)
        assert all(th.equal(p, q) for p, q in zip(model.policy.parameters(), twin.parameters()))
        model.learn(20)


def test_equal_seeds_give_equal_weights():
    def run(seed, **kwargs):
        return small_model(spaces_envs(seed=seed), seed=seed, n_critic_updates=2, critic_batch_size=8, **kwargs).learn(60)

    assert_same_weights(run(1), run(1))
    first, second = run(1), run(2)
    assert changed(weights(first), weights(second)) >= {"action_net.weight", "value_net.weight"}


@pytest.mark.parametrize("keywords", [{"baseline": "leave_one_out"}, {"estimator": "total_return"}], ids=str)
def test_a_model_that_needs_several_environments_can_be_loaded_with_one(keywords, tmp_path):
    keywords = {"estimator": "reward_to_go", "n_episodes": 1, **keywords}
    VPG("MlpPolicy", make_vec_env("CartPole-v1", 2), **keywords).learn(20).save(tmp_path / "model")
    model = VPG.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 1))
    evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    with pytest.raises(ValueError, match="one episode per update"):
        model.learn(20)


def test_a_model_without_environments_can_be_pickled():
    model = VPG.load(saved(small_model()))
    copied = pickle.loads(pickle.dumps(model))
    assert_same_weights(copied, model)
    copied.set_env(spaces_envs())
    copied.learn(20)
