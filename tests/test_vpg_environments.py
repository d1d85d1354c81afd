"""VPG takes environments by name, as objects, vectorized and normalized, as Stable-Baselines3's algorithms do."""

import gymnasium as gym
import numpy as np
import torch as th
from helpers.envs import ACTION_SPACES, BOX, SpacesEnv
from helpers.models import SMALL, Spy, assert_same_weights, changed, counting_envs, small_model, spaces_envs, weights
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_vpg import VPG

# ---------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------


def test_subprocess_environments_train_as_those_in_the_same_process():
    def trained(vec_env_cls):
        env = make_vec_env(lambda: SpacesEnv(BOX, ACTION_SPACES["Box"]), n_envs=2, seed=0, vec_env_cls=vec_env_cls)
        model = small_model(env).learn(60)
        env.close()
        return model

    first, second = trained(DummyVecEnv), trained(SubprocVecEnv)
    assert first.num_timesteps == second.num_timesteps == 60
    assert_same_weights(first, second)


def test_vec_normalize_rewards_and_observations_at_time_limits_are_the_normalised_ones():
    env = VecNormalize(counting_envs(n_envs=2, lengths=(4,), time_limit=True), gamma=0.5)
    env.reset()
    for _ in range(20):
        env.step(np.zeros(2, int))
    # Fixed statistics from here on, so that it can be said what is to be expected
    env.training = False
    found = []

    def look(spy):
        buffer, policy = spy.model.rollout_buffer, spy.model.policy
        ends = buffer.observations[:, :, 1] == env.normalize_obs(np.array([0.0, 3.0]))[1]
        rewards = env.normalize_reward(np.tile(np.arange(1.0, 5.0), 2)[:, None])
        np.testing.assert_allclose(buffer.rewards, np.broadcast_to(rewards, buffer.rewards.shape), rtol=1e-5)
        at_limit = buffer.observations[ends]
        at_limit[:, 1] = env.normalize_obs(np.array([0.0, 4.0]))[1]
        with th.no_grad():
            terminal_values = policy.predict_values(th.as_tensor(at_limit)).flatten().numpy()
        found.append((buffer.returns[ends], buffer.rewards[ends] + 0.5 * terminal_values))

    small_model(env, n_steps=8, gamma=0.5, estimator="td_residual").learn(32, callback=Spy(look, "rollout_end"))
    assert [len(target) for target, _ in found] == [4, 4]
    for target, expected in found:
        np.testing.assert_allclose(target, expected, rtol=1e-4)


def test_vec_normalize_and_whole_episodes_go_together():
    env = VecNormalize(counting_envs(n_envs=2, lengths=(3, 5)), gamma=0.5)
    model = small_model(env, estimator="total_return", baseline="leave_one_out", n_episodes=2).learn(32)
    buffer = model.rollout_buffer
    assert model._n_updates == 2
    assert buffer.n_episodes == 4
    # Rewards grow within an episode, in whatever unit
    np.testing.assert_array_equal(np.diff(buffer.rewards, axis=0) < 0, buffer.episode_starts[1:] == 1)
    assert env.obs_rms.count > 32


def test_one_environment_and_one_step_per_update_is_allowed():
    model = small_model(spaces_envs(n_envs=1), n_steps=1)
    before = weights(model)
    model.learn(4)
    assert model._n_updates == 4
    assert all(p.isfinite().all() for p in model.policy.parameters())
    assert "value_net.bias" in changed(before, weights(model))


# ---------------------------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------------------------


def test_an_environment_can_be_given_by_name_or_as_an_object():
    for env in ("CartPole-v1", gym.make("CartPole-v1"), DummyVecEnv([lambda: gym.make("CartPole-v1")])):
        assert VPG("MlpPolicy", env, n_steps=4, policy_kwargs=SMALL).learn(4).num_timesteps == 4
