"""
Run a policy's networks for rollout and update: sample actions, evaluate log probabilities, compute values.

:class:`PolicyRunner` calls the methods of any policy. :class:`FastPolicyRunner` computes the same numbers in less time, for
policies whose forward passes are SB3's own.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    StateDependentNoiseDistribution,
    kl_divergence,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from sb3_vpg.common.threads import one_thread

Layer = Callable[[th.Tensor], th.Tensor]
ModuleType = TypeVar("ModuleType", bound=nn.Module)

LOG_2_PI = math.log(2 * math.pi)
#: Largest matrix product (number of multiplications) that OpenBLAS, the library behind NumPy, computes on a single thread.
#: PyTorch's number of threads does not apply to it.
LARGEST_NUMPY_PRODUCT = 2**18
#: Largest number of weights in a layer for which one thread of PyTorch is faster than several
LARGEST_SMALL_LAYER = 2**16

# If a policy overrides one of these methods, its forward() may compute something else than separate forward passes would
SB3_FORWARD = (
    "forward",
    "extract_features",
    "get_distribution",
    "evaluate_actions",
    "predict_values",
    "_get_action_dist_from_latent",
)


def has_sb3_forward(policy: ActorCriticPolicy) -> bool:
    """
    :return: whether the forward passes of the policy are SB3's own and the policy has no hooks, so that actions, log
        probabilities and values can be computed separately and in batches
    """
    # A policy compiled by th.compile() is of another type, which does not have these methods
    if any(getattr(type(policy), name, None) is not getattr(ActorCriticPolicy, name) for name in SB3_FORWARD):
        return False
    # Separate forward passes do not call these two modules as a whole, so their hooks would not run
    if _has_hooks(policy) or _has_hooks(policy.mlp_extractor):
        return False
    # A method of this object was replaced after construction
    if not vars(policy).keys().isdisjoint(SB3_FORWARD) or "forward" in vars(policy.mlp_extractor):
        return False
    shared = policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
    return shared or not policy.share_features_extractor


@contextmanager
def temporary_distribution(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Context in which the policy uses a copy of its distribution. A policy keeps the last distribution that it has computed,
    together with its computation graph; ``copy.deepcopy`` of such a policy fails.
    """
    original = policy.action_dist
    policy.action_dist = copy.copy(original)
    try:
        yield
    finally:
        policy.action_dist = original


class _LinearTanh(th.autograd.Function):
    """
    tanh(x W^T + b), faster than PyTorch's own layers on a CPU:

    - NumPy's vectorized tanh takes a fifth of the time of PyTorch's (results differ in the last bit).
    - The gradient of W is computed as (x^T g)^T. PyTorch computes g^T x, which takes five times as long if x has few columns,
      such as observations of classic control.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        y = _linear_tanh(x.detach(), weight.detach(), bias.detach())
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: th.Tensor) -> tuple[th.Tensor | None, th.Tensor, th.Tensor]:
        x, weight, y = ctx.saved_tensors
        grad_z = th.ops.aten.tanh_backward(grad_y, y)
        grad_x = grad_z @ weight if ctx.needs_input_grad[0] else None
        return grad_x, (x.T @ grad_z).T, grad_z.sum(dim=0)


def _linear_tanh(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    y = th.addmm(bias, x, weight.T)
    np.tanh(y.numpy(), out=y.numpy())
    return y


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks: hooks of this module, or global hooks."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook()


def _is_plain(module: nn.Module | None, kind: type[ModuleType]) -> TypeGuard[ModuleType]:
    """Whether the module is exactly of this class: not of a subclass, and without a replaced ``forward()``."""
    return type(module) is kind and "forward" not in vars(module)


def _is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether the module is a linear layer that NumPy can compute: with a bias, in single precision, on a CPU."""
    if not _is_plain(module, nn.Linear) or module.bias is None:
        return False
    return module.weight.is_cpu and module.weight.dtype == th.float32


def _only_flattens(extractor: nn.Module) -> bool:
    """Whether the extractor only flattens the observation, and has no hooks."""
    if not _is_plain(extractor, FlattenExtractor) or any(map(_has_hooks, extractor.modules())):
        return False
    flatten = extractor.flatten
    return _is_plain(flatten, nn.Flatten) and (flatten.start_dim, flatten.end_dim) == (1, -1)


