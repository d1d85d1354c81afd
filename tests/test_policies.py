"""
LogisticPolicy is the sigmoid of a linear function; TanhMeanPolicy keeps the mean in the action space; LogStdSchedule sets the
noise of Gaussian policies.
"""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, BOX, SpacesEnv
from helpers.models import changed, weights
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg import VPG, LogisticPolicy, TanhMeanPolicy
from sb3_vpg.policies import LogStdSchedule


def logit_weights(model):
    return [p.detach().numpy().astype(float).flatten() for p in model.policy.action_net.parameters()]


@pytest.mark.parametrize("bias", [False, True])
def test_a_logistic_policy_on_cartpole_is_the_sigmoid_of_four_weights(bias):
    model = VPG("LogisticPolicy", "CartPole-v1", n_steps=64, seed=0, learning_rate=0.1, policy_kwargs={"bias": bias})
    assert [p.shape for p in model.policy.action_net.parameters()] == [(1, 4), (1,)][: 1 + bias]
    assert sum(p.numel() for p in model._parameter_groups.actor) == 4 + bias
    model.learn(256)
    theta, b = [*logit_weights(model), np.zeros(1)][:2]
    assert (theta != 0).all()
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    observations = th.as_tensor(x)
    probability = 1 / (1 + np.exp(-(x @ theta + b)))
    distribution = model.policy.get_distribution(observations).distribution
    np.testing.assert_allclose(distribution.probs[:, 1].numpy(force=True), probability, rtol=1e-5)
    actions, _ = model.predict(x, deterministic=True)
    np.testing.assert_array_equal(actions, probability > 0.5)


def test_a_logistic_policy_without_a_critic_learns_four_numbers():
    model = VPG("LogisticPolicy", "CartPole-v1", estimator="reward_to_go", n_episodes=4, seed=0)
    before = weights(model)
    model.learn(100)
    assert changed(before, weights(model)) == {"action_net.weight"}


def test_a_logistic_policy_can_be_saved_alone_and_within_a_model(tmp_path):
    model = VPG("LogisticPolicy", "CartPole-v1", n_steps=32, seed=0, policy_kwargs={"bias": True}).learn(64)
    observation = np.ones(4, np.float32)
    expected = model.policy.get_distribution(th.as_tensor(observation)[None]).distribution.probs
    model.policy.save(str(tmp_path / "policy"))
    model.save(tmp_path / "model")
    for policy in (LogisticPolicy.load(str(tmp_path / "policy")), VPG.load(tmp_path / "model").policy):
        assert len(list(policy.action_net.parameters())) == 2
        assert th.equal(policy.get_distribution(th.as_tensor(observation)[None]).distribution.probs, expected)


def test_a_logistic_policy_can_be_used_with_a2c():
    model = A2C(LogisticPolicy, "CartPole-v1", seed=0)
    before = weights(model)
    model.learn(10)
    assert "action_net.weight" in changed(before, weights(model))


@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(3), *(ACTION_SPACES[k] for k in ("Box", "MultiDiscrete", "MultiBinary"))]
)
def test_a_logistic_policy_refuses_other_actions(action_space):
    with pytest.raises(ValueError, match=r"LogisticPolicy .*Discrete\(2\)"):
        VPG("LogisticPolicy", SpacesEnv(BOX, action_space))


def test_a_logistic_policy_takes_hidden_layers_and_other_observations():
    model = VPG(
        "LogisticPolicy",
        SpacesEnv(spaces.Discrete(4), spaces.Discrete(2)),
        n_steps=10,
        seed=0,
        policy_kwargs={"net_arch": {"pi": [8], "vf": []}},
    ).learn(10)
    assert model.policy.action_net.weight.shape == (1, 8)
    assert model.policy.value_net.weight.shape == (1, 4)


LIMITS = spaces.Box(np.array([[-1, 0], [-3, 2]], np.float32), np.array([[2, 1], [5, 4]], np.float32))


@pytest.mark.parametrize("use_sde", [False, True])
def test_the_mean_of_a_tanh_mean_policy_is_a_tanh_between_the_limits_of_the_actions(use_sde, tmp_path):
    model = VPG("TanhMeanPolicy", SpacesEnv(BOX, LIMITS), n_steps=32, seed=0, use_sde=use_sde, learning_rate=0.1, device="cpu")
    before = weights(model)
    model.learn(64)
    assert {"log_std", "action_net.0.weight", "action_net.0.bias"} <= changed(before, weights(model))
    x = np.random.default_rng(0).normal(size=(50, *BOX.shape)).astype(np.float32)
    means, _ = model.predict(x, deterministic=True)
    with th.no_grad():
        z = model.policy.action_net[0](model.policy.mlp_extractor.forward_actor(th.as_tensor(x))).reshape(-1, 2, 2).numpy()
    low, high = LIMITS.low, LIMITS.high
    np.testing.assert_allclose(means, low + (high - low) * (1 + np.tanh(z)) / 2, rtol=1e-5, atol=1e-5)
    # SB3 clips the actions that predict() returns. Here, nothing is to be clipped
    modes = model.policy.get_distribution(th.as_tensor(x)).mode().reshape(means.shape).numpy(force=True)
    np.testing.assert_allclose(means, modes)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(VPG.load(tmp_path / "model").predict(x, deterministic=True)[0], means)


