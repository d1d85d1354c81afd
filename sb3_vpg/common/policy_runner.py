"""
Run a policy's networks for rollout and update: sample actions, evaluate log probabilities, compute values.

:class:`PolicyRunner` calls the methods of any policy. :class:`FastPolicyRunner` computes the same numbers in less time, for
policies whose forward passes are SB3's own.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_vpg.common.distribution_heads import NumPyHead, kl_estimate, make_head
from sb3_vpg.common.layers import Layer, has_hooks, is_plain, make_layers
from sb3_vpg.common.plain_networks import PlainEvaluation, PlainNetwork, has_gradient_hooks, make_plain_network
from sb3_vpg.common.policy_inputs import is_vector_space
from sb3_vpg.common.threads import Gradient, one_thread

#: Largest matrix product (number of multiplications) that OpenBLAS, the library behind NumPy, computes on a single thread.
#: PyTorch's number of threads does not apply to it.
LARGEST_NUMPY_PRODUCT = 2**18
#: Largest number of weights in a layer for which one thread of PyTorch is faster than several
LARGEST_SMALL_LAYER = 2**14

# Policies whose forward() is the same as separate forward passes of actor and critic
SB3_POLICIES = {
    "stable_baselines3.common.policies.ActorCriticPolicy",
    "sb3_contrib.common.maskable.policies.MaskableActorCriticPolicy",
}
# If a policy overrides one of these methods, its forward() may compute something else than separate forward passes would
SB3_FORWARD = (
    "forward",
    "extract_features",
    "get_distribution",
    "evaluate_actions",
    "predict_values",
    "_get_action_dist_from_latent",
)


def has_sb3_forward(
    policy: ActorCriticPolicy, policies: Collection[str] = SB3_POLICIES, methods: Collection[str] = SB3_FORWARD
) -> bool:
    """
    :param policy: the policy
    :param policies: full names of the policies whose forward passes are known
    :param methods: their methods that compute forward passes
    :return: whether the forward passes of the policy are SB3's own and the policy has no hooks, so that actions, log
        probabilities and values can be computed separately and in batches
    """
    # A policy compiled by th.compile() is of another type
    base = next((cls for cls in type(policy).__mro__ if f"{cls.__module__}.{cls.__qualname__}" in policies), None)
    if base is None or any(getattr(type(policy), name) is not getattr(base, name) for name in methods):
        return False
    # Separate forward passes do not call these two modules as a whole, so their hooks would not run
    if has_hooks(policy) or has_hooks(policy.mlp_extractor):
        return False
    # A method of this object was replaced after construction
    own = vars(policy).keys() & methods or vars(policy.mlp_extractor).keys() & {"forward", "forward_actor", "forward_critic"}
    if own:
        return False
    shared = policy.features_extractor is policy.pi_features_extractor is policy.vf_features_extractor
    return shared or not policy.share_features_extractor


@contextmanager
def gradients_in_evaluation_mode(policy: ActorCriticPolicy) -> Iterator[None]:
    """
    Context for gradients outside of an update, in evaluation mode.

    - The policy uses a copy of its distribution. A policy keeps the last distribution that it has computed, together with its
      computation graph; ``copy.deepcopy`` of such a policy fails.
    - cuDNN is not used for recurrent policies: its LSTMs have gradients in training mode only.
    """
    policy.set_training_mode(False)
    original = policy.action_dist
    policy.action_dist = copy.copy(original)
    recurrent = any(isinstance(module, nn.RNNBase) for module in policy.modules())
    try:
        with th.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            yield
    finally:
        policy.action_dist = original


def _only_flattens(extractor: nn.Module) -> bool:
    """Whether the extractor only flattens the observation, and has no hooks."""
    if not is_plain(extractor, FlattenExtractor) or any(map(has_hooks, extractor.modules())):
        return False
    flatten = extractor.flatten
    return is_plain(flatten, nn.Flatten) and (flatten.start_dim, flatten.end_dim) == (1, -1)


class NumPyActor:
    """
    The actor network in NumPy. It shares the memory of PyTorch's weights. For few observations the overhead of function calls
    dominates, and NumPy's is smaller than PyTorch's.

    :param network: the network before the head
    :param head: samples actions from the outputs of the last layer
    """

    def __init__(self, network: PlainNetwork, head: NumPyHead):
        parameters = [parameter.detach().numpy() for parameter in network.parameters]
        *self._hidden, self._last = [(weight.T, bias) for weight, bias in zip(parameters[::2], parameters[1::2])]
        self._sample_from = head.sample_from
        #: Largest number of observations at a time
        self.max_batch = LARGEST_NUMPY_PRODUCT // max(weight.size for weight in parameters[::2])

    def sample(self, x: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
        """
        :param x: observations, float32, shape (N, features)
        :param inputs: further inputs of the policy
        :return: sampled actions
        """
        for weight, bias in self._hidden:
            x = np.dot(x, weight)
            x += bias
            np.tanh(x, out=x)
        weight, bias = self._last
        return self._sample_from(np.dot(x, weight) + bias, **inputs)


class Evaluation:
    """
    Values and actions that were taken, evaluated by automatic differentiation.

    :param values: V(s), shape (N,); None if not computed
    :param log_prob: log probabilities, shape (N,); None if not computed
    :param entropy: entropies, shape (N,); None if not computed, or without an analytical form
    """

    def __init__(self, values: th.Tensor | None, log_prob: th.Tensor | None = None, entropy: th.Tensor | None = None):
        self._outputs = values, log_prob, entropy
        self.values, self.log_prob, self.entropy = (None if x is None else x.detach() for x in self._outputs)

    def gradient(self, by_values: th.Tensor | None, by_log_prob: th.Tensor | None = None, by_entropy: float = 0.0) -> Gradient:
        """
        :param by_values: derivatives of the loss by the values, shape (N,); None if they were not computed
        :param by_log_prob: derivatives of the loss by the log probabilities, shape (N,); None if they were not computed
        :param by_entropy: derivative of the loss by each entropy
        :return: the gradient of the loss
        """
        entropy = self._outputs[2]
        by_each_entropy = None if entropy is None or by_entropy == 0 else th.full_like(entropy, by_entropy)
        pairs = zip(self._outputs, (by_values, by_log_prob, by_each_entropy))
        # The outputs of frozen networks require no gradient
        outputs, derivatives = zip(*((x, by_x) for x, by_x in pairs if by_x is not None and x.requires_grad))  # type: ignore
        return Gradient(outputs, derivatives)


class PolicyRunner:
    """
    Run the networks of any policy through the policy's own methods.

    Create one runner per rollout and per update: modules and hooks may change in between.

    :param policy: any actor-critic policy
    """

    #: Whether batches are sequences, which cannot be sampled
    sequences = False
    #: Whether the runner samples actions. Otherwise, the policy is called
    samples_actions = False
    #: Whether it computes values together with actions, if they are needed, rather than in a batch after the rollout
    values_with_actions = True
    #: Whether a forward pass is faster on one thread of PyTorch. Several such passes can run in parallel threads.
    single_threaded = False

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy

    def set_training_mode(self, mode: bool, only: Collection[nn.Parameter] | None = None) -> None:
        """
        Put the networks into training mode or evaluation mode, if it makes a difference.

        :param only: in training mode, only batch normalization with these parameters updates its statistics; None: all
        """
        self.policy.set_training_mode(mode)
        if only is not None:
            trained = set(map(id, only))
            for module in self.policy.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not trained & set(map(id, module.parameters())):
                    module.eval()

    @property
    def threads_per_operation(self) -> int:
        """Number of threads of PyTorch that share each operation."""
        n_threads = th.get_num_threads()
        return 1 if n_threads == 1 or self.single_threaded or self.policy.device.type != "cpu" else n_threads

    def threads(self) -> AbstractContextManager[None]:
        """:return: context in which PyTorch runs each operation on one thread, if that is faster"""
        return one_thread() if th.get_num_threads() > 1 and self.single_threaded else nullcontext()

    def evaluate(
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, **inputs: th.Tensor
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        """
        Evaluate actions that were taken, with gradients.

        :param obs: N observations
        :param actions: N actions, as :class:`RolloutBuffer` stores them
        :param with_values: whether to compute values
        :param inputs: further inputs of the policy, by keyword of its methods: "action_masks"
        :return: values (None if not computed), log probabilities, entropies (None without an analytical form), shape (N,)
        """
        values, log_prob, entropy = self.policy.evaluate_actions(obs, self._actions(actions), **inputs)
        log_prob = log_prob.flatten()
        # With A2C, a policy may return the mean of the entropies
        entropy = None if entropy is None else entropy.flatten().expand(len(log_prob))
        return values.flatten() if with_values else None, log_prob, entropy

    def evaluation(self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, **inputs: th.Tensor) -> Any:
        """:return: an :class:`Evaluation` with the results of :meth:`evaluate`, or an object with its interface"""
        return Evaluation(*self.evaluate(obs, actions, with_values, **inputs))

    def value_evaluation(self, obs: PyTorchObs, **inputs: th.Tensor) -> Any:
        """:return: an :class:`Evaluation` with values only, or an object with its interface"""
        return Evaluation(self.values(obs, **inputs))

    def values(self, obs: PyTorchObs, **inputs: th.Tensor) -> th.Tensor:
        """:return: V(s), shape (N,)"""
        return self.policy.predict_values(obs).flatten()

    @th.no_grad()
    def snapshot(self, obs: PyTorchObs, actions: th.Tensor, **inputs: th.Tensor) -> Any:
        """:return: the distributions of actions at these observations, in the form that :meth:`kl_divergence` takes"""
        return self.evaluate(obs, actions, with_values=False, **inputs)[1]

    def kl_divergence(self, before: Any, after: Any) -> float:
        """
        :param before: a snapshot
        :param after: a later snapshot at the same observations and actions
        :return: KL(before || after), averaged over the observations. This class estimates it from log probabilities
        """
        return kl_estimate(after - before).mean().item()

    def _actions(self, actions: th.Tensor) -> th.Tensor:
        # Convert discrete action from float to long
        return actions.long().flatten() if isinstance(self.policy.action_space, spaces.Discrete) else actions


class FastPolicyRunner(PolicyRunner):
    """
    Runner for a policy for which :func:`has_sb3_forward` is True. Actions, log probabilities and values are computed
    separately. Results are the same up to rounding, in less time.

    :param policy: the policy
    """

    samples_actions = True

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
        #: Whether extract_features() only flattens the observation, the most common case
        self._only_flatten = is_vector_space(policy.observation_space) and all(map(_only_flattens, extractors))
        # Features that actor and critic share are costly to compute
        self.values_with_actions = policy.share_features_extractor and not self._only_flatten
        self.head = make_head(policy)
        mlp = policy.mlp_extractor
        self._plain = is_plain(mlp, MlpExtractor) and all(
            is_plain(network, nn.Sequential) and not has_hooks(network) for network in (mlp.policy_net, mlp.value_net)
        )
        if self._plain:
            self.actor: list[Layer] = make_layers(*mlp.policy_net, *self.head.modules)
            self.critic: list[Layer] = make_layers(*mlp.value_net, policy.value_net)
        else:
            self.actor = [mlp.forward_actor, *make_layers(*self.head.modules)]
            self.critic = [mlp.forward_critic, *make_layers(policy.value_net)]

    @cached_property
    def single_threaded(self) -> bool:  # type: ignore[override]
        """True for small standard layers on a CPU, without hooks, and with a distribution that has no state."""
        if not (self._plain and self._only_flatten and isinstance(self.head, NumPyHead)):
            return False
        parameters = list(self.policy.parameters())
        hooks = any(map(has_hooks, self.policy.modules())) or any(p._post_accumulate_grad_hooks for p in parameters)
        return not hooks and all(p.is_cpu and p.numel() <= LARGEST_SMALL_LAYER for p in parameters)

    @cached_property
    def _actor_network(self) -> PlainNetwork | None:
        """The actor, if it is a plain network before a head in NumPy."""
        if not (self._plain and self._only_flatten and isinstance(self.head, NumPyHead)):
            return None
        return make_plain_network("actor", *self.policy.mlp_extractor.policy_net, self.policy.action_net)

    @cached_property
    def _critic_network(self) -> PlainNetwork | None:
        """The critic, if it is a plain network."""
        if not (self._plain and self._only_flatten):
            return None
        return make_plain_network("critic", *self.policy.mlp_extractor.value_net, self.policy.value_net)

    @cached_property
    def _numpy_actor(self) -> NumPyActor | None:
        return None if self._actor_network is None else NumPyActor(self._actor_network, self.head)  # type: ignore[arg-type]

    @cached_property
    def _by_hand(self) -> bool:
        """Whether the gradients of all parameters are computed by hand."""
        if self._actor_network is None or self._critic_network is None:
            return False
        parameters = [*self._actor_network.parameters, *self._critic_network.parameters, *self.head.own_parameters]
        # The gradient of a parameter that is used twice is a sum. A tensor that is computed from parameters has no ``grad``
        if len(set(map(id, parameters))) < len(parameters) or not all(isinstance(p, nn.Parameter) for p in parameters):
            return False
        return not any(map(has_gradient_hooks, parameters))

    def set_training_mode(self, mode: bool, only: Collection[nn.Parameter] | None = None) -> None:
        # Plain networks compute the same in both modes
        if not self._by_hand:
            super().set_training_mode(mode, only)

    def features(self, obs: PyTorchObs, extractor: BaseFeaturesExtractor) -> th.Tensor:
        if self._only_flatten:
            return obs.float().flatten(1)  # type: ignore[union-attr]
        return BaseModel.extract_features(self.policy, obs, extractor)

    def sample(self, obs: PyTorchObs, with_values: bool, **inputs: np.ndarray) -> tuple[np.ndarray, th.Tensor | None]:
        """
        Sample actions. With the same random state, they are those of ``policy.get_distribution(obs).get_actions()``.

        :param obs: observations of N environments
        :param with_values: whether to compute values
        :param inputs: further inputs of the policy: "action_masks"
        :return: actions, and values without gradient (None if not computed), shape (N,)
        """
        if self._numpy_actor is not None and len(obs) <= self._numpy_actor.max_batch and not with_values:
            x: th.Tensor = obs  # type: ignore[assignment]
            return self._numpy_actor.sample(x.numpy().reshape(len(x), -1).astype(np.float32, copy=False), **inputs), None
        # Not inference_mode(): an extractor of one's own may keep tensors for the update
        with self.threads(), th.no_grad():
            features = self.features(obs, self.policy.pi_features_extractor)
            actions = self.head.sample(apply_layers(self.actor, features), **inputs)
            return actions, self._values(obs, features) if with_values else None

    def evaluate(
        self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, **inputs: th.Tensor
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        features = self.features(obs, self.policy.pi_features_extractor)
        latent = apply_layers(self.actor, features)
        log_prob, entropy = self.head.evaluate(latent, self._actions(actions), **inputs)
        return self._values(obs, features) if with_values else None, log_prob, entropy

    def evaluation(self, obs: PyTorchObs, actions: th.Tensor, with_values: bool, **inputs: th.Tensor) -> Any:
        if not self._by_hand:
            return super().evaluation(obs, actions, with_values, **inputs)
        actor: Any = (self.head, self._actor_network, self._actions(actions))
        critic = self._critic_network if with_values else None
        return PlainEvaluation(self.features(obs, self.policy.pi_features_extractor), actor, critic, **inputs)

    def value_evaluation(self, obs: PyTorchObs, **inputs: th.Tensor) -> Any:
        if not self._by_hand:
            return super().value_evaluation(obs, **inputs)
        return PlainEvaluation(self.features(obs, self.policy.vf_features_extractor), None, self._critic_network)

    def values(self, obs: PyTorchObs, **inputs: th.Tensor) -> th.Tensor:
        with self.threads():
            if self._critic_network is not None and not th.is_grad_enabled():
                return self._critic_network.forward(self.features(obs, self.policy.vf_features_extractor))[-1].flatten()
            return self._values(obs)

    def _values(self, obs: PyTorchObs, features: th.Tensor | None = None) -> th.Tensor:
        if features is None or not self.policy.share_features_extractor:
            features = self.features(obs, self.policy.vf_features_extractor)
        return apply_layers(self.critic, features).flatten()

    @th.no_grad()
    def snapshot(self, obs: PyTorchObs, actions: th.Tensor, **inputs: th.Tensor) -> Any:
        with self.threads():
            features = self.features(obs, self.policy.pi_features_extractor)
            return self.head.parameters(apply_layers(self.actor, features), **inputs)

    def kl_divergence(self, before: Any, after: Any) -> float:
        return self.head.kl_divergence(before, after).mean().item()


def apply_layers(layers: list[Layer], x: th.Tensor) -> th.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def make_policy_runner(policy: ActorCriticPolicy) -> PolicyRunner:
    """:return: the fast runner if the policy's forward passes are SB3's own, else the general one"""
    return FastPolicyRunner(policy) if has_sb3_forward(policy) else PolicyRunner(policy)
