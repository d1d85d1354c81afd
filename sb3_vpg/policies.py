"""Policies of VPG: SB3's, under SB3's names, and the smallest one there is."""

from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BaseModel,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

MlpPolicy = ActorCriticPolicy
CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


class LogisticDistribution(CategoricalDistribution):
    """
    Two actions and one logit z: P(a = 1) = 1 / (1 + exp(-z)).

    :param bias: Whether the layer that computes z has a bias
    """

    def __init__(self, bias: bool = False):
        super().__init__(action_dim=2)
        self.bias = bias

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Linear(latent_dim, 1, bias=self.bias)

    def proba_distribution(self, action_logits: th.Tensor) -> "LogisticDistribution":
        # A softmax over (0, z) is the logistic function of z
        return super().proba_distribution(nn.functional.pad(action_logits, (1, 0)))


class LogisticPolicy(ActorCriticPolicy):
    """
    Logistic regression as a policy for two actions: P(a = 1 | s) = sigmoid(theta . x(s) [+ b]), where x(s) is the flattened
    observation. On CartPole theta has 4 weights. The value function, if the formulation uses one, is linear too.

    :param observation_space: Observation space
    :param action_space: Action space, ``Discrete(2)``
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers before the logit and the value; none by default
    :param bias: Whether the logit has a bias
    :param kwargs: Other arguments of ``ActorCriticPolicy``
    :raises ValueError: if there are not two discrete actions
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        bias: bool = False,
        **kwargs: Any,
    ):
        if not (isinstance(action_space, spaces.Discrete) and action_space.n == 2):
            raise ValueError(f"LogisticPolicy is for two actions, Discrete(2), not for {action_space}")
        self.bias = bias
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[] if net_arch is None else net_arch, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = LogisticDistribution(self.bias)
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "bias": self.bias}


# A policy that overrides one of these may compute something else in forward() than the separate passes would.
SB3_PASSES = (
    "forward",
    "extract_features",
    "get_distribution",
    "evaluate_actions",
    "predict_values",
    "_get_action_dist_from_latent",
)


def has_sb3_passes(policy: ActorCriticPolicy) -> bool:
    """
    :return: whether the passes of the policy are SB3's own, so that actions, log probabilities and values may be computed
        separately and in batches
    """
    # A policy compiled by th.compile() has another type, without these
    return all(getattr(type(policy), name, None) is getattr(ActorCriticPolicy, name) for name in SB3_PASSES)


def _sample_categorical(policy: ActorCriticPolicy, latent: th.Tensor, logits: th.Tensor) -> th.Tensor:
    # What Tensor.multinomial does for one sample, less its checks: p / Exponential(1) is largest at i with probability p_i
    probabilities = logits.softmax(dim=-1)
    return (probabilities / th.empty_like(probabilities).exponential_(1)).argmax(dim=-1)


def _sample_diag_gaussian(policy: ActorCriticPolicy, latent: th.Tensor, mean_actions: th.Tensor) -> th.Tensor:
    return mean_actions + policy.log_std.exp() * th.normal(th.zeros_like(mean_actions), 1.0)


def _sample_state_dependent_noise(policy: ActorCriticPolicy, latent: th.Tensor, mean_actions: th.Tensor) -> th.Tensor:
    distribution: StateDependentNoiseDistribution = policy.action_dist  # type: ignore[assignment]
    actions = mean_actions + distribution.get_noise(latent)
    return actions if distribution.bijector is None else distribution.bijector.forward(actions)


# Constructing an object of torch.distributions takes longer than the forward pass of a small network
SAMPLERS: dict[type[Distribution], Callable[[ActorCriticPolicy, th.Tensor, th.Tensor], th.Tensor]] = {
    CategoricalDistribution: _sample_categorical,
    DiagGaussianDistribution: _sample_diag_gaussian,
    StateDependentNoiseDistribution: _sample_state_dependent_noise,
}


def action_sampler(policy: ActorCriticPolicy) -> Callable[[PyTorchObs], th.Tensor]:
    """
    :param policy: a policy for which :func:`has_sb3_passes` holds
    :return: a function of N observations that samples N actions without gradient, the same ones from the same random state
        as ``policy.get_distribution(obs).get_actions()``; faster than that for categorical and Gaussian policies, gSDE too
    """
    sampler = SAMPLERS.get(type(policy.action_dist))
    if sampler is None or type(policy.mlp_extractor) is not MlpExtractor:
        return th.no_grad()(lambda obs: policy.get_distribution(obs).get_actions())
    modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    # Module.__call__ does nothing but forward() where there are no hooks, yet takes half of the time of a small layer
    *layers, action_net = [m if m._forward_hooks or m._forward_pre_hooks else m.forward for m in modules]
    space, extractor = policy.observation_space, policy.pi_features_extractor
    # What extract_features() comes down to in the most common case
    only_flatten = type(extractor) is FlattenExtractor and isinstance(space, spaces.Box) and not is_image_space(space)

    def sample(obs: PyTorchObs) -> th.Tensor:
        with th.inference_mode():
            x = obs.float().flatten(1) if only_flatten else BaseModel.extract_features(policy, obs, extractor)  # type: ignore[union-attr]
            for layer in layers:
                x = layer(x)
            return sampler(policy, x, action_net(x))

    return sample
