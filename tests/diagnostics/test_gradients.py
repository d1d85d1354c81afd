"""Gradients of episodes: against VPG's own update, against the exact variance of a small MDP, for any policy and algorithm."""

import copy

import numpy as np
import pytest
import torch as th
from helpers.envs import ACTION_SPACES, OBSERVATION_SPACES, CountingEnv, SpacesEnv, policy_for
from helpers.gradients import values
from helpers.mdp import GAMMA, MDPEnv, action_probabilities, batches, gradient_of_batch, make_model, probability, trajectories
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG
from sb3_vpg.common.policy_runner import make_policy_runner
from sb3_vpg.diagnostics import (
    GradientStatisticsCallback,
    UpdateSpec,
    batch_gradients,
    collect_episodes,
    gradient_statistics,
    rollout_statistics,
    statistics_of,
)
from sb3_vpg.diagnostics.gradients import episodes_in, psi
from sb3_vpg.estimators import Formulation, Rollout

# ---------------------------------------------------------------------------------------------------------------
# From episodes to gradients
# ---------------------------------------------------------------------------------------------------------------

FORMULATIONS = {
    "total_return": {"estimator": "total_return"},
    "reward_to_go": {"estimator": "reward_to_go"},
    "gamma_t": {"estimator": "reward_to_go", "discount_state_distribution": True},
    "mean": {"estimator": "reward_to_go", "baseline": "mean"},
    "time": {"estimator": "reward_to_go", "baseline": "time"},
    "leave_one_out": {"estimator": "reward_to_go", "baseline": "leave_one_out"},
    "value": {"estimator": "reward_to_go", "baseline": "value"},
    "td_residual": {"estimator": "td_residual"},
    "gae": {"estimator": "gae", "gae_lambda": 0.7},
    "batch": {"estimator": "reward_to_go", "normalize_advantage": "batch"},
    "episode": {"estimator": "reward_to_go", "normalize_advantage": "episode"},
}


def as_measured(keywords, size, reduction="mean"):
    keywords = {"gamma": GAMMA, "gae_lambda": 0.95, "normalize_advantage": False, **keywords}
    return UpdateSpec(Formulation(**keywords), size, reduction)


def flat_gradient(parameters):
    return th.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("loss_reduction", ["mean", "trajectory"])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_the_gradient_of_a_batch_is_that_of_the_update(name, loss_reduction):
    env = DummyVecEnv([lambda: CountingEnv([3, 7, 1], time_limit=True), lambda: CountingEnv([4, 2])] * 3)
    keywords = {"gae_lambda": 0.95, "normalize_advantage": False, "vf_coef": 0.0, **FORMULATIONS[name]}
    model = VPG("MlpPolicy", env, n_episodes=1, gamma=GAMMA, loss_reduction=loss_reduction, seed=0, **keywords)
    _, callback = model._setup_learn(0)
    model.collect_rollouts(env, callback, model.rollout_buffer, 1)
    model.policy.zero_grad()
    model._accumulate_gradients(make_policy_runner(model.policy), *model._batch_counts()[:2])
    measured = as_measured(FORMULATIONS[name], 6, loss_reduction)
    gradient = batch_gradients(model.policy, episodes_in(model.rollout_buffer, 6), [measured])[0, 0]
    expected = -flat_gradient(model._parameter_groups.actor)
    assert expected.abs().max() > 1e-3
    th.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_first_episodes_of_each_environment_whatever_their_length():
    lengths = [[1, 2], [5, 1], [2, 3]]
    env = DummyVecEnv([lambda own=own: CountingEnv(own) for own in lengths])
    model = VPG("MlpPolicy", env, seed=0)
    episodes = collect_episodes(model, env, 5)
    # Two of each, in order of environment; the sixth is not asked for. Rewards are 1, 2, 3 ...
    assert episodes.rollout.mask.sum(axis=0).tolist() == [1, 2, 5, 1, 2]
    assert episodes.rollout.rewards.T.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 2, 0, 0, 0],
        [1, 2, 3, 4, 5],
        [1, 0, 0, 0, 0],
        [1, 2, 0, 0, 0],
    ]
    observations = episodes.buffer.flat_observations(episodes.indices[episodes.rollout.mask])
    steps, columns = episodes.rollout.mask.nonzero()
    assert observations[:, 1].tolist() == steps.tolist()
    assert observations[:, 0].tolist() == [columns.tolist()[i] % 2 for i in range(len(columns))]


