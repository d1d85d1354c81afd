"""What vectorised environments that behave as separate ones have in common."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv

ObsType = TypeVar("ObsType")
ActType = TypeVar("ActType")


class SeparatelySeededVectorEnv(VectorEnv[ObsType, ActType, npt.NDArray[Any]]):
    """A vectorised environment with one random generator for each of its environments."""

    _generators: list[np.random.Generator]

    def seed_generators(self, seed: int | Sequence[int | None] | None) -> None:
        """
        :param seed: environment i gets ``seed + i``, or ``seed[i]`` of a list; None leaves its generator as it is, or gives it
            one with a random seed at first
        :raises ValueError: if the list has another length than there are environments
        """
        if not isinstance(seed, Sequence):
            seed = [None if seed is None else seed + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"There must be one seed for each of the {self.num_envs} environments, not {len(seed)}")
        if not hasattr(self, "_generators"):
            self._generators = [seeding.np_random()[0] for _ in range(self.num_envs)]
        for i, one_seed in enumerate(seed):
            if one_seed is not None:
                self._generators[i] = seeding.np_random(one_seed)[0]


def final_observations(observations: npt.NDArray[Any], ended: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
    """
    :param observations: shape (N, ...)
    :param ended: whether the episode has ended, shape (N,)
    :return: infos as gymnasium gives them with same-step autoreset
    """
    final_obs = np.full(len(ended), None, dtype=object)
    for i in ended.nonzero()[0]:
        final_obs[i] = observations[i].copy()
    return {"final_obs": final_obs, "_final_obs": ended}
