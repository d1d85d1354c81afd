"""gymnasium's vectorized CartPole, with the behavior of separate environments."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode

from sb3_vpg.envs.vector import SeparatelySeededVectorEnv, final_observations


class SameStepCartPoleVectorEnv(CartPoleVectorEnv, SeparatelySeededVectorEnv):
    """
    ``CartPoleVectorEnv`` with two differences: autoreset happens in the step that ends an episode, and each environment has
    its own random generator. With the same seeds and actions, observations are those of separate ``CartPole-v1``
    environments.

    The keyword arguments are those of ``CartPoleVectorEnv``.
    """

    state: npt.NDArray[np.float64]  # type: ignore[assignment]
    metadata = {**CartPoleVectorEnv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        self.seed_generators(seed)
        _, infos = super().reset(options=options)
        self._start(np.arange(self.num_envs))
        # The options apply to this reset only
        self.low, self.high = -0.05, 0.05
        return self.state.T.astype(np.float32), infos

    def step(
        self, action: npt.NDArray[np.integer[Any]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = super().step(action)
        ended = self.prev_done
        if ended.any():
            infos |= final_observations(observations, ended)
            indices = ended.nonzero()[0]
            self._start(indices)
            observations[indices] = self.state[:, indices].T
            # The base class must not reset these environments in the next step
            self.prev_done = np.zeros(self.num_envs, dtype=bool)
        return observations, rewards, terminated, truncated, infos

    def _start(self, indices: npt.NDArray[np.integer[Any]]) -> None:
        """Start a new episode in these environments."""
        for i in indices:
            self.state[:, i] = self.generators[i].uniform(self.low, self.high, 4)
        self.steps[indices] = 0
