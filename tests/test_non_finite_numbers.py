"""A number that is not finite stops training before any weight has changed, with an error that says where it was."""

import io
from math import inf, nan

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, CountingEnv, FaultyEnv
from helpers.models import Normalized, counting_model
from helpers.states import assert_equal, state_of
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_vpg import VPG

SMALL = {"net_arch": [16]}


class AtRolloutStart(BaseCallback):
    """Keeps a copy of weights and optimizer as they were at the start of the last rollout."""

    def _on_rollout_start(self):
        self.state = state_of(self.model)
        self.n_updates = self.model._n_updates

    def _on_step(self):
        return True


def assert_stops_unharmed(model, match, total_timesteps=1000):
    """learn() raises, weights and optimizer are as after the update before, the model can be saved and goes on training."""
    before = AtRolloutStart()
    before.state, before.n_updates = state_of(model), 0
    with pytest.raises(ValueError, match=match):
        model.learn(total_timesteps, callback=before)
    assert_equal(state_of(model), before.state)
    assert model._n_updates == before.n_updates
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert_equal(state_of(VPG.load(file)), before.state)


def goes_on(model):
    n_updates = model._n_updates
    model.learn(40, reset_num_timesteps=False)
    assert model._n_updates > n_updates
    assert all(p.isfinite().all() for p in model.policy.parameters())
    # What was collected then was collected from a reset on
    buffer = model.rollout_buffer
    np.testing.assert_array_equal(buffer.rewards[buffer.mask], buffer.observations[buffer.mask][:, 1] + 1)


def faulty(*args, **kwargs):
    """Two environments, the second of which goes wrong once."""
    kwargs = {"lengths": (3, 5), **kwargs}
    return DummyVecEnv([lambda: Monitor(CountingEnv(**kwargs)), lambda: Monitor(FaultyEnv(*args, **kwargs))])


ALL_MODES = {
    "bootstrap": {"estimator": "gae"},
    "truncate": {"estimator": "reward_to_go", "partial_episodes": "truncate"},
    "finish": {"estimator": "reward_to_go"},
    "n_episodes": {"estimator": "total_return", "n_episodes": 2},
}
in_all_modes = pytest.mark.parametrize("mode", ALL_MODES.values(), ids=ALL_MODES.keys())


@in_all_modes
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_non_finite_reward_stops_training_before_the_update(value, mode):
    # Episodes of 3, 5, 3, 5 steps and rollouts of 8: the fourth reward of the fourth episode is in the second rollout, which
    # begins with the third episode, or after another reset, if it is made of whole ones, with the fourth
    model = counting_model(faulty("reward", 3, 4, value), **mode)
    step = 3 if model.plan.partial_episodes.whole_episodes else 6
    assert_stops_unharmed(model, rf"[Nn]on-finite reward in environment 1 at step {step} of the rollout .*: {value}\.")
    assert model._n_updates == 1
    goes_on(model)


@in_all_modes
@pytest.mark.parametrize(
    ("episode", "t", "n_updates"),
    [(0, 0, 0), (0, 2, 0), (1, 0, 0), (3, 4, 1), (4, 0, 1)],
    ids=["first reset", "first rollout", "reset in a rollout", "second rollout", "last of a rollout"],
)
def test_a_non_finite_observation_stops_training_before_the_update(episode, t, n_updates, mode):
    model = counting_model(faulty("observation", episode, t), **mode)
    assert_stops_unharmed(model, rf"[Nn]on-finite observation in environment 1 at step {t} of its episode .*nan")
    assert model._n_updates == n_updates
    goes_on(model)


@pytest.mark.parametrize("buffer_class", [None, RolloutBuffer])
def test_a_non_finite_observation_at_a_time_limit_stops_training_where_its_value_is_needed(buffer_class):
    env = faulty("observation", 3, 5, inf, time_limit=True)
    model = counting_model(env, rollout_buffer_class=buffer_class)
    assert_stops_unharmed(model, r"[Nn]on-finite terminal observation in environment 1 at step 4 of its episode .*inf")
    assert model._n_updates == 1
    model.learn(32, reset_num_timesteps=False)
    assert model._n_updates == 3


def test_a_non_finite_entry_of_a_dict_observation_is_found():
    class DictEnv(FaultyEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.observation_space = spaces.Dict({"index": spaces.Discrete(3), "numbers": self.observation_space})

        def observation(self):
            return {"index": 1, "numbers": super().observation()}

    env = DummyVecEnv([lambda: DictEnv("observation", 1, 2)])
    model = VPG("MultiInputPolicy", env, n_steps=8, policy_kwargs=SMALL)
    assert_stops_unharmed(model, r"[Nn]on-finite observation in environment 0 at step 2 of its episode")


class BadValues(ActorCriticPolicy):
    """A forward() of one's own, with a value that is not a number at t = 2."""

    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        values[obs[:, 1] == 2] = nan
        return actions, values, log_prob


@pytest.mark.parametrize("buffer_class", [None, RolloutBuffer])
def test_a_non_finite_value_of_a_policy_of_ones_own_stops_training_before_the_update(buffer_class):
    env = make_vec_env(CountingEnv, n_envs=2)
    model = VPG(BadValues, env, n_steps=8, policy_kwargs=SMALL, rollout_buffer_class=buffer_class)
    assert_stops_unharmed(model, r"[Nn]on-finite value in environment 0 at step 2 of the rollout .*nan")


class Reciprocal(nn.Module):
    """A critic that divides by zero at t = 6."""

    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = features_dim

    def forward_actor(self, features):
        return features

    def forward_critic(self, features):
        return 1 / (features - 6)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)


class ReciprocalPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Reciprocal(self.features_dim)


def test_a_non_finite_value_stops_training_before_the_update():
    model = VPG(ReciprocalPolicy, make_vec_env(CountingEnv, env_kwargs={"lengths": (4, 8)}), n_steps=8)
    # The second episode begins at step 4: its observation with t = 6 is that of step 10, number 2 of the second rollout
    assert_stops_unharmed(model, r"[Nn]on-finite value in environment 0 at step 2 of the rollout .*inf")
    assert model._n_updates == 1


def test_a_non_finite_action_stops_training_before_it_is_taken():
    env = CountingEnv(action_space=ACTION_SPACES["Box"])
    model = counting_model(env).learn(8)
    with th.no_grad():
        model.policy.log_std[0] = nan
    n_actions = len(env.actions)
    with pytest.raises(ValueError, match=r"[Nn]on-finite action in environment 0 at step \d of its episode"):
        model.learn(8, reset_num_timesteps=False)
    assert len(env.actions) == n_actions


class Constant(CountingEnv):
    """The same reward at each step."""

    def __init__(self, reward, **kwargs):
        super().__init__(**kwargs)
        self.reward = reward

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.reward, *rest


@pytest.mark.parametrize(
    ("reward", "keywords", "name"),
    [
        # The square of 1e20 is not a number of single precision
        (1e20, {"estimator": "gae"}, "value loss"),
        (1e20, {"estimator": "gae", "vf_coef": 0.0}, "value loss"),
        # A sum of twelve numbers like this one is not, either
        (2e38, {"estimator": "reward_to_go", "gamma": 0.0, "normalize_advantage": False}, "policy loss"),
        # The loss is, but not the sum of the squares of its gradient
        (1e30, {"estimator": "reward_to_go", "gamma": 0.0, "normalize_advantage": False}, "policy gradient"),
        (1e18, {"estimator": "gae", "vf_coef": 1e15}, "value gradient"),
    ],
)
def test_a_loss_or_gradient_that_overflows_stops_training_and_changes_nothing(reward, keywords, name):
    env = make_vec_env(Constant, n_envs=2, env_kwargs={"reward": 1.0, "lengths": (4,)})
    model = counting_model(env, **{"max_grad_norm": 0.5, **keywords}).learn(16)
    assert model._n_updates == 1
    for e in env.envs:
        e.unwrapped.reward = reward
    assert_stops_unharmed(model, rf"[Nn]on-finite {name} \((inf|-inf|nan)\) in update 2 .*not taken")
    for e in env.envs:
        e.unwrapped.reward = 1.0
    model.learn(16, reset_num_timesteps=False)
    assert model._n_updates == 2
    assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("critic_batch_size", [None, 4])
def test_a_critic_that_diverges_in_its_further_passes_is_an_error_that_says_what_has_changed(critic_batch_size):
    model = counting_model(
        n_critic_updates=10,
        critic_batch_size=critic_batch_size,
        critic_learning_rate=1e6,
        max_grad_norm=None,
        policy_kwargs={**SMALL, "optimizer_class": th.optim.SGD},
    )
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    message = r"value gradient \((inf|nan)\) in update 1 .*step was not taken, but the policy's step .*earlier checkpoint"
    with pytest.raises(ValueError, match=message):
        model.learn(8)
    assert model._n_updates == 1
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    assert {"action_net.weight", "value_net.weight"} <= moved
    assert all(p.isfinite().all() for p in model.policy.parameters())


# SB3's running variance of something infinite
@pytest.mark.filterwarnings("ignore:invalid value encountered in (scalar )?subtract:RuntimeWarning")
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("quantity", ["reward", "observation"])
@in_all_modes
def test_the_statistics_of_vec_normalize_stay_finite(mode, quantity, value):
    env = VecNormalize(faulty(quantity, 3, 4, value))
    model = counting_model(env, **mode)
    assert_stops_unharmed(model, r"[Nn]on-finite")
    statistics = (env.obs_rms.mean, env.obs_rms.var, env.ret_rms.mean, env.ret_rms.var)
    assert all(np.isfinite(statistic).all() for statistic in statistics)
    model.learn(64, reset_num_timesteps=False)
    assert np.isfinite(model.rollout_buffer.observations).all()


def test_statistics_of_batch_normalization_stay_finite():
    kwargs = {**SMALL, "features_extractor_class": Normalized}
    env = make_vec_env(Constant, n_envs=2, env_kwargs={"reward": 1.0, "lengths": (4,)})
    model = counting_model(env, policy_kwargs=kwargs).learn(16)
    before = {name: buffer.clone() for name, buffer in model.policy.named_buffers()}
    for e in env.envs:
        e.unwrapped.reward = 1e20
    with pytest.raises(ValueError, match="on-finite value loss"):
        model.learn(16, reset_num_timesteps=False)
    assert before
    for name, buffer in model.policy.named_buffers():
        assert th.equal(buffer, before[name]), name
