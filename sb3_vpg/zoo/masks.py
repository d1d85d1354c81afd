"""
Action masks in the zoo: masked tasks, and evaluation with masks.

The zoo's commands and callbacks call ``predict`` without masks. Therefore the observations of its evaluation environments
carry the masks, where :meth:`MaskableVPG.predict <sb3_vpg.maskable.MaskableVPG.predict>` finds them.
"""

import copy
import functools
from typing import Any

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_vpg.common.policy_inputs import METHOD, action_masks_of
from sb3_vpg.maskable import MaskableVPG

#: sb3-contrib's tasks with masks, by id, and their arguments. In all of them, the observation is the right action
INVALID_ACTION_ENVS: dict[str, dict[str, Any]] = {
    "InvalidActionEnvDiscrete": {"dim": 80, "n_invalid_actions": 60},
    "InvalidActionEnvMultiDiscrete": {"dims": [10, 10], "n_invalid_actions": 10},
    "InvalidActionEnvMultiBinary": {"dims": 10, "n_invalid_actions": 5},
}


class ZooMaskablePPO(MaskablePPO):
    """sb3-contrib's ``MaskablePPO``, for comparison. Its ``predict`` uses the masks that observations carry."""

    predict = MaskableVPG.predict


# Shown by the zoo and on the Hub
ZooMaskablePPO.__name__ = "MaskablePPO"


class WithMasks:
    """Observations of all environments, with their action masks. The environments are asked when these are read."""

    env: VecEnv

    @property
    def action_masks(self) -> np.ndarray:
        return action_masks_of(self.env, self.env.action_space)[METHOD]


class ArrayWithMasks(WithMasks, np.ndarray):
    """Observations as an array."""


class DictWithMasks(WithMasks, dict[str, np.ndarray]):
    """Dict observations."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, np.ndarray]:
        # SB3's policies copy Dict observations. The environments must stay as they are
        return copy.deepcopy(dict(self), memo)


def attach_masks(env: VecEnv) -> VecEnv:
    """
    Let the observations of environments carry the action masks, as the attribute ``action_masks``.

    :param env: environments. It is changed in place: a wrapper would separate ``VecNormalize`` from the statistics of training
    :return: the same environments; unchanged if they have no action masks
    """
    if not env.has_attr(METHOD):
        return env
    # The zoo pickles VecNormalize
    env.reset = functools.partial(_reset, env)  # type: ignore[method-assign]
    env.step_wait = functools.partial(_step_wait, env)  # type: ignore[method-assign]
    return env


def _reset(env: VecEnv) -> VecEnvObs:
    return _with_masks(env, type(env).reset(env))


def _step_wait(env: VecEnv) -> VecEnvStepReturn:
    obs, rewards, dones, infos = type(env).step_wait(env)
    return _with_masks(env, obs), rewards, dones, infos


def _with_masks(env: VecEnv, obs: VecEnvObs) -> VecEnvObs:
    carrier: Any = DictWithMasks(obs) if isinstance(obs, dict) else np.asarray(obs).view(ArrayWithMasks)
    carrier.env = env
    return carrier


def register_invalid_action_envs() -> None:
    """Register sb3-contrib's tasks with masks, such as ``InvalidActionEnvDiscrete-v0``. The best return is 100."""
    for name, kwargs in INVALID_ACTION_ENVS.items():
        if f"{name}-v0" not in gym.registry:
            gym.register(f"{name}-v0", entry_point=f"sb3_contrib.common.envs:{name}", kwargs=kwargs)


class MiniGridActionMasks(gym.Wrapper):
    """
    Masks for MiniGrid: an action is allowed if it changes something. Turning always is. Moving needs a free cell ahead,
    picking up an object and an empty hand, dropping the opposite, toggling a box or a door that is not locked or whose key is
    carried. "Done" is never allowed: not for tasks that end with it, such as GoToDoor and GoToObject.

    :param env: an environment of MiniGrid
    """

    def action_masks(self) -> np.ndarray:
        """:return: for each of the seven actions of MiniGrid, whether it is allowed"""
        env: Any = self.unwrapped
        ahead, carried = env.grid.get(*env.front_pos), env.carrying
        kind = None if ahead is None else ahead.type
        has_key = carried is not None and (carried.type, carried.color) == ("key", getattr(ahead, "color", None))
        allowed = {
            env.actions.left: True,
            env.actions.right: True,
            env.actions.forward: ahead is None or ahead.can_overlap(),
            env.actions.pickup: ahead is not None and ahead.can_pickup() and carried is None,
            env.actions.drop: ahead is None and carried is not None,
            env.actions.toggle: kind == "box" or (kind == "door" and (not ahead.is_locked or has_key)),
            env.actions.done: False,
        }
        return np.array([allowed[action] for action in env.actions])
