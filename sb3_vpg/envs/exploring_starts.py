"""Callback that starts swing-up episodes at random pole angles early in training."""

import math
from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.envs.cartpole_swingup import START_STD


class ExploringStarts(BaseCallback):
    """
    Starts the episodes of a swing-up at random pole angles, and returns to the environment's own start during training.

    A policy that always starts with the pole hanging rarely sees the pole upright. With exploring starts (Sutton & Barto,
    2018, section 5.3) it learns to balance first, and to swing up last. The last part of training uses the environment's own
    start, and so should evaluations.

    The standard deviation of the start state is ``std`` until the fraction ``hold`` of training, and then decreases linearly
    to the environment's own value, which it reaches at the fraction ``end``. It is updated before each rollout, and applies
    to episodes that start after that. When training ends, the environment's own start is restored.

    :param std: Initial standard deviations of position [m], velocity [m/s], angle [rad] and angular velocity [rad/s], >= 0.
        The default, pi for the angle, covers all angles.
    :param hold: Fraction of training after which the standard deviation starts to decrease, in [0, ``end``]. Typical: 0.2 to
        0.5. Larger: more training on balancing, less on swinging up.
    :param end: Fraction of training after which the environment's own start is used, in [``hold``, 1]. Typical: 0.6 to 0.9.
    :raises ValueError: if the fractions are outside these ranges
    """

    def __init__(
        self,
        std: Sequence[float] = (START_STD, START_STD, math.pi, START_STD),
        hold: float = 0.4,
        end: float = 0.8,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if not 0 <= hold <= end <= 1:
            raise ValueError(f"hold={hold}, end={end} is not allowed; it must be 0 <= hold <= end <= 1")
        self.std = std
        self.hold = hold
        self.end = end

    def _on_rollout_start(self) -> None:
        progress = 1.0 - self.model._current_progress_remaining
        self._set_start_std(np.interp(progress, [self.hold, self.end], [1.0, 0.0]))

    def _on_training_end(self) -> None:
        self._set_start_std(0.0)

    def _set_start_std(self, weight: float) -> None:
        """:param weight: 1 for ``std``, 0 for the environment's own value"""
        self.training_env.env_method("set_start_std", [START_STD + weight * (std - START_STD) for std in self.std])

    def _on_step(self) -> bool:
        return True
