"""The presets are the algorithms that they are named after: one update of each is what its source says."""

import math

import numpy as np
import pytest
import torch as th
import yaml
from helpers.installed import CHECKOUT
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG, presets

ALPHA, ALPHA_CRITIC, GAMMA = 0.01, 0.02, 0.5
LINEAR = {"policy": "LogisticPolicy", "env": "CartPole-v1", "seed": 0, "device": "cpu"}


def linear_model(preset) -> VPG:
    """A logistic policy, whose score is (a - P(a = 1 | s)) s, and a linear value function w . s + b."""
    return VPG(**LINEAR, learning_rate=ALPHA, critic_learning_rate=ALPHA_CRITIC, gamma=GAMMA, **preset)


def weights_of(model: VPG) -> tuple[np.ndarray, np.ndarray, float]:
    """:return: theta of the policy, w and b of the value function"""
    actor, critic = model.policy.action_net, model.policy.value_net
    return tuple(x.detach().numpy().copy().squeeze() for x in (actor.weight, critic.weight, critic.bias))


def rollout_of(model: VPG) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:return: states, actions and rewards of the last rollout, in double precision"""
    buffer = model.rollout_buffer
    n = buffer.n_recorded
    arrays = buffer.observations[:n, 0], buffer.actions[:n, 0, 0], buffer.rewards[:n, 0]
    return tuple(x.astype(np.float64) for x in arrays)


def scores_of(theta: np.ndarray, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return (actions - 1 / (1 + np.exp(-states @ theta)))[:, None] * states


@pytest.mark.parametrize("with_baseline", [False, True])
def test_reinforce_takes_the_sum_in_the_book(with_baseline: bool):
    """Sutton & Barto (2018), sections 13.3 and 13.4: the sum over t of gamma^t (G_t - V(s_t)) grad log pi."""
    model = linear_model(presets.REINFORCE_WITH_BASELINE if with_baseline else presets.REINFORCE)
    theta, w, b = weights_of(model)
    model.learn(1)  # one episode
    states, actions, rewards = rollout_of(model)

    t = np.arange(len(rewards))
    returns = np.array([np.sum(GAMMA ** (t[k:] - k) * rewards[k:]) for k in t])
    errors = returns - (states @ w + b if with_baseline else 0)
    new_theta, new_w, new_b = weights_of(model)
    gradient = (GAMMA**t * errors) @ scores_of(theta, states, actions)
    np.testing.assert_allclose(new_theta - theta, ALPHA * gradient, rtol=1e-3, atol=1e-7)
    # The step size of the critic holds for the mean over steps
    expected = ALPHA_CRITIC * np.mean(errors[:, None] * states, axis=0) if with_baseline else np.zeros_like(w)
    np.testing.assert_allclose(new_w - w, expected, rtol=1e-3, atol=1e-7)
    assert new_b - b == pytest.approx(ALPHA_CRITIC * errors.mean() if with_baseline else 0, rel=1e-3)


def test_actor_critic_takes_the_steps_in_the_book():
    """Sutton & Barto (2018), section 13.5: delta grad V, and gamma^t delta grad log pi, at each step t."""
    model = linear_model(presets.ACTOR_CRITIC)
    for t in range(3):
        theta, w, b = weights_of(model)
        model.learn(1, reset_num_timesteps=t == 0)
        states, actions, rewards = rollout_of(model)
        delta = rewards[0] + GAMMA * (model._last_obs[0] @ w + b) - (states[0] @ w + b)
        new_theta, new_w, new_b = weights_of(model)
        gradient = GAMMA**t * delta * scores_of(theta, states, actions)[0]
        np.testing.assert_allclose(new_theta - theta, ALPHA * gradient, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(new_w - w, ALPHA_CRITIC * delta * states[0], rtol=1e-3, atol=1e-7)
        assert new_b - b == pytest.approx(ALPHA_CRITIC * delta, rel=1e-3)


def test_a2c_has_the_weights_of_a2c():
    same = {"policy": "MlpPolicy", "env": "CartPole-v1", "seed": 0, "device": "cpu"}
    # Clipping is the one difference: A2C clips actor and critic together
    a2c = A2C(**same, max_grad_norm=math.inf).learn(100)
    vpg = VPG(**same, max_grad_norm=None, **presets.A2C).learn(100)
    for one, other in zip(vpg.policy.parameters(), a2c.policy.parameters(), strict=True):
        th.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_spinning_up_has_the_settings_of_the_tutorial():
    entry = yaml.safe_load((CHECKOUT / "hyperparams" / "tutorials" / "spinning_up.yml").read_text())["CartPole-v1"]
    # As the zoo reads it
    entry["policy_kwargs"] = eval(entry["policy_kwargs"], {"nn": th.nn})
    assert {key: entry[key] for key in presets.SPINNING_UP} == presets.SPINNING_UP

    model = VPG("MlpPolicy", make_vec_env("CartPole-v1", n_envs=4), device="cpu", **presets.SPINNING_UP)
    assert model.n_steps * model.n_envs == 4000