def _fuse_tanh(linear: nn.Linear) -> Layer:
    """:return: the linear layer and a tanh, as one function"""
    weight, bias = linear.weight, linear.bias

    def layer(x: th.Tensor) -> th.Tensor:
        return _LinearTanh.apply(x, weight, bias) if th.is_grad_enabled() else _linear_tanh(x, weight, bias)

    return layer


def make_layers(*modules: nn.Module) -> list[Layer]:
    """
    Build the functions that compute a sequence of layers, without the overhead of calling modules:

    - a Linear followed by a Tanh becomes one function (on a CPU, in single precision)
    - other modules are replaced by their ``forward()``: for a small layer, ``Module.__call__`` takes half of the time
    - modules with hooks are kept

    :param modules: layers, in order
    :return: functions to call in order
    """
    layers: list[Layer] = []
    previous: nn.Module | None = None
    for module in modules:
        if _is_plain(module, nn.Tanh) and _is_plain_linear(previous) and not _has_hooks(previous) and not _has_hooks(module):
            layers[-1] = _fuse_tanh(previous)
        else:
            layers.append(module if _has_hooks(module) else module.forward)
        previous = module
    return layers


class Head:
    """
    Distribution of actions given the output of the actor's last hidden layer ("latent"). This class uses SB3's distribution
    objects and supports all of them.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy
        (self.action_net,) = make_layers(policy.action_net)

    def sample(self, latent: th.Tensor) -> np.ndarray:
        """:return: sampled actions, N in all"""
        return self.policy._get_action_dist_from_latent(latent).get_actions().cpu().numpy()

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """:return: log probabilities and entropies (None without an analytical form), shape (N,)"""
        distribution = self.policy._get_action_dist_from_latent(latent)
        return distribution.log_prob(actions), distribution.entropy()

    def parameters(self, latent: th.Tensor) -> Any:
        """:return: parameters of the distributions, in the form that :meth:`kl_divergence` takes"""
        # The policy has a single distribution object, which each forward pass changes
        return copy.copy(self.policy._get_action_dist_from_latent(latent))

    def kl_divergence(self, before: Any, after: Any) -> th.Tensor:
        """:return: KL(before || after), shape (N,)"""
        kl = kl_divergence(before, after)
        # One number per step: the dimensions of an action are independent
        return kl.reshape(len(kl), -1).sum(dim=1)


class StateDependentNoiseHead(Head):
    """gSDE. Sampling does not construct the distribution object."""

    def sample(self, latent: th.Tensor) -> np.ndarray:
        distribution: StateDependentNoiseDistribution = self.policy.action_dist  # type: ignore[assignment]
        actions = self.action_net(latent) + distribution.get_noise(latent)
        return (actions if distribution.bijector is None else distribution.bijector.forward(actions)).cpu().numpy()


class NumPyHead(Head):
    """
    Distribution without SB3's objects: constructing one takes longer than evaluating a small network. Actions are sampled in
    NumPy, with random numbers of PyTorch's generator.
    """

    def sample(self, latent: th.Tensor) -> np.ndarray:
        return self.sample_from(self.action_net(latent).cpu().numpy())

    def sample_from(self, outputs: np.ndarray) -> np.ndarray:
        """
        :param outputs: outputs of the action_net, shape (N, ...)
        :return: sampled actions
        """
        raise NotImplementedError


class CategoricalHead(NumPyHead):
    def sample_from(self, outputs: np.ndarray) -> np.ndarray:
        # Same method as Tensor.multinomial for one sample: p_i / Exponential(1) is largest at i with probability p_i
        noise = th.empty(outputs.shape).exponential_().numpy()
        return (outputs - np.log(noise)).argmax(axis=1)

    def parameters(self, latent: th.Tensor) -> th.Tensor:
        # Transposed, since sums over a short last axis are slow
        return self.action_net(latent).T.log_softmax(dim=0)

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_p = self.parameters(latent)
        return log_p.gather(0, actions.unsqueeze(0)).squeeze(0), -(log_p.exp() * log_p).sum(dim=0)

    def kl_divergence(self, before: th.Tensor, after: th.Tensor) -> th.Tensor:
        return (before.exp() * (before - after)).sum(dim=0)


class DiagGaussianHead(NumPyHead):
    def sample_from(self, outputs: np.ndarray) -> np.ndarray:
        noise = th.normal(th.zeros(outputs.shape), 1.0).numpy()
        return outputs + self.policy.log_std.exp().numpy(force=True) * noise

    def parameters(self, latent: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.action_net(latent), self.policy.log_std.clone()

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = self.parameters(latent)
        # log N(a; mu, sigma) = -((a - mu) / sigma)^2 / 2 - log sigma - log(2 pi) / 2
        # entropy = (1 + log(2 pi)) / 2 + log sigma
        log_prob = (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * LOG_2_PI).sum(dim=1)
        return log_prob, (0.5 + 0.5 * LOG_2_PI + log_std).sum().expand(len(mean))

    def kl_divergence(self, before: tuple[th.Tensor, th.Tensor], after: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        (mean, log_std), (new_mean, new_log_std) = before, after
        squares = (log_std.exp() ** 2 + (mean - new_mean) ** 2) / (2 * new_log_std.exp() ** 2)
        return (new_log_std - log_std + squares - 0.5).sum(dim=1)


class NumPyActor:
    """
    The actor network in NumPy. It shares the memory of PyTorch's weights. For few observations the overhead of function calls
    dominates, and NumPy's is smaller than PyTorch's.

    :param linears: linear layers; each except the last is followed by a tanh
    :param head: samples actions from the outputs of the last layer
    """

    def __init__(self, linears: list[nn.Linear], head: NumPyHead):
        *self._hidden, self._last = [(linear.weight.detach().numpy().T, linear.bias.detach().numpy()) for linear in linears]
        self._sample_from = head.sample_from
        #: Largest number of observations at a time
        self.max_batch = LARGEST_NUMPY_PRODUCT // max(linear.weight.numel() for linear in linears)

    def sample(self, x: np.ndarray) -> np.ndarray:
        """
        :param x: observations, float32, shape (N, features)
        :return: sampled actions
        """
        for weight, bias in self._hidden:
            x = np.dot(x, weight)
            x += bias
            np.tanh(x, out=x)
        weight, bias = self._last
        return self._sample_from(np.dot(x, weight) + bias)


HEADS: dict[type[Distribution], type[Head]] = {
    CategoricalDistribution: CategoricalHead,
    DiagGaussianDistribution: DiagGaussianHead,
    StateDependentNoiseDistribution: StateDependentNoiseHead,
}


class PolicyRunner:
    """
    Run the networks of any policy through the policy's own methods.

    Create one runner per rollout and per update: modules and hooks may change in between.

    :param policy: any actor-critic policy
    """

    #: Whether a forward pass is faster on one thread of PyTorch. Several such passes can run in parallel threads.
    single_threaded = False

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy

    def threads(self) -> AbstractContextManager[None]:
        """:return: context in which PyTorch runs each operation on one thread, if that is faster"""
        return one_thread() if th.get_num_threads() > 1 and self.single_threaded else nullcontext()

    def evaluate(
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        """
        Evaluate actions that were taken, with gradients.

        :param obs: N observations
        :param actions: N actions, as :class:`RolloutBuffer` stores them
        :param with_values: whether to compute values
        :return: values (None if not computed), log probabilities, entropies (None without an analytical form), shape (N,)
        """
        values, log_prob, entropy = self.policy.evaluate_actions(obs, self._actions(actions))
        return values.flatten() if with_values else None, log_prob, entropy

    def values(self, obs: PyTorchObs) -> th.Tensor:
        """:return: V(s), shape (N,)"""
        return self.policy.predict_values(obs).flatten()

    @th.no_grad()
    def snapshot(self, obs: PyTorchObs, actions: th.Tensor) -> Any:
        """:return: the distributions of actions at these observations, in the form that :meth:`kl_divergence` takes"""
        return self.evaluate(obs, actions, with_values=False)[1]

    def kl_divergence(self, before: Any, after: Any) -> float:
        """
        :param before: a snapshot
        :param after: a later snapshot at the same observations and actions
        :return: KL(before || after), averaged over the observations. This class uses the unbiased estimate from log
            probabilities of http://joschu.net/blog/kl-approx.html
        """
        log_ratio = after - before
        return (th.exp(log_ratio) - 1 - log_ratio).mean().item()

    def _actions(self, actions: th.Tensor) -> th.Tensor:
        # Convert discrete action from float to long
        return actions.long().flatten() if isinstance(self.policy.action_space, spaces.Discrete) else actions


class FastPolicyRunner(PolicyRunner):
    """
    Runner for a policy for which :func:`has_sb3_forward` is True. Actions, log probabilities and values are computed
    separately. Results are the same up to rounding, in less time.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
        flat = isinstance(policy.observation_space, spaces.Box) and not is_image_space(policy.observation_space)
        #: Whether extract_features() only flattens the observation, the most common case
        self._only_flatten = flat and all(map(_only_flattens, extractors))
        #: Whether actor and critic share features that are costly to compute
        self.shares_features = policy.share_features_extractor and not self._only_flatten
        self._head = HEADS.get(type(policy.action_dist), Head)(policy)
        mlp = policy.mlp_extractor
        self._plain = _is_plain(mlp, MlpExtractor) and all(
            _is_plain(network, nn.Sequential) and not _has_hooks(network) for network in (mlp.policy_net, mlp.value_net)
        )
        self._actor: list[Layer] = make_layers(*mlp.policy_net) if self._plain else [mlp.forward_actor]
        critic: list[Layer] = make_layers(*mlp.value_net) if self._plain else [mlp.forward_critic]
        self._critic = [*critic, *make_layers(policy.value_net)]

    @cached_property
    def single_threaded(self) -> bool:  # type: ignore[override]
        """True for small standard layers on a CPU, without hooks, and with a distribution that has no state."""
        if not (self._plain and self._only_flatten and isinstance(self._head, NumPyHead)):
            return False
        parameters = list(self.policy.parameters())
        hooks = any(map(_has_hooks, self.policy.modules())) or any(p._post_accumulate_grad_hooks for p in parameters)
        return not hooks and all(p.is_cpu and p.numel() <= LARGEST_SMALL_LAYER for p in parameters)

    @cached_property
    def _numpy_actor(self) -> NumPyActor | None:
        """The actor in NumPy; None unless it consists of alternating Linear and Tanh, in single precision on a CPU."""
        if not (self._plain and self._only_flatten and isinstance(self._head, NumPyHead)):
            return None
        modules = [*self.policy.mlp_extractor.policy_net, self.policy.action_net]
        linears, activations = modules[::2], modules[1::2]
        supported = all(map(_is_plain_linear, linears)) and all(_is_plain(module, nn.Tanh) for module in activations)
        return None if not supported or any(map(_has_hooks, modules)) else NumPyActor(linears, self._head)

    def _features(self, obs: PyTorchObs, extractor: BaseFeaturesExtractor) -> th.Tensor:
        if self._only_flatten:
            return obs.float().flatten(1)  # type: ignore[union-attr]
        return BaseModel.extract_features(self.policy, obs, extractor)

    def sample(self, obs: PyTorchObs, with_values: bool) -> tuple[np.ndarray, th.Tensor | None]:
        """
        Sample actions. With the same random state, they are those of ``policy.get_distribution(obs).get_actions()``.

        :param obs: observations of N environments
        :param with_values: whether to compute values
        :return: actions, and values without gradient (None if not computed), shape (N,)
        """
        if self._numpy_actor is not None and len(obs) <= self._numpy_actor.max_batch and not with_values:
            x: th.Tensor = obs  # type: ignore[assignment]
            return self._numpy_actor.sample(x.numpy().reshape(len(x), -1).astype(np.float32, copy=False)), None
        with self.threads(), th.inference_mode():
            features = self._features(obs, self.policy.pi_features_extractor)
            actions = self._head.sample(_apply_layers(self._actor, features))
            return actions, self._values(obs, features) if with_values else None

    def evaluate(
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        features = self._features(obs, self.policy.pi_features_extractor)
        log_prob, entropy = self._head.evaluate(_apply_layers(self._actor, features), self._actions(actions))
        return self._values(obs, features) if with_values else None, log_prob, entropy

    def values(self, obs: PyTorchObs) -> th.Tensor:
        with self.threads():
            return self._values(obs)

    def _values(self, obs: PyTorchObs, features: th.Tensor | None = None) -> th.Tensor:
        if features is None or not self.policy.share_features_extractor:
            features = self._features(obs, self.policy.vf_features_extractor)
        return _apply_layers(self._critic, features).flatten()

    @th.no_grad()
    def snapshot(self, obs: PyTorchObs, actions: th.Tensor) -> Any:
        with self.threads():
            return self._head.parameters(_apply_layers(self._actor, self._features(obs, self.policy.pi_features_extractor)))

    def kl_divergence(self, before: Any, after: Any) -> float:
        return self._head.kl_divergence(before, after).mean().item()


def _apply_layers(layers: list[Layer], x: th.Tensor) -> th.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def make_policy_runner(policy: ActorCriticPolicy) -> PolicyRunner:
    """:return: the fast runner if the policy's forward passes are SB3's own, else the general one"""
    return FastPolicyRunner(policy) if has_sb3_forward(policy) else PolicyRunner(policy)
