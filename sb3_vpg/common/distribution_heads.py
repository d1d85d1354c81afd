"""Distributions of actions: sample them, and compute log probabilities, entropies and KL divergences."""

import copy
import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
    kl_divergence,
)
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_vpg.common.layers import make_layers
from sb3_vpg.common.policy_inputs import mask_sizes

LOG_2_PI = math.log(2 * math.pi)
# Value of the logit of an action that is not allowed, as in sb3-contrib
NOT_ALLOWED = -1e8


class Head:
    """
    Distribution of actions given the output of the actor's last hidden layer ("latent"). This class uses SB3's distribution
    objects and supports all of them.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy
        (self.action_net,) = make_layers(policy.action_net)

    def sample(self, latent: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        """
        :param inputs: further inputs of the policy: "action_masks"
        :return: sampled actions, N in all
        """
        return self._distribution(latent, **inputs).get_actions().cpu().numpy()

    def evaluate(self, latent: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """:return: log probabilities and entropies (None without an analytical form), shape (N,)"""
        distribution = self._distribution(latent, **inputs)
        return distribution.log_prob(actions), distribution.entropy()

    def parameters(self, latent: th.Tensor, **inputs: th.Tensor) -> Any:
        """:return: parameters of the distributions, in the form that :meth:`kl_divergence` takes"""
        # The policy has a single distribution object, which each forward pass changes
        return copy.copy(self._distribution(latent, **inputs))

    def _distribution(self, latent: th.Tensor, action_masks: th.Tensor | np.ndarray | None = None) -> Distribution:
        distribution: Any = self.policy._get_action_dist_from_latent(latent)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def kl_divergence(self, before: Any, after: Any) -> th.Tensor:
        """:return: KL(before || after), shape (N,)"""
        kl = kl_divergence(before, after)
        # One number per step: the dimensions of an action are independent
        return kl.reshape(len(kl), -1).sum(dim=1)


class StateDependentNoiseHead(Head):
    """gSDE. Sampling does not construct the distribution object."""

    def sample(self, latent: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        distribution: StateDependentNoiseDistribution = self.policy.action_dist  # type: ignore[assignment]
        actions = self.action_net(latent) + distribution.get_noise(latent)
        return (actions if distribution.bijector is None else distribution.bijector.forward(actions)).cpu().numpy()


class NumPyHead(Head):
    """
    Distribution without SB3's objects: constructing one takes longer than evaluating a small network. Actions are sampled in
    NumPy, with random numbers of PyTorch's generator.
    """

    def sample(self, latent: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        return self.sample_from(self.action_net(latent).cpu().numpy(), **inputs)

    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        """
        :param outputs: outputs of the action_net, shape (N, ...)
        :param inputs: further inputs of the policy
        :return: sampled actions
        """
        raise NotImplementedError


def _sample_categorical(logits: np.ndarray) -> np.ndarray:
    # Same method as Tensor.multinomial for one sample: p_i / Exponential(1) is largest at i with probability p_i
    noise = th.empty(logits.shape).exponential_().numpy()
    return (logits - np.log(noise)).argmax(axis=1)


class CategoricalHead(NumPyHead):
    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        return _sample_categorical(outputs)

    def parameters(self, latent: th.Tensor, **inputs: th.Tensor) -> th.Tensor:
        # Transposed, since sums over a short last axis are slow
        return self.action_net(latent).T.log_softmax(dim=0)

    def evaluate(self, latent: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_p = self.parameters(latent)
        return log_p.gather(0, actions.unsqueeze(0)).squeeze(0), -(log_p.exp() * log_p).sum(dim=0)

    def kl_divergence(self, before: th.Tensor, after: th.Tensor) -> th.Tensor:
        return (before.exp() * (before - after)).sum(dim=0)


class MaskableHead(NumPyHead):
    """sb3-contrib's categorical distributions, one for each dimension of an action. Masked actions have no probability."""

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        self.sizes = mask_sizes(policy.action_space)

    def sample_from(self, outputs: np.ndarray, action_masks: np.ndarray | None = None) -> np.ndarray:  # type: ignore[override]
        logits = outputs if action_masks is None else np.where(action_masks, outputs, NOT_ALLOWED)
        parts = np.split(logits, np.cumsum(self.sizes)[:-1], axis=1)
        return np.stack([_sample_categorical(part) for part in parts], axis=1)

    def parameters(self, latent: th.Tensor, action_masks: th.Tensor | None = None) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        logits = self.action_net(latent)
        if action_masks is not None:
            logits = logits.where(action_masks.bool(), NOT_ALLOWED)
        return tuple(part.log_softmax(dim=1) for part in logits.split(self.sizes, dim=1))

    def evaluate(self, latent: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_ps = self.parameters(latent, **inputs)
        columns = actions.long().reshape(-1, len(log_ps)).split(1, dim=1)
        log_prob = th.cat([log_p.gather(1, column) for log_p, column in zip(log_ps, columns)], dim=1).sum(dim=1)
        return log_prob, -th.stack([(log_p.exp() * log_p).sum(dim=1) for log_p in log_ps]).sum(dim=0)

    def kl_divergence(self, before: tuple[th.Tensor, ...], after: tuple[th.Tensor, ...]) -> th.Tensor:
        return th.stack([(old.exp() * (old - new)).sum(dim=1) for old, new in zip(before, after)]).sum(dim=0)


class DiagGaussianHead(NumPyHead):
    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        noise = th.normal(th.zeros(outputs.shape), 1.0).numpy()
        return outputs + self.policy.log_std.exp().numpy(force=True) * noise

    def parameters(self, latent: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.action_net(latent), self.policy.log_std.clone()

    def evaluate(self, latent: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = self.parameters(latent)
        # log N(a; mu, sigma) = -((a - mu) / sigma)^2 / 2 - log sigma - log(2 pi) / 2
        # entropy = (1 + log(2 pi)) / 2 + log sigma
        log_prob = (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * LOG_2_PI).sum(dim=1)
        return log_prob, (0.5 + 0.5 * LOG_2_PI + log_std).sum().expand(len(mean))

    def kl_divergence(self, before: tuple[th.Tensor, th.Tensor], after: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        (mean, log_std), (new_mean, new_log_std) = before, after
        squares = (log_std.exp() ** 2 + (mean - new_mean) ** 2) / (2 * new_log_std.exp() ** 2)
        return (new_log_std - log_std + squares - 0.5).sum(dim=1)


HEADS: dict[type[Distribution], type[Head]] = {
    CategoricalDistribution: CategoricalHead,
    DiagGaussianDistribution: DiagGaussianHead,
    StateDependentNoiseDistribution: StateDependentNoiseHead,
}


def make_head(policy: ActorCriticPolicy) -> Head:
    """:return: the head for the policy's distribution"""
    distribution = type(policy.action_dist)
    if distribution.__module__ == "sb3_contrib.common.maskable.distributions":
        return MaskableHead(policy)
    return HEADS.get(distribution, Head)(policy)