def exact_statistics(model, p_end, n_episodes):
    """|G|^2 and tr(Sigma) of the gradient of a batch, by enumeration."""
    mean, mean_square = 0.0, 0.0
    for batch, weight in batches(model, p_end, n_episodes):
        gradient = gradient_of_batch(model, batch)
        mean, mean_square = mean + weight * gradient, mean_square + weight * (gradient @ gradient)
    return mean @ mean, mean_square - mean @ mean


OF_ONE_EPISODE = ("total_return", "reward_to_go", "gamma_t", "value", "td_residual", "gae", "episode")
OF_TWO_EPISODES = ("mean", "time", "leave_one_out", "batch")
P_END = 0.25


@pytest.fixture(scope="module")
def mdp_episodes():
    model = make_model(1)
    th.manual_seed(0)
    env = DummyVecEnv([lambda: MDPEnv(P_END)] * 20)
    env.seed(0)
    return collect_episodes(model, env, 2000)


@pytest.fixture(scope="module")
def mdp_gradients(mdp_episodes):
    """Gradients of batches of sampled episodes, by formulation."""
    gradients = {}
    for size, names in ((1, OF_ONE_EPISODE), (2, OF_TWO_EPISODES)):
        measured = [as_measured(FORMULATIONS[name], size, "trajectory") for name in names]
        gradients |= zip(names, batch_gradients(make_model(1).policy, mdp_episodes, measured))
    return gradients


@pytest.mark.parametrize("name", [*OF_ONE_EPISODE, *OF_TWO_EPISODES])
def test_the_exact_variance_of_the_mdp_is_in_the_interval(name, mdp_gradients):
    size = 1 if name in OF_ONE_EPISODE else 2
    model = make_model(size, n_episodes=1, **{"gae_lambda": 0.95, **FORMULATIONS[name]})
    signal, variance = exact_statistics(model, P_END, size)
    statistics = statistics_of(mdp_gradients[name], n_episodes=size, confidence=0.99, n_bootstrap=500)
    assert statistics.variance.low < variance < statistics.variance.high < 1.5 * statistics.variance.low
    assert statistics.snr.low < signal / variance < statistics.snr.high
    assert statistics.noise_scale.low < size * variance / signal < statistics.noise_scale.high


def test_the_environment_is_the_enumerated_mdp(mdp_episodes):
    pi = action_probabilities(make_model(1))
    discounted = GAMMA ** np.arange(3)[:, None] * mdp_episodes.rollout.rewards
    expected = sum(probability(t, pi) * (GAMMA ** np.arange(len(t.states)) * t.rewards).sum() for t in trajectories(P_END))
    assert discounted.sum(axis=0).mean() == pytest.approx(expected, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------
# Any policy, any algorithm
# ---------------------------------------------------------------------------------------------------------------


def spaces_env(observation, action, n_envs=2):
    return DummyVecEnv([lambda: SpacesEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action])] * n_envs)


