"""VPG trains on every space and with every network that Stable-Baselines3's on-policy algorithms take."""

import copy
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers.envs import ACTION_SPACES, OBSERVATION_SPACES, SpacesEnv, policy_for
from helpers.models import (
    ACTOR,
    CRITIC,
    SMALL,
    OwnForward,
    changed,
    small_kwargs,
    small_model,
    spaces_envs,
    weights,
    with_and_without_critic,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_vpg import VPG

# ---------------------------------------------------------------------------------------------------------------
# Spaces and networks
# ---------------------------------------------------------------------------------------------------------------


@with_and_without_critic
@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_every_pair_of_spaces_trains_the_actor(observation, action, formulation):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    model = VPG(
        policy,
        spaces_envs(space, ACTION_SPACES[action]),
        n_steps=8,
        seed=0,
        policy_kwargs=small_kwargs(policy),
        **formulation,
    )
    before = weights(model)
    model.learn(32)
    moved = changed(before, weights(model))
    assert model._n_updates >= 1
    assert moved >= set(weights(model, ACTOR))
    # The value function learns where it is part of the formulation, and only there
    assert moved & set(weights(model, CRITIC)) == (set(weights(model, CRITIC)) if model.plan.uses_value_function else set())
    observations = model.env.reset()
    actions, _ = model.predict(observations)
    assert all(model.action_space.contains(action) for action in actions)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_defaults_run_on_every_kind_of_observation(observation):
    space = OBSERVATION_SPACES[observation]
    model = VPG(policy_for(space), SpacesEnv(space, ACTION_SPACES["Discrete"])).learn(100)
    assert model._n_updates == 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_defaults_run_on_registered_environments_without_a_warning(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VPG("MlpPolicy", env_id).learn(256)
    assert model.num_timesteps == 256


@with_and_without_critic
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("observation", ["image", "Dict"])
def test_features_extractors_learn_where_they_are_used(observation, share, formulation):
    space = OBSERVATION_SPACES[observation]
    policy = policy_for(space)
    kwargs = small_kwargs(policy, share_features_extractor=share)
    model = VPG(policy, spaces_envs(space), n_steps=8, seed=0, policy_kwargs=kwargs, **formulation)
    actor, critic = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    assert (actor is critic) == share
    before = copy.deepcopy((actor.state_dict(), critic.state_dict()))
    model.learn(16)
    assert changed(before[0], actor.state_dict())
    assert bool(changed(before[1], critic.state_dict())) == (share or model.plan.uses_value_function)


class TwoHeads(nn.Module):
    """The custom network of SB3's documentation."""

    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = 8, 12
        self.actor = nn.Sequential(nn.Linear(features_dim, 8), nn.ReLU())
        self.critic = nn.Sequential(nn.Linear(features_dim, 12), nn.ReLU())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.actor(features)

    def forward_critic(self, features):
        return self.critic(features)


class TwoHeadsPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = TwoHeads(self.features_dim)


@with_and_without_critic
def test_a_custom_mlp_extractor_learns(formulation):
    model = VPG(TwoHeadsPolicy, spaces_envs(), n_steps=10, seed=0, **formulation)
    before = weights(model)
    model.learn(40)
    moved = changed(before, weights(model))
    assert {"mlp_extractor.actor.0.weight", "action_net.weight"} <= moved
    assert ("mlp_extractor.critic.0.weight" in moved) == ("value_net.weight" in moved) == model.plan.uses_value_function


def test_an_overridden_forward_is_called_at_every_step_and_its_values_are_used():
    model = VPG(OwnForward, spaces_envs(), n_steps=10, seed=0).learn(20)
    assert model.policy.n_calls == 10
    np.testing.assert_array_equal(model.rollout_buffer.values, np.repeat(np.arange(100.0, 110.0)[:, None], 2, axis=1))
    assert np.isfinite(model.rollout_buffer.log_probs).all()


def test_an_overridden_forward_is_called_without_a_critic_too():
    model = VPG(OwnForward, spaces_envs(), n_steps=10, seed=0, estimator="reward_to_go", partial_episodes="truncate").learn(20)
    assert model.policy.n_calls == 10
    assert model._n_updates == 1


# ---------------------------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_features_need_not_be_defined_for_an_observation_of_zeros(action_space):
    class UnitLength(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 3)

        def forward(self, observations):
            return observations / observations.norm(dim=1, keepdim=True)

    env = SpacesEnv(spaces.Box(-1, 1, (3,)), action_space)
    model = VPG("MlpPolicy", env, policy_kwargs={"features_extractor_class": UnitLength}, device="cpu").learn(64)
    names = {name for name, p in model.policy.named_parameters() if any(p is q for q in model._parameter_groups.critic)}
    assert names == {name for name in names if name.startswith(("value_net", "mlp_extractor.value_net"))} != set()
    # Elsewhere, parameters of distributions are still checked
    with pytest.raises(ValueError, match="Expected parameter"):
        th.distributions.Normal(th.tensor(float("nan")), 1.0)


def test_a_custom_features_extractor_shared_with_the_critic_belongs_to_the_actor():
    class Features(BaseFeaturesExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space, 8)
            self.linear = nn.Linear(3, 8)

        def forward(self, observations):
            return self.linear(observations)

    model = small_model(policy_kwargs={**SMALL, "features_extractor_class": Features})
    critic = {id(p) for p in model.policy.value_net.parameters()} | {
        id(p) for p in model.policy.mlp_extractor.value_net.parameters()
    }
    assert {id(p) for p in model._parameter_groups.critic} == critic
    assert {id(p) for p in model._parameter_groups.actor} == {id(p) for p in model.policy.parameters()} - critic
