"""Inputs of policies: observations, and action masks in sb3-contrib's convention."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples, TensorDict
from stable_baselines3.common.vec_env import VecEnv

METHOD = "action_masks"
In = TypeVar("In")
Out = TypeVar("Out")


def map_obs(function: Callable[[In], Out], obs: In | dict[str, In]) -> Out | dict[str, Out]:
    """Apply ``function`` to an array observation, or to each entry of a Dict observation."""
    if isinstance(obs, dict):
        return {key: function(value) for key, value in obs.items()}
    return function(obs)


def pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """``numpy.empty`` in page-locked memory, from which a GPU copies faster. PyTorch keeps such memory and uses it again."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return th.empty(n_bytes, dtype=th.uint8, device="cpu", pin_memory=True).numpy().view(dtype).reshape(shape)


def is_vector_space(space: spaces.Space) -> bool:
    """:return: whether elements of the space are numbers without a further meaning: a Box that is no image"""
    return isinstance(space, spaces.Box) and not is_image_space(space)


def stored_dtype(space: spaces.Space) -> Any:
    """
    :return: dtype in which a buffer stores elements of the space: at least single precision for a Box that is no image.
        VecNormalize and Gaussian policies make such numbers of all others, and do not change the space
    """
    return np.float32 if is_vector_space(space) and space.dtype != np.float64 else space.dtype


class SamplesWithInputs(NamedTuple):
    """
    SB3's ``RolloutBufferSamples`` for a policy with further inputs.

    :param inputs: by keyword of the policy's methods, tensors of shape (n, ...)
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    inputs: dict[str, th.Tensor]


class ValueSamples(NamedTuple):
    """What the value regression needs of a batch, see :class:`SamplesWithInputs`."""

    observations: th.Tensor | TensorDict
    returns: th.Tensor
    inputs: dict[str, th.Tensor]


Samples = RolloutBufferSamples | DictRolloutBufferSamples | SamplesWithInputs


def inputs_of(batch: Samples | ValueSamples) -> dict[str, th.Tensor]:
    """:return: further inputs of the policy in a batch, by keyword of its methods"""
    if hasattr(batch, METHOD):
        # A batch of sb3-contrib's buffers
        return {METHOD: batch.action_masks}  # type: ignore[union-attr]
    return getattr(batch, "inputs", {})


def is_maskable(policy: BasePolicy) -> bool:
    """:return: whether the policy has action masks in sb3-contrib's form"""
    return hasattr(getattr(policy, "action_dist", None), "apply_masking")


def mask_sizes(action_space: spaces.Space) -> list[int]:
    """
    :param action_space: Discrete; MultiDiscrete or MultiBinary with one dimension
    :return: for each dimension of an action, the number of its values. A mask has an entry for each value
    :raises ValueError: if the space cannot be masked
    """
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete) and len(action_space.shape) == 1:
        return action_space.nvec.tolist()
    if isinstance(action_space, spaces.MultiBinary) and len(action_space.shape) == 1:
        return [2] * action_space.shape[0]
    raise ValueError(
        f"{action_space} cannot be masked; allowed: Discrete, and MultiDiscrete or MultiBinary with one dimension"
    )


def check_has_masks(env: VecEnv) -> None:
    """:raises ValueError: if the environments have no method ``action_masks()``"""
    if not env.has_attr(METHOD):
        raise ValueError(
            "The environment has no method action_masks(): add it, or a wrapper such as "
            "sb3_contrib.common.wrappers.ActionMasker (env_wrapper in the zoo), or use learn(use_masking=False)"
        )


def action_masks_of(env: VecEnv, action_space: spaces.Space) -> dict[str, np.ndarray]:
    """
    :param env: environments with a method ``action_masks()``, which returns one boolean for each action
    :param action_space: space of the actions
    :return: "action_masks", bool, shape (N, entries of a mask); True: the action is allowed
    :raises ValueError: if a mask has a wrong size, or allows no action
    """
    return {METHOD: checked_masks(env.env_method(METHOD), env, action_space)}


def checked_masks(masks: Sequence[Any], env: VecEnv, action_space: spaces.Space) -> np.ndarray:
    """
    :param masks: the mask that each of N environments returns
    :return: the masks, see :func:`action_masks_of`. All actions are allowed where the next step is spent on a reset
    """
    sizes = mask_sizes(action_space)
    try:
        checked = np.array(masks, dtype=bool).reshape(len(masks), sum(sizes))
    except (TypeError, ValueError):
        # Lists of different lengths, a wrong size, or no mask
        checked = np.stack([_flat_mask(mask, sum(sizes), env_index, action_space) for env_index, mask in enumerate(masks)])
    checked |= np.reshape(getattr(env, "reset_is_due", False), (-1, 1))
    for part in np.split(checked, np.cumsum(sizes)[:-1], axis=1):
        allowed = part.any(axis=1)
        if not allowed.all():
            raise ValueError(f"action_masks() of environment {int(np.argmin(allowed))} allows no action")
    return checked


def _flat_mask(mask: Any, size: int, env_index: int, action_space: spaces.Space) -> np.ndarray:
    """:return: a mask that may have a list for each dimension of an action, as one array"""
    try:
        flat = np.concatenate([np.ravel(part) for part in mask]).astype(bool)
    except (TypeError, ValueError):
        raise ValueError(
            f"action_masks() of environment {env_index} returned {mask!r}; {action_space} needs {size} booleans"
        ) from None
    if len(flat) != size:
        raise ValueError(f"action_masks() of environment {env_index} has {len(flat)} entries; {action_space} needs {size}")
    return flat
