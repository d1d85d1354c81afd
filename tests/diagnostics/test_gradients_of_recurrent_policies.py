"""Gradients of recurrent policies: through time to the beginning of an episode, or of the rollout."""

import numpy as np
import pytest
import torch as th
from helpers.envs import CountingEnv
from helpers.gradients import NAMES
from helpers.models import Spy, assert_same_weights
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import DummyVecEnv
from test_recurrent import CRITICS, SMALL, each_critic, recurrent_model

from sb3_vpg.diagnostics import GradientStatisticsCallback, UpdateSpec, batch_gradients, collect_episodes, gradient_statistics
from sb3_vpg.diagnostics.gradients import episodes_in
from sb3_vpg.estimators import Formulation

GAMMA = 0.5
FORMULATIONS = {
    "reward_to_go": {"estimator": "reward_to_go"},
    "leave_one_out": {"estimator": "reward_to_go", "baseline": "leave_one_out"},
    "gae": {"estimator": "gae"},
    "batch": {"estimator": "td_residual", "normalize_advantage": "batch"},
}


def counting_envs(*lengths, **kwargs):
    return DummyVecEnv([lambda own=own: CountingEnv(own, **kwargs) for own in lengths])


def measured(name, size, loss_reduction="mean"):
    keywords = {"gamma": GAMMA, "gae_lambda": 0.95, "normalize_advantage": False, **FORMULATIONS[name]}
    return UpdateSpec(Formulation(**keywords), size, loss_reduction)


@pytest.mark.parametrize("name", FORMULATIONS)
@each_critic
def test_the_gradient_of_a_batch_is_that_of_the_update(critic, name):
    env = counting_envs([3, 7], [4, 2], [1, 6], time_limit=True)
    keywords = {"gae_lambda": 0.95, "normalize_advantage": False, "vf_coef": 0.0, **FORMULATIONS[name]}
    model = recurrent_model(env, critic=critic, n_episodes=2, gamma=GAMMA, **keywords)
    _, callback = model._setup_learn(0)
    model.collect_rollouts(env, callback, model.rollout_buffer, 1)
    model.policy.zero_grad()
    model._accumulate_gradients(model._make_runner(), *model._batch_counts()[:2])
    gradient = batch_gradients(model.policy, episodes_in(model.rollout_buffer, 6), [measured(name, 6)])[0, 0]
    expected = -th.cat([p.grad.flatten() for p in model._parameter_groups.actor])
    assert expected.abs().max() > 1e-3
    th.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def gradient_by_hand(policy, episodes, column, parameters):
    """Gradient of the mean over an episode of gamma-discounted reward-to-go times log pi, one step after the other."""
    n_steps = int(episodes.rollout.mask[:, column].sum())
    indices = episodes.indices[:n_steps, column]
    samples = episodes.buffer._get_samples(indices)
    rewards = episodes.rollout.rewards[:n_steps, column]
    states = tuple(th.zeros(1, 1, policy.lstm_actor.hidden_size) for _ in range(2))
    loss = 0.0
    for t in range(n_steps):
        distribution, states = policy.get_distribution(samples.observations[t : t + 1], states, th.zeros(1))
        to_go = sum(GAMMA**k * reward for k, reward in enumerate(rewards[t:]))
        loss = loss + to_go * distribution.log_prob(samples.actions[t].long()).sum() / n_steps
    return th.cat([gradient.flatten() for gradient in th.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("algorithm", ["RecurrentVPG", "RecurrentPPO"])
def test_the_gradient_of_an_episode_goes_back_to_its_beginning(algorithm):
    env = counting_envs([3, 7], [4, 2])
    if algorithm == "RecurrentVPG":
        model = recurrent_model(env)
    else:
        model = RecurrentPPO("MlpLstmPolicy", env, policy_kwargs=SMALL, seed=0, device="cpu")
    episodes = collect_episodes(model, env, 4)
    together = batch_gradients(model.policy, episodes, [measured("reward_to_go", 1), measured("gae", 1)])
    policy = model.policy
    actor = [policy.lstm_actor, policy.mlp_extractor.policy_net, policy.action_net]
    parameters = [p for p in policy.parameters() if any(p is own for module in actor for own in module.parameters())]
    for column in range(4):
        expected = gradient_by_hand(policy, episodes, column, parameters)
        th.testing.assert_close(together[0, column], expected, rtol=1e-4, atol=1e-6)
    assert not th.allclose(together[0], together[1])


@pytest.mark.parametrize("kwargs", [{"n_steps": 8}, {"n_episodes": 2, "estimator": "reward_to_go"}], ids=str)
def test_the_mean_of_a_rollout_is_the_gradient_of_the_update(kwargs):
    """Also in rollouts that begin in the middle of an episode, with the states of then."""
    logged = []
    model = recurrent_model(counting_envs([3, 5], [20]), gamma=0.9, **kwargs)
    spy = Spy(lambda spy: logged.append(dict(spy.logger.name_to_value)), "rollout_start")
    model.learn(200, callback=[spy, GradientStatisticsCallback(1)], log_interval=10_000)
    assert len(logged) > 2
    for values in logged[1:]:
        assert values["gradient/mean_norm"] == pytest.approx(values["train/policy_grad_norm"], rel=1e-3)
        assert {name.removeprefix("gradient/") for name in values if name.startswith("gradient/")} == set(NAMES)


def test_a_measurement_leaves_the_model_alone():
    first, second = (recurrent_model(counting_envs([7], [5])).learn(48) for _ in range(2))
    specs = {name: measured(name, 2) for name in FORMULATIONS}
    options = {"n_episodes": 8, "reference": "gae", "seed": 3, "n_bootstrap": 10}
    one, two = (gradient_statistics(first, counting_envs([7], [5]), specs, **options) for _ in range(2))
    assert one == two
    assert all(np.isfinite(statistics.variance.value) for statistics in one.values())
    for model in (first, second):
        model.set_random_seed(1)
        model.learn(48, reset_num_timesteps=False)
    assert_same_weights(first, second)


def test_training_goes_on_after_a_measurement_in_the_training_environment():
    env = counting_envs([7], [5])
    model = recurrent_model(env, critic=CRITICS["none"]).learn(24)
    gradient_statistics(model, env, {"gae": measured("gae", 2)}, n_episodes=4, n_bootstrap=0)
    model.learn(24, reset_num_timesteps=False)
    # Observations are (episode, step of the episode), rewards one more than the step
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.observations[:, :, 1] + 1, buffer.rewards)
    np.testing.assert_array_equal(buffer.episode_starts[0], 1.0)
