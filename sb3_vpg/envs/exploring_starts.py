"""A callback that lets the episodes of a swing-up begin anywhere at first."""

import math
from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.envs.cartpole_swingup import START_STD


class ExploringStarts(BaseCallback):
    """
    Lets the episodes of a swing-up begin anywhere, pole up or down, and goes back to the environment's own start while the
    training goes on. What a policy that begins with the pole hanging almost never sees, balancing, is then learnt first, and
    how to get there last (exploring starts: Sutton & Barto, 2018, section 5.3). The policy is evaluated from the environment's
    own start, which the last part of the training has, too.

    The standard deviation of the start is ``std`` up to ``hold`` of the training and then goes linearly to the environment's
    own, which it reaches at ``end``. It changes between rollouts, for the episodes that begin after that. When the training
    ends, however it does, the environment has its own start again.

    :param std: Standard deviation at first: of position [m], velocity [m/s], angle [rad] and angular velocity [rad/s]
    :param hold: Share of the training, in [0, ``end``], after which it begins to shrink
    :param end: Share of the training, in [``hold``, 1], after which it is the environment's own
    :raises ValueError: if the shares are others
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
            raise ValueError(f"hold={hold} and end={end} must be 0 <= hold <= end <= 1")
        self.std = std
        self.hold = hold
        self.end = end

    def _on_rollout_start(self) -> None:
        done = 1.0 - self.model._current_progress_remaining
        self._spread(np.interp(done, [self.hold, self.end], [1.0, 0.0]))

    def _on_training_end(self) -> None:
        self._spread(0.0)

    def _spread(self, share: float) -> None:
        self.training_env.env_method("set_start_std", [START_STD + share * (std - START_STD) for std in self.std])

    def _on_step(self) -> bool:
        return True
