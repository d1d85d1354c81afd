"""Small models on small environments, and what of them is compared."""

import pytest
import torch as th
from helpers.envs import ACTION_SPACES, BOX, CountingEnv, SpacesEnv
from stable_baselines3.common.callbacks import (
    BaseCallback,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_vpg import VPG

SMALL = {"net_arch": [16]}
SGD = {**SMALL, "optimizer_class": th.optim.SGD}
#: One formulation with the value function, one without
FORMULATIONS = {
    "critic": {"estimator": "gae"},
    "critic_free": {"estimator": "reward_to_go"},
}
with_and_without_critic = pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS.keys())

# What belongs to the actor alone, and to the critic alone
ACTOR = ("action_net", "mlp_extractor.policy_net", "log_std", "pi_features_extractor.")
CRITIC = ("value_net", "mlp_extractor.value_net", "vf_features_extractor.")


def small_kwargs(policy: str, **kwargs):
    """Keyword arguments that keep the networks of the policy small."""
    if policy == "CnnPolicy":
        return {"features_extractor_kwargs": {"features_dim": 16}, **kwargs}
    if policy == "MultiInputPolicy":
        return {"net_arch": [16], "features_extractor_kwargs": {"cnn_output_dim": 16}, **kwargs}
    return {"net_arch": [16], **kwargs}


def counting_envs(n_envs=2, lengths=(3, 5), **kwargs):
    return make_vec_env(CountingEnv, n_envs=n_envs, env_kwargs={"lengths": lengths, **kwargs})


def spaces_envs(observation_space=BOX, action_space=ACTION_SPACES["Discrete"], n_envs=2, seed=0):
    return make_vec_env(lambda: SpacesEnv(observation_space, action_space), n_envs=n_envs, seed=seed)


def small_model(env=None, **kwargs):
    """A VPG with small networks, short rollouts and one gradient step per rollout, seeded."""
    env = spaces_envs() if env is None else env
    return VPG("MlpPolicy", env, **{"n_steps": 10, "n_critic_updates": 1, "seed": 0, "policy_kwargs": SMALL, **kwargs})


def counting_model(env=None, n_envs=1, **kwargs):
    """A VPG with the default keywords, but for a small network and short rollouts, on counting environments, seeded."""
    env = make_vec_env(CountingEnv, n_envs=n_envs) if env is None else env
    return VPG("MlpPolicy", env, **{"n_steps": 8, "seed": 0, "policy_kwargs": SMALL, **kwargs})


def cartpole_model(env=None, **kwargs):
    """The same on two cart-poles, with numbers that are the same on every machine."""
    env = make_vec_env("CartPole-v1", 2, seed=0) if env is None else env
    return VPG("MlpPolicy", env, **{"n_steps": 8, "seed": 0, "policy_kwargs": SMALL, "device": "cpu", **kwargs})


def weights(model, only=("",)):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters() if name.startswith(only)}


def flat_weights(model):
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def changed(before, after):
    """Names of the parameters that differ."""
    return {name for name in before if not th.equal(before[name], after[name])}


def assert_same_weights(first, second, only=("",)):
    weights_of_first = weights(first, only)
    assert weights_of_first
    assert changed(weights_of_first, weights(second, only)) == set()


def learning_rates(model):
    """Learning rates of the actor's and of the critic's parameters, as the optimizer has them."""
    rate_of = {id(p): group["lr"] for group in model.policy.optimizer.param_groups for p in group["params"]}
    return rate_of[id(model.policy.action_net.weight)], rate_of[id(model.policy.value_net.weight)]


class Spy(BaseCallback):
    """Calls a function of itself at each step, or at another event."""

    def __init__(self, function, event="step"):
        super().__init__()
        self.function, self.event = function, event

    def _on_step(self):
        result = self.function(self) if self.event == "step" else None
        return result is not False

    def _on_rollout_start(self):
        if self.event == "rollout_start":
            self.function(self)

    def _on_rollout_end(self):
        if self.event == "rollout_end":
            self.function(self)


class Normalized(FlattenExtractor):
    """Batch normalization of the observations."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


class OwnForward(ActorCriticPolicy):
    """A policy whose forward() has values of its own: 100, 101, 102 ..."""

    def forward(self, obs, deterministic=False):
        self.n_calls = getattr(self, "n_calls", 0) + 1
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, th.full_like(values, 99.0 + self.n_calls), log_prob