@pytest.mark.parametrize("space", [spaces.Discrete(2), spaces.Box(-np.inf, 1.0, (2,))])
def test_a_tanh_mean_policy_needs_limits(space):
    with pytest.raises(ValueError, match="TanhMeanPolicy needs a Box action space with finite limits"):
        TanhMeanPolicy(BOX, space, lambda _: 0.1)


def test_a_tanh_mean_policy_refuses_squashed_actions():
    with pytest.raises(ValueError, match="squash_output"):
        TanhMeanPolicy(BOX, LIMITS, lambda _: 0.1, use_sde=True, squash_output=True)


class LogStds(BaseCallback):
    """The log standard deviation with which each rollout was collected."""

    def __init__(self):
        super().__init__()
        self.values = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.values.append(self.model.policy.log_std.detach().numpy().copy())


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("algorithm", [VPG, A2C, PPO])
def test_the_log_std_is_scheduled_and_not_learned(algorithm, use_sde):
    keywords = {"batch_size": 8} if algorithm is PPO else {}
    model = algorithm("MlpPolicy", "Pendulum-v1", n_steps=16, use_sde=use_sde, learning_rate=0.01, device="cpu", **keywords)
    before = weights(model)
    log_stds = LogStds()
    model.learn(64, callback=[LogStdSchedule(initial=0.5, final=-1.5), log_stds])
    for value, expected in zip(log_stds.values, [0.5, 0.0, -0.5, -1.0], strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)
    assert {"log_std", "action_net.weight"} <= changed(before, weights(model))
    # Without the callback, it is learned again
    before = weights(model)
    model.learn(64)
    assert "log_std" in changed(before, weights(model))


def test_actions_have_the_scheduled_noise():
    model = VPG("MlpPolicy", "Pendulum-v1", n_steps=2000, learning_rate=0.0, seed=0)
    model.learn(2000, callback=LogStdSchedule(initial=-3.0, final=-3.0))
    observations, actions = model.rollout_buffer.observations[:, 0], model.rollout_buffer.actions[:, 0]
    means = model.policy.get_distribution(th.as_tensor(observations)).mode().numpy(force=True)
    # The standard error is 1.6 %
    np.testing.assert_allclose(np.std(actions - means), np.exp(-3.0), rtol=0.1)


def test_a_log_std_schedule_needs_a_gaussian_policy():
    with pytest.raises(ValueError, match="LogStdSchedule needs a Gaussian policy"):
        VPG("MlpPolicy", "CartPole-v1").learn(10, callback=LogStdSchedule())
    with pytest.raises(ValueError, match="final"):
        LogStdSchedule(final=float("nan"))


def test_a_second_training_begins_with_the_initial_log_std(tmp_path):
    model = VPG("MlpPolicy", "Pendulum-v1", n_steps=16)
    for _ in range(2):
        log_stds = LogStds()
        model.learn(32, callback=[LogStdSchedule(initial=0.5, final=-1.5), log_stds])
        np.testing.assert_allclose(log_stds.values, [[0.5], [-0.5]], atol=1e-6)
    log_stds = LogStds()
    model.learn(64, callback=[LogStdSchedule(initial=0.5, final=-1.5), log_stds], reset_num_timesteps=False)
    # 32 of 96 steps are done
    np.testing.assert_allclose(log_stds.values[0], 0.5 - 2 / 3, atol=1e-6)


def test_after_an_interruption_the_next_training_thaws_the_log_std():
    class Interruption(BaseCallback):
        def _on_step(self):
            raise KeyboardInterrupt

    model = VPG("MlpPolicy", "Pendulum-v1", n_steps=16)
    with pytest.raises(KeyboardInterrupt):
        model.learn(32, callback=[LogStdSchedule(), Interruption()])
    schedule = LogStdSchedule()
    model.learn(16, callback=schedule)
    assert model.policy.log_std.requires_grad
    # The zoo calls it a second time, and after errors
    schedule.on_training_end()
    LogStdSchedule().on_training_end()


def test_a_logistic_policy_needs_an_array():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,))})
    with pytest.raises(ValueError, match="LogisticPolicy does not support Dict observations"):
        LogisticPolicy(space, spaces.Discrete(2), lambda _: 0.1)
