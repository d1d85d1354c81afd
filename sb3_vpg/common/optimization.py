"""Which parameters are the actor's and which the critic's, and what the optimizer does with them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch as th
from gymnasium.vector.utils import create_empty_array
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_vpg.common.policy_runner import forgetting_distributions

# Since PyTorch 2.4
FUSED_ADAM_ON_CPU = tuple(map(int, th.__version__.split(".")[:2])) >= (2, 4)


def critic_only_parameters(policy: ActorCriticPolicy) -> set[int]:
    """
    :param policy: any actor-critic policy
    :return: ids of the parameters that only the critic uses: those on which the value depends and neither the log probability
        nor the entropy, whether they are frozen or not
    """
    policy.set_training_mode(False)
    parameters = list(policy.parameters())
    zeros = create_empty_array(policy.observation_space, n=1, fn=np.zeros)
    obs = obs_as_tensor(zeros, policy.device)  # type: ignore[arg-type]

    def depends(output: th.Tensor) -> list[bool]:
        if not output.requires_grad:
            return [False] * len(parameters)
        gradients = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in gradients]

    with forgetting_distributions(policy), unfrozen(parameters), th.enable_grad():
        action = policy._predict(obs, deterministic=True).detach()
        values, log_prob, entropy = policy.evaluate_actions(obs, action)
        in_value = depends(values.sum())
        in_actor = depends(log_prob.sum() + (0.0 if entropy is None else entropy.sum()))
    return {id(p) for p, value, actor in zip(parameters, in_value, in_actor) if value and not actor}


@contextmanager
def unfrozen(parameters: Iterable[th.nn.Parameter]) -> Iterator[None]:
    """In this context all parameters require gradients, the frozen ones too."""
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def split_parameter_groups(optimizer: th.optim.Optimizer, critic: set[int]) -> None:
    """
    Split each parameter group of the optimizer into one with ``role`` "actor" and one with ``role`` "critic".

    :param optimizer: any optimizer, split before or not
    :param critic: ids of the parameters of the critic
    """
    groups = []
    for group in optimizer.param_groups:
        for role in ("actor", "critic"):
            params = [p for p in group["params"] if (id(p) in critic) == (role == "critic")]
            if params:
                groups.append({**group, "params": params, "role": role})
    optimizer.param_groups = groups


def set_learning_rates(optimizer: th.optim.Optimizer, learning_rates: dict[str, float]) -> None:
    """
    :param optimizer: split by :func:`split_parameter_groups`
    :param learning_rates: of "actor" and "critic"
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rates[group["role"]]


def check_trainable(parameters: Iterable[th.nn.Parameter]) -> None:
    """:raises ValueError: if all of the parameters are frozen"""
    if not any(p.requires_grad for p in parameters):
        raise ValueError("All parameters that the update trains are frozen (requires_grad=False): unfreeze at least one layer")


def fuse_adam(optimizer: th.optim.Optimizer) -> None:
    """Let Adam on a CPU take its steps in one kernel: the same numbers in a quarter of the time, if networks are small."""
    on_cpu = all(p.is_cpu for group in optimizer.param_groups for p in group["params"])
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or not on_cpu or not FUSED_ADAM_ON_CPU:
        return
    for group in optimizer.param_groups:
        # Unless the user has chosen otherwise
        if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True
