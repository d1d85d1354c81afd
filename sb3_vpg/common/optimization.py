"""Separate optimizer groups for the parameters of actor and critic."""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_vpg.common.policy_runner import gradients_in_evaluation_mode
from sb3_vpg.common.recurrent_runner import is_recurrent, zero_states
from sb3_vpg.common.threads import Gradient

# Since PyTorch 2.4
FUSED_ADAM_ON_CPU = tuple(map(int, th.__version__.split(".")[:2])) >= (2, 4)

#: Largest number of steps on which a pass of the value regression is computed, without minibatches
LARGEST_CRITIC_BATCH = 4096


def critic_only_parameters(policy: ActorCriticPolicy) -> set[int]:
    """
    Find the parameters that only the critic uses: the value depends on them, the log probability and the entropy do not.
    Frozen parameters are included.

    :param policy: any actor-critic policy
    :return: ids of these parameters
    """
    parameters = list(policy.parameters())
    zeros = create_empty_array(policy.observation_space, n=1, fn=np.zeros)
    obs = obs_as_tensor(zeros, policy.device)  # type: ignore[arg-type]

    def depends(output: th.Tensor) -> list[bool]:
        if not output.requires_grad:
            return [False] * len(parameters)
        gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    with gradients_in_evaluation_mode(policy), unfrozen(parameters), th.enable_grad():
        inputs: dict[str, Any] = {}
        if is_recurrent(policy):
            inputs = {"lstm_states": zero_states(policy, 1), "episode_starts": th.ones(1, device=policy.device)}
            action = policy.forward(obs, deterministic=True, **inputs)[0].detach()  # type: ignore[arg-type]
            # Actions of several dimensions are stored flat
            action = action.flatten(1) if action.dim() > 2 else action
        else:
            action = policy._predict(obs, deterministic=True).detach()
        values, log_prob, entropy = policy.evaluate_actions(obs, action, **inputs)
        in_value = depends(values.sum())
        in_actor = depends(log_prob.sum() + (0.0 if entropy is None else entropy.sum()))
    return {id(p) for p, value, actor in zip(parameters, in_value, in_actor) if value and not actor}


@contextmanager
def unfrozen(parameters: Iterable[th.nn.Parameter]) -> Iterator[None]:
    """Context in which all parameters require gradients, including the frozen ones."""
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class ParameterGroups:
    """
    The policy's parameters by role: ``critic`` has those that only the critic uses, ``actor`` has all others. The optimizer
    has one group for each role, with its own learning rate.
    """

    def __init__(self) -> None:
        self.actor: list[th.nn.Parameter] = []
        self.critic: list[th.nn.Parameter] = []
        self._known: list[Any] = []

    def refresh(self, policy: ActorCriticPolicy) -> None:
        """
        Find the roles, and split each group of the policy's optimizer into one with ``role`` "actor" and one with ``role``
        "critic". Nothing is done if it was done before for the same parameters.
        """
        optimizer, parameters = policy.optimizer, list(policy.parameters())
        present = [optimizer, *parameters]
        unchanged = len(present) == len(self._known) and all(map(operator.is_, present, self._known))
        if unchanged and all("role" in group for group in optimizer.param_groups):
            return
        critic = critic_only_parameters(policy)
        self._known = present
        self.actor = [p for p in parameters if id(p) not in critic]
        self.critic = [p for p in parameters if id(p) in critic]
        groups = []
        for group in optimizer.param_groups:
            for role in ("actor", "critic"):
                params = [p for p in group["params"] if (id(p) in critic) == (role == "critic")]
                if params:
                    groups.append({**group, "params": params, "role": role})
        optimizer.param_groups = groups

    @contextmanager
    def critic_only(self, optimizer: th.optim.Optimizer) -> Iterator[None]:
        """Context in which the optimizer has only the groups of the critic."""
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["role"] == "critic"]
        try:
            yield
        finally:
            optimizer.param_groups = groups


def set_learning_rates(optimizer: th.optim.Optimizer, keywords: dict[str, float]) -> None:
    """
    Set the learning rates of the optimizer's groups.

    :param optimizer: an optimizer whose groups :class:`ParameterGroups` has split
    :param keywords: "learning_rate", of the actor, and "critic_learning_rate"
    """
    for group in optimizer.param_groups:
        group["lr"] = keywords["learning_rate" if group["role"] == "actor" else "critic_learning_rate"]


