"""Callback that starts swing-up episodes at random pole angles early in training."""

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.common.checks import check_number
from sb3_vpg.common.progress_bar import progress_of
from sb3_vpg.envs.cartpole_swingup import START_STD


class ExploringStarts(BaseCallback):
    """
    Starts the episodes of a swing-up at random pole angles, and returns to the environment's own start during training.

    A policy that always starts with the pole hanging rarely sees the pole upright. With exploring starts (Sutton & Barto,
    2018, section 5.3) it learns to balance first, and to swing up last. The last part of training uses the environment's own
    start, and so should evaluations.

    The standard deviation of the start state is ``std`` until the fraction ``hold`` of training, and then decreases linearly
    to the environment's own value, which it reaches at the fraction ``end``. It is updated before each rollout, and applies
    to episodes that start after that. When training ends, but not after an error, the environment's own start is restored.

    :param std: Initial standard deviations of position [m], velocity [m/s], angle [rad] and angular velocity [rad/s], >= 0.
        The default, pi for the angle, covers all angles.
    :param hold: Fraction of training after which the standard deviation starts to decrease, in [0, ``end``]. Typical: 0.2 to
        0.5. Larger: more training on balancing, less on swinging up.
    :param end: Fraction of training after which the environment's own start is used, in [``hold``, 1]. Typical: 0.6 to 0.9.
    :raises ValueError: if a number is outside these ranges; when training starts, if the environments have no such start
    """

    def __init__(
        self,
        std: Sequence[float] = (START_STD, START_STD, math.pi, START_STD),
        hold: float = 0.4,
        end: float = 0.8,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if np.shape(std) != (4,):
            raise ValueError(f"std={std!r} is not allowed; it must be four numbers >= 0")
        for number in std:
            check_number("std", number, low=0)
        check_number("end", end, low=0, high=1)
        check_number("hold", hold, low=0, high=end)
        self.std = std
        self.hold = hold
        self.end = end

    def _on_training_start(self) -> None:
        if not self.training_env.has_attr("set_start_std"):
            raise ValueError("ExploringStarts needs environments with set_start_std(), as CartPoleSwingUp")

    def _on_rollout_start(self) -> None:
        self._set_start_std(np.interp(progress_of(self.model), [self.hold, self.end], [1.0, 0.0]))

    def _on_training_end(self) -> None:
        # The zoo calls this after an error, too: the processes may have exited, or the environments have no such start
        with suppress(AttributeError, NotImplementedError, OSError, EOFError):
            self._set_start_std(0.0)

    def _set_start_std(self, weight: float) -> None:
        """:param weight: 1 for ``std``, 0 for the environment's own value"""
        self.training_env.env_method("set_start_std", [START_STD + weight * (std - START_STD) for std in self.std])

    def _on_step(self) -> bool:
        return True
