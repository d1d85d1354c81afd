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
from torch import nn

from sb3_vpg.common.layers import make_layers
from sb3_vpg.common.policy_inputs import mask_sizes

LOG_2_PI = math.log(2 * math.pi)
# Value of the logit of an action that is not allowed, as in sb3-contrib
NOT_ALLOWED = -1e8


def kl_estimate(log_ratio: th.Tensor) -> th.Tensor:
    """
    :param log_ratio: log q(x) - log p(x) of samples x of p
    :return: unbiased estimates of KL(p || q), of the same shape (http://joschu.net/blog/kl-approx.html)
    """
    return th.exp(log_ratio) - 1 - log_ratio


class Head:
    """
    Distribution of actions given the outputs of the actor. For this class, these are the outputs of the last hidden layer. It
    uses SB3's distribution objects and supports all of them.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy
        #: Modules between the last hidden layer and the outputs that the methods take
        self.modules: list[nn.Module] = []
        #: Parameters of the distribution that do not depend on the observation
        self.own_parameters: list[th.Tensor] = []

    def sample(self, outputs: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        """
        :param inputs: further inputs of the policy: "action_masks"
        :return: sampled actions, N in all
        """
        return self._distribution(outputs, **inputs).get_actions().cpu().numpy()

    def evaluate(self, outputs: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """:return: log probabilities and entropies (None without an analytical form), shape (N,)"""
        distribution = self._distribution(outputs, **inputs)
        return distribution.log_prob(actions), distribution.entropy()

    def parameters(self, outputs: th.Tensor, **inputs: th.Tensor) -> Any:
        """:return: parameters of the distributions, in the form that :meth:`kl_divergence` takes"""
        # The policy has a single distribution object, which each forward pass changes
        return copy.copy(self._distribution(outputs, **inputs))

    def _distribution(self, outputs: th.Tensor, action_masks: th.Tensor | np.ndarray | None = None) -> Distribution:
        distribution: Any = self.policy._get_action_dist_from_latent(outputs)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def kl_divergence(self, before: Any, after: Any) -> th.Tensor:
        """:return: KL(before || after), shape (N,); an estimate from one sample for each where PyTorch has no formula"""
        try:
            kl = kl_divergence(before, after)
        except NotImplementedError:
            actions = before.sample()
            return kl_estimate(after.log_prob(actions) - before.log_prob(actions))
        # One number per step: the dimensions of an action are independent
        return kl.reshape(len(kl), -1).sum(dim=1)


class StateDependentNoiseHead(Head):
    """gSDE. Sampling does not construct the distribution object."""

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        (self.action_net,) = make_layers(policy.action_net)

    def sample(self, outputs: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        distribution: StateDependentNoiseDistribution = self.policy.action_dist  # type: ignore[assignment]
        actions = self.action_net(outputs) + distribution.get_noise(outputs)
        return (actions if distribution.bijector is None else distribution.bijector.forward(actions)).cpu().numpy()


class NumPyHead(Head):
    """
    Distribution without SB3's objects: constructing one takes longer than evaluating a small network. The methods take the
    outputs of the action_net, shape (N, ...). Actions are sampled in NumPy, with random numbers of PyTorch's generator.
    """

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        self.modules = [policy.action_net]

    def sample(self, outputs: th.Tensor, **inputs: np.ndarray) -> np.ndarray:
        return self.sample_from(outputs.cpu().numpy(), **inputs)

    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        """
        :param outputs: outputs of the action_net, shape (N, ...)
        :param inputs: further inputs of the policy
        :return: sampled actions
        """
        raise NotImplementedError

    def evaluate(self, outputs: th.Tensor, actions: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.terms(self.parameters(outputs, **inputs), actions)

    def terms(self, distributions: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param distributions: see :meth:`parameters`
        :return: log probabilities and entropies, shape (N,)
        """
        raise NotImplementedError

    def gradient(
        self, distributions: Any, actions: th.Tensor, by_log_prob: th.Tensor, by_entropy: float
    ) -> tuple[th.Tensor, list[tuple[th.Tensor, th.Tensor]]]:
        """
        The derivatives of a number, by hand. Tested against automatic differentiation of :meth:`terms`.

        :param distributions: see :meth:`parameters`
        :param by_log_prob: derivatives by the log probabilities, shape (N,)
        :param by_entropy: derivative by each entropy
        :return: derivatives by the outputs of the action_net, and by the head's own parameters
        """
        raise NotImplementedError


def _log_softmax(logits: th.Tensor, dim: int) -> th.Tensor:
    """:return: log probabilities. They are finite also for a logit of -inf, so that 0 log 0 is 0"""
    return logits.log_softmax(dim).clamp(min=th.finfo(logits.dtype).min)


def _sample_categorical(logits: np.ndarray) -> np.ndarray:
    # Same method as Tensor.multinomial for one sample: p_i / Exponential(1) is largest at i with probability p_i
    noise = th.empty(logits.shape, device="cpu").exponential_().numpy()
    return (logits - np.log(noise)).argmax(axis=1)


