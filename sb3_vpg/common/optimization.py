"""Separate optimizer groups for the parameters of actor and critic."""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_vpg.common.policy_runner import gradients_in_evaluation_mode
from sb3_vpg.common.recurrent_runner import is_recurrent, zero_states

# Since PyTorch 2.4
FUSED_ADAM_ON_CPU = tuple(map(int, th.__version__.split(".")[:2])) >= (2, 4)

#: The gradient of each parameter begins at a multiple of this number of elements, as memory of its own would: with another
#: alignment, matrix products are rounded differently
ALIGNMENT = 16

#: Largest number of steps on which a pass of the value regression is computed, without minibatches
LARGEST_CRITIC_BATCH = 4096


def critic_only_parameters(policy: ActorCriticPolicy) -> set[int]:
    """
    Find the parameters that only the critic uses: the value depends on them, the log probability and the entropy do not.
    Frozen parameters are included.

    :param policy: any actor-critic policy
    :return: ids of these parameters
    """
    parameters = [p for p in policy.parameters() if p.is_floating_point()]
    obs = obs_as_tensor(_near_zero(policy.observation_space), policy.device)

    def depends(output: th.Tensor) -> list[bool]:
        if not output.requires_grad:
            return [False] * len(parameters)
        gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    # The output may be NaN for this observation. What it depends on is known nevertheless
    with gradients_in_evaluation_mode(policy), unfrozen(parameters), th.enable_grad(), without_validation():
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


def _near_zero(space: spaces.Space) -> Any:
    """:return: a batch of one observation: the one in the space that is nearest to 0"""
    if isinstance(space, spaces.Dict):
        return {key: _near_zero(part) for key, part in space.items()}
    zeros: Any = create_empty_array(space, n=1, fn=np.zeros)
    return np.clip(zeros, space.low, space.high) if isinstance(space, spaces.Box) else zeros


@contextmanager
def without_validation() -> Iterator[None]:
    """Context in which probability distributions accept all parameters."""
    default = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(default)