@pytest.mark.parametrize(
    ("observation", "action", "kwargs"),
    [
        *(("Box", action, {}) for action in ACTION_SPACES),
        *((observation, "Discrete", {}) for observation in OBSERVATION_SPACES if observation != "Box"),
        ("Box", "Box", {"use_sde": True}),
        ("image", "Box", {"policy_kwargs": {"share_features_extractor": False}}),
    ],
)
def test_many_weightings_at_once_as_one_by_one(observation, action, kwargs):
    env = spaces_env(observation, action)
    policy = policy_for(OBSERVATION_SPACES[observation])
    model = A2C(policy, env, seed=0, **kwargs)
    episodes = collect_episodes(model, env, 4)
    measured = [as_measured(keywords, 2) for keywords in FORMULATIONS.values()]
    together = batch_gradients(model.policy, episodes, measured)
    assert together.shape[:2] == (len(measured), 2)
    assert together.abs().amax(dim=(1, 2)).min() > 0
    for one, gradients in zip(measured, together):
        alone = batch_gradients(model.policy, episodes, [one])[0]
        th.testing.assert_close(gradients, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", [A2C, PPO, VPG])
def test_any_algorithm_and_the_model_is_left_alone(algorithm):
    env = spaces_env("Box", "Discrete")
    model = algorithm("MlpPolicy", env, n_steps=32, seed=0).learn(64)
    before, timesteps = copy.deepcopy(model.policy.state_dict()), model.num_timesteps
    measured = {name: as_measured(keywords, 4) for name, keywords in FORMULATIONS.items()}
    options = {"n_episodes": 16, "reference": "value", "seed": 3, "n_bootstrap": 50}
    one, two = (gradient_statistics(model, spaces_env("Box", "Discrete"), measured, **options) for _ in range(2))
    assert one == two
    assert list(one) == list(measured)
    assert model.num_timesteps == timesteps
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    model.learn(32, reset_num_timesteps=False)


def test_a_measurement_with_a_seed_leaves_the_random_numbers_of_training_alone():
    model = VPG("MlpPolicy", spaces_env("Box", "Discrete"), n_steps=32, seed=0)
    measured = {"gae": as_measured({"estimator": "gae"}, 2)}
    before = th.get_rng_state()
    gradient_statistics(model, spaces_env("Box", "Discrete"), measured, n_episodes=4, n_bootstrap=0, seed=3)
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("algorithm", [A2C, VPG])
def test_training_goes_on_after_a_measurement_in_the_training_environment(algorithm):
    env = DummyVecEnv([lambda: CountingEnv([7]), lambda: CountingEnv([5])])
    model = algorithm("MlpPolicy", env, n_steps=6, seed=0).learn(12)
    gradient_statistics(model, env, {"gae": as_measured({"estimator": "gae"}, 2)}, n_episodes=4, n_bootstrap=0)
    rollouts = []

    class Keeper(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            rollouts.append(copy.deepcopy(self.model.rollout_buffer))

    model.learn(12, callback=Keeper(), reset_num_timesteps=False)
    (buffer,) = rollouts
    # Observations are (episode, step of the episode), rewards one more than the step
    np.testing.assert_array_equal(buffer.episode_starts[0], 1.0)
    np.testing.assert_array_equal(buffer.observations[:, :, 1] + 1, buffer.rewards)
    if algorithm is VPG:
        np.testing.assert_array_equal(buffer.steps, buffer.observations[:, :, 1])


def test_training_begins_anew_after_a_measurement_that_fails():
    env = DummyVecEnv([lambda: CountingEnv([50])])
    model = VPG("MlpPolicy", env, n_steps=6, seed=0).learn(12)
    model.max_episode_steps = 20
    with pytest.raises(RuntimeError, match="has not ended after 20 steps"):
        collect_episodes(model, env, 2)
    assert model._last_obs is None
    model.learn(6, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.observations[:, 0, 1], np.arange(6))


@pytest.mark.parametrize("action", ["Discrete", "Box", "MultiDiscrete"])
def test_the_policy_can_be_copied_after_a_measurement(action):
    env = spaces_env("Box", action)
    model = VPG("MlpPolicy", env, n_steps=16, seed=0).learn(32, callback=GradientStatisticsCallback(1))
    copy.deepcopy(model.policy)
    gradient_statistics(model, env, {"gae": as_measured({"estimator": "gae"}, 2)}, n_episodes=4, n_bootstrap=0)
    copy.deepcopy(model.policy)
    copied = []

    class Copier(GradientStatisticsCallback):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            copied.append(copy.deepcopy(self.model.policy))

    model.learn(32, callback=Copier(1))
    assert copied


def test_little_memory_gives_the_same_statistics():
    env = spaces_env("Box", "Box")
    model = VPG("MlpPolicy", env, seed=0)
    measured = {name: as_measured(keywords, size) for size in (2, 4) for name, keywords in FORMULATIONS.items()}
    options = {"n_episodes": 16, "reference": "gae", "n_bootstrap": 20}
    many = gradient_statistics(model, spaces_env("Box", "Box"), measured, seed=1, **options)
    few = gradient_statistics(model, spaces_env("Box", "Box"), measured, seed=1, max_bytes=1, **options)
    for name in measured:
        assert values(many[name]) == pytest.approx(values(few[name]), rel=1e-3)


def test_more_episodes_in_a_batch_less_variance():
    env = make_vec_env("CartPole-v1", 8, seed=0)
    model = VPG("MlpPolicy", env, seed=0)
    measured = {f"{size}": as_measured({"estimator": "reward_to_go"}, size) for size in (4, 16)}
    statistics = gradient_statistics(model, env, measured, n_episodes=256, seed=0)
    ratio = statistics["4"].variance.value / statistics["16"].variance.value
    assert 2.5 < ratio < 6.5


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    env = spaces_env("Box", "Discrete")
    model = VPG("MlpPolicy", env, seed=0)
    measured = {"rtg": as_measured({"estimator": "reward_to_go"}, 4)}
    with pytest.raises(ValueError, match=r"reference='gae'.*'rtg'"):
        gradient_statistics(model, env, measured, reference="gae")
    for keyword, bad in (("n_episodes", 1e1), ("confidence", 95), ("n_bootstrap", -1)):
        with pytest.raises(ValueError, match=f"{keyword}={bad}"):
            gradient_statistics(model, env, measured, **{"n_episodes": 8, keyword: bad})
    with pytest.raises(ValueError, match=r"n_episodes=7 .*4 episodes of 'rtg'"):
        gradient_statistics(model, env, measured, n_episodes=7)
    with pytest.raises(ValueError, match="episodes_per_batch=0"):
        UpdateSpec(Formulation(), 0)
    with pytest.raises(ValueError, match="loss_reduction='sum'"):
        UpdateSpec(Formulation(), 4, "sum")
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match=f"n_episodes={bad}"):
            collect_episodes(model, env, bad)
    with pytest.raises(ValueError, match="measured='rtg' must be an UpdateSpec"):
        gradient_statistics(model, env, {"rtg": Formulation()})
    with pytest.raises(ValueError, match="env must be a VecEnv"):
        gradient_statistics(model, env.envs[0], measured)
    assert rollout_statistics(model) is None
    with pytest.raises(ValueError, match="every_n_rollouts=0"):
        GradientStatisticsCallback(0)
    with pytest.raises(ValueError, match="requires VPG"):
        A2C("MlpPolicy", env).learn(10, callback=GradientStatisticsCallback())
    model.policy.requires_grad_(False)
    with pytest.raises(ValueError, match="All parameters of the actor are frozen"):
        gradient_statistics(model, env, measured, n_episodes=8)


@pytest.mark.parametrize(
    ("baseline", "expected"), [(None, [1 + 1 / 2 + 1 / 4, 1 + 1 / 2, 1]), ("value", [2.75 - 8, 3.5 - 8, 1 + 8 / 2 - 8])]
)
def test_the_critics_value_at_a_time_limit_counts_only_with_a_formulation_that_has_a_critic(baseline, expected):
    # Three rewards of 1, every value 8
    rewards, last = np.ones((3, 1)), np.array([[False], [False], [True]])
    rollout = Rollout(rewards, 8 * rewards, 8 * rewards, last, last | True, np.arange(3)[:, None])
    update = UpdateSpec(Formulation("reward_to_go", baseline, gamma=0.5), loss_reduction="trajectory")
    np.testing.assert_array_equal(psi(update, rollout)[:, 0], expected)