def _categorical_gradient(log_p: th.Tensor, actions: th.Tensor, by_log_prob: th.Tensor, by_entropy: float) -> th.Tensor:
    """:return: derivatives by the logits; they and ``log_p`` have the shape (number of actions, N)"""
    p = log_p.exp()
    # d log p_a / d logit_i = [i = a] - p_i
    gradient = -by_log_prob * p
    gradient.scatter_add_(0, actions.unsqueeze(0), by_log_prob.unsqueeze(0))
    if by_entropy != 0:
        # d entropy / d logit_i = -p_i (log p_i + entropy)
        entropy = -(p * log_p).sum(dim=0)
        gradient -= by_entropy * p * (log_p + entropy)
    return gradient


class CategoricalHead(NumPyHead):
    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        return _sample_categorical(outputs)

    def parameters(self, outputs: th.Tensor, **inputs: th.Tensor) -> th.Tensor:
        # Transposed, since sums over a short last axis are slow
        return _log_softmax(outputs.T, dim=0)

    def terms(self, distributions: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_p = distributions
        return log_p.gather(0, actions.unsqueeze(0)).squeeze(0), -(log_p.exp() * log_p).sum(dim=0)

    def gradient(
        self, distributions: th.Tensor, actions: th.Tensor, by_log_prob: th.Tensor, by_entropy: float
    ) -> tuple[th.Tensor, list[tuple[th.Tensor, th.Tensor]]]:
        return _categorical_gradient(distributions, actions, by_log_prob, by_entropy).T, []

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

    def parameters(self, outputs: th.Tensor, action_masks: th.Tensor | None = None) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        logits = outputs if action_masks is None else outputs.where(action_masks.bool(), NOT_ALLOWED)
        return tuple(_log_softmax(part, dim=1) for part in logits.split(self.sizes, dim=1))

    def terms(self, distributions: tuple[th.Tensor, ...], actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_prob = [log_p.gather(1, column).squeeze(1) for log_p, column in zip(distributions, self._columns(actions))]
        entropy = [-(log_p.exp() * log_p).sum(dim=1) for log_p in distributions]
        return th.stack(log_prob).sum(dim=0), th.stack(entropy).sum(dim=0)

    def gradient(
        self, distributions: tuple[th.Tensor, ...], actions: th.Tensor, by_log_prob: th.Tensor, by_entropy: float
    ) -> tuple[th.Tensor, list[tuple[th.Tensor, th.Tensor]]]:
        # Actions that are not allowed have p = 0, and so no gradient
        parts = [
            _categorical_gradient(log_p.T, column.squeeze(1), by_log_prob, by_entropy)
            for log_p, column in zip(distributions, self._columns(actions))
        ]
        return th.cat(parts).T, []

    def _columns(self, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return actions.long().reshape(-1, len(self.sizes)).split(1, dim=1)

    def kl_divergence(self, before: tuple[th.Tensor, ...], after: tuple[th.Tensor, ...]) -> th.Tensor:
        return th.stack([(old.exp() * (old - new)).sum(dim=1) for old, new in zip(before, after)]).sum(dim=0)


class DiagGaussianHead(NumPyHead):
    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        self.own_parameters = [policy.log_std]

    def sample_from(self, outputs: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        noise = th.normal(th.zeros(outputs.shape, device="cpu"), 1.0).numpy()
        return outputs + self.policy.log_std.exp().numpy(force=True) * noise

    def parameters(self, outputs: th.Tensor, **inputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return outputs, self.policy.log_std.clone()

    def terms(self, distributions: tuple[th.Tensor, th.Tensor], actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = distributions
        # log N(a; mu, sigma) = -((a - mu) / sigma)^2 / 2 - log sigma - log(2 pi) / 2
        # entropy = (1 + log(2 pi)) / 2 + log sigma
        log_prob = (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * LOG_2_PI).sum(dim=1)
        return log_prob, (0.5 + 0.5 * LOG_2_PI + log_std).sum().expand(len(mean))

    def gradient(
        self, distributions: tuple[th.Tensor, th.Tensor], actions: th.Tensor, by_log_prob: th.Tensor, by_entropy: float
    ) -> tuple[th.Tensor, list[tuple[th.Tensor, th.Tensor]]]:
        mean, log_std = distributions
        sigma = log_std.exp()
        z = (actions - mean) / sigma
        # d log p / d mu = z / sigma;  d log p / d log sigma = z^2 - 1;  d entropy / d log sigma = 1
        of_log_std = by_log_prob @ (z**2 - 1) + by_entropy * len(mean)
        return by_log_prob.unsqueeze(1) * z / sigma, [(self.policy.log_std, of_log_std)]

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
    if any(hasattr(distribution, name) for name in vars(policy.action_dist)):
        # A method of this object was replaced
        return Head(policy)
    if distribution is DiagGaussianDistribution and policy.log_std.shape != (policy.action_dist.action_dim,):  # type: ignore
        return Head(policy)
    if distribution.__module__ == "sb3_contrib.common.maskable.distributions":
        return MaskableHead(policy)
    return HEADS.get(distribution, Head)(policy)