@contextmanager
def unfrozen(parameters: Iterable[th.nn.Parameter]) -> Iterator[None]:
    """Context in which all parameters require gradients, including the frozen ones."""
    frozen = [p for p in parameters if not p.requires_grad]
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
        self._optimizer = optimizer
        self._gradients = {role: FlatGradient([]) for role in ("actor", "critic")}
        self._steps: dict[str, FusedAdamStep | None] = {role: None for role in ("actor", "critic")}
        self.actor = [p for p in parameters if id(p) not in critic]
        self.critic = [p for p in parameters if id(p) in critic]
        groups = []
        for group in optimizer.param_groups:
            for role in ("actor", "critic"):
                params = [p for p in group["params"] if (id(p) in critic) == (role == "critic")]
                if params:
                    groups.append({**group, "params": params, "role": role})
        # In place: an optimizer that wraps another one shares its list
        optimizer.param_groups[:] = groups

    def gradient(self, role: str) -> "FlatGradient":
        """:return: the gradient of the actor's or the critic's parameters; those without ``grad`` are not part of it"""
        present = [p for p in getattr(self, role) if p.grad is not None]
        if not self._gradients[role].is_that_of(present):
            self._gradients[role] = FlatGradient(present)
        return self._gradients[role]

    def zero_grad(self, *roles: str) -> None:
        """Set gradients to zero. Frozen parameters have none."""
        for role in roles:
            for parameter in getattr(self, role):
                if not parameter.requires_grad:
                    parameter.grad = None
            self.gradient(role).zero()

    def step(self, *roles: str) -> None:
        """Make a step of the optimizer with the parameters of some roles."""
        optimizer = self._optimizer
        steps = [self._fused_adam_step(role) for role in roles] if _is_plain_fused_adam(optimizer) else [None]
        if None not in steps:
            for step in steps:
                step()  # type: ignore[misc]
            return
        groups = [*optimizer.param_groups]
        optimizer.param_groups[:] = [group for group in groups if group["role"] in roles]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups[:] = groups

    def _fused_adam_step(self, role: str) -> "FusedAdamStep | None":
        step, gradient = self._steps[role], self.gradient(role)
        if step is None or not step.is_current(self._optimizer, gradient):
            # Before its first step with a gradient, a parameter has no averages
            begun = all(self._optimizer.state.get(parameter) for parameter in gradient.parameters)
            step = self._steps[role] = FusedAdamStep(self._optimizer, role, gradient) if begun else None
        return step


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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # PyTorch's fused step is wrong for parts of a larger tensor
    dense_on_cpu = all(p.is_cpu and p.stride() == _dense_stride(p) for p in parameters)
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or not dense_on_cpu or not FUSED_ADAM_ON_CPU:
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
        that each part of N steps or more has steps of all environments: step t of environment i has the index t N + i
    """
    at_least = -(-n_steps // LARGEST_CRITIC_BATCH)
    return next(n for n in itertools.count(at_least) if math.gcd(n, n_envs) == 1)


def _dense_stride(parameter: th.Tensor) -> tuple[int, ...]:
    """:return: the strides of the parameter; those of a copy without gaps if it is a part of a larger tensor"""
    return th.empty_like(parameter, device="meta").stride()


class FlatGradient:
    """
    ``grad`` of some parameters as one piece of memory (for each device and type): an operation on the gradient of a small
    network takes as long as one on the gradient of a layer.

    :param parameters: the parameters, each with ``grad``, which is copied
    """

    def __init__(self, parameters: Sequence[th.nn.Parameter]):
        self.parameters = parameters
        groups = defaultdict(list)
        for parameter in parameters:
            groups[parameter.device, parameter.dtype].append(parameter)
        self._pieces: list[th.Tensor] = []
        for (device, dtype), group in groups.items():
            sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in group]
            piece = th.zeros(sum(sizes), device=device, dtype=dtype)
            for parameter, part in zip(group, piece.split(sizes)):
                # Optimizers expect gradient and parameter to have the same memory layout
                view = part.as_strided(parameter.shape, _dense_stride(parameter), part.storage_offset())
                parameter.grad = view.copy_(parameter.grad)
            self._pieces.append(piece)
        self._views: list[Any] = [parameter.grad for parameter in parameters]
        # A conversion of the policy replaces the memory of the same object
        self._memory = [view.data_ptr() for view in self._views]

    def is_that_of(self, parameters: Sequence[th.nn.Parameter]) -> bool:
        """Whether it is ``grad`` of exactly these parameters."""
        if len(parameters) != len(self.parameters):
            return False
        same = all(p is q and p.grad is view for p, q, view in zip(parameters, self.parameters, self._views))
        return same and self._memory == [view.data_ptr() for view in self._views]

    def zero(self) -> None:
        """Set it to zero."""
        for piece in self._pieces:
            piece.zero_()

    def clip(self, max_norm: float | None) -> float:
        """:return: its norm before it was clipped to ``max_norm`` (None: not clipped)"""
        norm = math.hypot(*(float(th.linalg.vector_norm(piece)) for piece in self._pieces))
        if max_norm is not None and norm > max_norm:
            for piece in self._pieces:
                piece *= max_norm / (norm + 1e-6)
        return norm


def _is_plain_fused_adam(optimizer: th.optim.Optimizer) -> bool:
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    hooks = own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    if hooks or type(optimizer) is not th.optim.Adam or "step" in vars(optimizer):
        return False
    other_variants = ("amsgrad", "decoupled_weight_decay")
    return all(group["fused"] and not any(map(group.get, other_variants)) for group in optimizer.param_groups)


class FusedAdamStep:
    """
    A step of :class:`torch.optim.Adam`: its fused function without what ``step()`` does around it.

    :param optimizer: the optimizer, which has made a step with these parameters before
    :param role: role of the parameters
    :param gradient: their gradient
    """

    def __init__(self, optimizer: th.optim.Optimizer, role: str, gradient: FlatGradient):
        self._gradient, self._role = gradient, role
        self._groups: list[tuple[dict[str, Any], th.Tensor, Any]] = []
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and group["role"] == role]
            if not parameters:
                continue
            states = [optimizer.state[p] for p in parameters]
            # The numbers of steps are one piece of memory, too
            counts = th.stack([state["step"] for state in states])
            for state, count in zip(states, counts):
                state["step"] = count
            averages = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
            tensors = (parameters, [p.grad for p in parameters], *averages, [], [state["step"] for state in states])
            self._groups.append((group, counts, tensors))
        self._used = self._objects(optimizer)

    def _objects(self, optimizer: th.optim.Optimizer) -> list[Any]:
        """:return: the objects of the optimizer that a step uses"""
        objects = []
        for group in optimizer.param_groups:
            if group["role"] == self._role:
                objects.append(group)
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    objects += [parameter, *map(state.get, ("step", "exp_avg", "exp_avg_sq"))]
        return objects

    def is_current(self, optimizer: th.optim.Optimizer, gradient: FlatGradient) -> bool:
        """Whether it is a step with this gradient, and the optimizer's groups and state are the same objects as before."""
        if gradient is not self._gradient:
            return False
        objects = self._objects(optimizer)
        return len(objects) == len(self._used) and all(map(operator.is_, objects, self._used))

    @th.no_grad()
    def __call__(self) -> None:
        for group, counts, tensors in self._groups:
            counts += 1
            beta1, beta2 = group["betas"]
            keywords = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            th._fused_adam_(*tensors, beta1=beta1, beta2=beta2, **keywords)