def check_trainable(parameters: Iterable[th.nn.Parameter]) -> None:
    """:raises ValueError: if all of the parameters are frozen"""
    if not any(p.requires_grad for p in parameters):
        raise ValueError("All parameters that the update trains are frozen (requires_grad=False); unfreeze at least one layer")


def fuse_adam(optimizer: th.optim.Optimizer) -> None:
    """Use the fused implementation of Adam on a CPU: same result, a quarter of the time for small networks."""
    on_cpu = all(p.is_cpu for group in optimizer.param_groups for p in group["params"])
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or not on_cpu or not FUSED_ADAM_ON_CPU:
        return
    for group in optimizer.param_groups:
        # The user has not chosen an implementation
        if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def n_parts(n_steps: int, n_envs: int) -> int:
    """
    :param n_steps: number of steps of a rollout
    :param n_envs: number N of environments
    :return: number of evenly spaced parts of at most :data:`LARGEST_CRITIC_BATCH` steps. It has no common divisor with N, so
        that each part has steps of all environments: step t of environment i has the index t N + i
    """
    at_least = -(-n_steps // LARGEST_CRITIC_BATCH)
    return next(n for n in itertools.count(at_least) if math.gcd(n, n_envs) == 1)


class RepeatedSteps:
    """
    Several steps of an optimizer in a row, in less time for small networks: ``grad`` of all parameters is one piece of memory,
    and Adam's fused function is called without what ``step()`` does around it.

    :param optimizer: the optimizer
    :param parameters: the parameters that have a gradient
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter]):
        self._parameters = parameters
        groups = defaultdict(list)
        for parameter in parameters:
            groups[parameter.device, parameter.dtype].append(parameter)
        self._gradients: list[th.Tensor] = []
        for (device, dtype), group in groups.items():
            sizes = [parameter.numel() for parameter in group]
            gradient = th.zeros(sum(sizes), device=device, dtype=dtype)
            for parameter, part in zip(group, gradient.split(sizes)):
                # Optimizers expect gradient and parameter to have the same memory layout
                parameter.grad = part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
            self._gradients.append(gradient)
        #: Make a step
        self.step: Callable[[], Any] = _fused_adam_step(optimizer) if _is_plain_fused_adam(optimizer) else optimizer.step

    def set_gradient(self, parts: Iterable[Gradient]) -> None:
        """Set ``grad`` of the parameters to the sum of these parts."""
        parts = iter(parts)
        first = next(parts, None)
        if first is None:
            for gradient in self._gradients:
                gradient.zero_()
            return
        first.write_to(self._parameters)
        for part in parts:
            part.add_to(self._parameters)

    def clip_gradient(self, max_norm: float | None) -> float:
        """:return: the norm of the gradient before it was clipped to ``max_norm`` (None: not clipped)"""
        norm = math.hypot(*(float(th.linalg.vector_norm(gradient)) for gradient in self._gradients))
        if max_norm is not None and norm > max_norm:
            for gradient in self._gradients:
                gradient *= max_norm / (norm + 1e-6)
        return norm


def _is_plain_fused_adam(optimizer: th.optim.Optimizer) -> bool:
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    hooks = own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    if hooks or type(optimizer) is not th.optim.Adam or "step" in vars(optimizer):
        return False
    # Before its first step with a gradient, a parameter has no averages
    begun = all(optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return begun and all(group["fused"] and not group["amsgrad"] for group in optimizer.param_groups)


def _fused_adam_step(optimizer: th.optim.Optimizer) -> Callable[[], None]:
    groups: list[tuple[dict[str, Any], th.Tensor, Any]] = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            continue
        states = [optimizer.state[p] for p in parameters]
        # The numbers of steps are one piece of memory, too
        counts = th.stack([state["step"] for state in states])
        for state, count in zip(states, counts):
            state["step"] = count
        averages = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        tensors = (parameters, [p.grad for p in parameters], *averages, [], [state["step"] for state in states])
        groups.append((group, counts, tensors))

    @th.no_grad()
    def step() -> None:
        for group, counts, tensors in groups:
            counts += 1
            beta1, beta2 = group["betas"]
            keywords = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            th._fused_adam_(*tensors, beta1=beta1, beta2=beta2, **keywords)

    return step
