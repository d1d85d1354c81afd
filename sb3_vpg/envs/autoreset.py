"""
When vectorized environments reset, and how :class:`~sb3_vpg.envs.native_vec_env.NativeVecEnv` resets them in the step that
ends an episode.

SB3's ``VecEnv`` returns the first observation of an episode together with the last reward of the previous one (same-step
autoreset). gymnasium's vectorized environments have one of three modes, see https://farama.org/Vector-Autoreset-Mode.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import NormalizeReward

# Classes whose `reset(options={"reset_mask": mask})` resets a part of the environments also in the mode NEXT_STEP: vectorized
# environments, and wrappers that pass such a call on. RecordEpisodeStatistics itself counts wrongly then in gymnasium 1.4
WITH_PARTIAL_RESETS = {
    "gymnasium.vector.sync_vector_env.SyncVectorEnv",
    "gymnasium.vector.async_vector_env.AsyncVectorEnv",
    "gymnasium.vector.vector_env.VectorWrapper",
    "gymnasium.vector.vector_env.VectorObservationWrapper",
    "gymnasium.wrappers.vector.array_conversion.ArrayConversion",
    "gymnasium.wrappers.vector.common.RecordEpisodeStatistics",
    "gymnasium.wrappers.vector.rendering.HumanRendering",
    "ale_py.vector_env.AtariVectorEnv",
}


class Reset(NamedTuple):
    """
    What a step returns after the environments whose episodes have ended are reset.

    :param observations: observations of all environments: the first ones of new episodes, shape (N, ...) or a dict of arrays
    :param final_obs: the last observations of the ended episodes, by index of the environment
    :param final_infos: infos of the step, in gymnasium's format
    :param first_infos: infos of the resets, in gymnasium's format
    """

    observations: Any
    final_obs: Any
    final_infos: dict[str, Any]
    first_infos: dict[str, Any]


Autoreset = Callable[[VectorEnv, Any, npt.NDArray[np.bool_], dict[str, Any]], Reset]


def already_reset(vector_env: VectorEnv, observations: Any, ended: npt.NDArray[np.bool_], infos: dict[str, Any]) -> Reset:
    """The vectorized environment has reset them (SAME_STEP)."""
    return Reset(observations, infos["final_obs"], infos.get("final_info", {}), infos)


def reset_by_mask(vector_env: VectorEnv, observations: Any, ended: npt.NDArray[np.bool_], infos: dict[str, Any]) -> Reset:
    """Reset them in one call (DISABLED, and NEXT_STEP of the classes in ``WITH_PARTIAL_RESETS``)."""
    # Copies, since the environments may use the arrays again
    final_obs = {i: observation_of(observations, i) for i in ended.nonzero()[0].tolist()}
    final_infos = copy.deepcopy(infos)
    # A copy of the mask: an environment may keep it
    observations, first_infos = vector_env.reset(options={"reset_mask": ended.copy()})
    return Reset(observations, final_obs, final_infos, first_infos)


def reset_in_next_step(vector_env: VectorEnv, observations: Any, ended: npt.NDArray[np.bool_], infos: dict[str, Any]) -> Reset:
    """They reset in the next step (NEXT_STEP). Until then, the last observation takes the place of the first one."""
    final_obs = {i: observation_of(observations, i) for i in ended.nonzero()[0].tolist()}
    return Reset(observations, final_obs, infos, {})


def autoreset_of(vector_env: VectorEnv) -> Autoreset:
    """
    :param vector_env: a vectorized environment
    :return: the function that resets the environments whose episodes have ended
    :raises ValueError: if the vectorized environment does not say when it resets, or has a wrapper that cannot be reset in
        part and has to be
    """
    # The metadata of ALE belong to the class: they have the mode of the environment that was made last
    mode = getattr(vector_env.unwrapped, "autoreset_mode", vector_env.metadata.get("autoreset_mode"))
    allowed = {AutoresetMode.SAME_STEP: already_reset, AutoresetMode.DISABLED: reset_by_mask}
    allowed[AutoresetMode.NEXT_STEP] = reset_by_mask if has_partial_resets(vector_env) else reset_in_next_step
    if mode not in allowed:
        raise ValueError(
            f"{vector_env} does not say when it resets: metadata['autoreset_mode']={mode!r}; allowed: a value of "
            "gymnasium.vector.AutoresetMode"
        )
    if mode == AutoresetMode.DISABLED and any(isinstance(layer, NormalizeReward) for layer in layers_of(vector_env)):
        raise ValueError(
            "NormalizeReward is not allowed with AutoresetMode.DISABLED: a reset of some environments is one of all for it. "
            "Use SB3's VecNormalize around NativeVecEnv, or AutoresetMode.SAME_STEP"
        )
    return allowed[mode]


def has_partial_resets(vector_env: VectorEnv) -> bool:
    """:return: whether ``reset(options={"reset_mask": mask})`` works in the mode NEXT_STEP"""
    owners = [next(cls for cls in type(layer).__mro__ if "reset" in vars(cls)) for layer in layers_of(vector_env)]
    return all(f"{owner.__module__}.{owner.__qualname__}" in WITH_PARTIAL_RESETS for owner in owners)


def layers_of(vector_env: VectorEnv) -> Iterator[VectorEnv]:
    """:return: the wrappers of a vectorized environment from the outer to the inner ones, and itself"""
    while isinstance(vector_env, VectorWrapper):
        yield vector_env
        vector_env = vector_env.env
    yield vector_env


def observation_of(observations: Any, i: int) -> Any:
    """
    :param observations: shape (N, ...), or a dict of such arrays
    :param i: index of an environment
    :return: a copy of its observation
    """
    if isinstance(observations, dict):
        return {key: observation_of(value, i) for key, value in observations.items()}
    return np.array(observations[i])
