"""Base class of vectorized environments that behave like separate environments."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv

ObsType = TypeVar("ObsType")
ActType = TypeVar("ActType")


class SeparatelySeededVectorEnv(VectorEnv[ObsType, ActType, npt.NDArray[Any]]):
    """A vectorized environment with one random generator for each environment."""

    @cached_property
    def generators(self) -> list[np.random.Generator]:
        """The random generators of the environments. Their seeds are random until :meth:`seed_generators` is called."""
        return [seeding.np_random()[0] for _ in range(self.num_envs)]

    def seed_generators(self, seed: int | Sequence[int | None] | None) -> None:
        """
        :param seed: environment i gets ``seed + i``, or ``seed[i]`` of a list; None does not change its generator
        :raises ValueError: if the length of the list is not the number of environments
        """
        if not isinstance(seed, Sequence):
            seed = [None if seed is None else seed + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"There must be one seed for each of the {self.num_envs} environments, not {len(seed)}")
        for i, one_seed in enumerate(seed):
            if one_seed is not None:
                self.generators[i] = seeding.np_random(one_seed)[0]


def final_observations(observations: npt.NDArray[Any], ended: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
    """
    :param observations: shape (N, ...)
    :param ended: whether the episode has ended, shape (N,)
    :return: infos of gymnasium's same-step autoreset: the final observations
    """
    final_obs = np.full(len(ended), None, dtype=object)
    for i in ended.nonzero()[0]:
        final_obs[i] = observations[i].copy()
    return {"final_obs": final_obs, "_final_obs": ended}
