"""SB3's interface for EnvPool, which steps environments written in C++ in several threads."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor

from sb3_vpg.envs.envpool_equivalent import find_equivalent
from sb3_vpg.envs.envpool_vector import EnvPoolVectorEnv, check_options, check_seed, make_vector_env
from sb3_vpg.envs.native_vec_env import NativeVecEnv, StandInEnv, check_not_empty


class EnvPoolVecEnv(NativeVecEnv):
    """
    Steps all environments at once in `EnvPool <https://envpool.readthedocs.io>`_, in C++ threads, for every algorithm: ::

        make_vec_env("HalfCheetah-v5", n_envs=64, vec_env_cls=EnvPoolVecEnv)
        make_atari_env("PongNoFrameskip-v4", n_envs=8, vec_env_cls=EnvPoolVecEnv)
        EnvPoolVecEnv("HalfCheetah-v5", n_envs=64, seed=0, num_threads=1)

    The tasks are those of gymnasium, the random numbers are not: the same seed gives other episodes. Evaluate on gymnasium's
    environments. The page "EnvPool" of the documentation lists which environments were compared, and what differs.

    Observable behavior is that of :class:`NativeVecEnv`, with these differences:

    - Infos have no entries of the environment, unless ``Monitor(info_keywords=...)`` names them.
      ``vector_env.last_infos`` has EnvPool's infos of the last step, as arrays.
    - Attributes of single environments cannot be read, and there are no pictures.
    - A copy or an unpickled object creates new environments in ``reset()``.
    - Random states cannot be stored: a resumed run draws other random numbers.

    If functions are given, the environments that they return provide spec, time limit, monitor and wrappers; they are not
    stepped. Keyword arguments of the environment are passed on if EnvPool has them (``healthy_z_range=(0.8, 2)`` becomes
    ``healthy_z_min`` and ``healthy_z_max``). Wrappers can be ``Monitor``, ``TimeLimit``, gymnasium's checks, SB3's Atari
    wrappers, and observation wrappers (which are applied to each environment in Python). All else is an error.

    :param env_fns: functions that return the environments, as for ``DummyVecEnv``; or an id, such as "HalfCheetah-v5". If
        EnvPool and gymnasium know the id, time limit and, where EnvPool's fit, spaces are gymnasium's.
    :param n_envs: number of environments, with an id only. Typical range: 8 to 256
    :param seed: seed of the first reset, at least 0; environment i gets ``(seed + i) % 2**31``. None: random, or the one given
        to ``seed()``
    :param num_threads: number of threads, at least 1. None: as many as processors. 1 is often best for small batches of fast
        environments
    :param options: options of the environment in EnvPool, such as ``frame_skip`` or ``stack_num``
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if EnvPool has no equivalent of the given environments, or an argument is not allowed
    """

    vector_env: EnvPoolVectorEnv

    def __new__(cls, *_: Any, **__: Any) -> "EnvPoolVecEnv":
        return object.__new__(cls)

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]] | str,
        n_envs: int | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
        **options: Any,
    ):
        if isinstance(env_fns, str):
            self.vector_env = make_vector_env(env_fns, 1 if n_envs is None else n_envs, num_threads, **options)
            self.envs = [Monitor(StandInEnv(self.vector_env)) for _ in range(self.vector_env.num_envs)]
            self._raw_game_in_monitor = {"reward", "terminated"} <= self.vector_env.available_infos
        elif n_envs is not None:
            raise ValueError(f"n_envs={n_envs} is allowed with an id only, not with functions that return environments")
        else:
            check_not_empty(env_fns)
            self.envs = [fn() for fn in env_fns]
            task = find_equivalent(self.envs)
            check_options(task.task_id, options)
            self.vector_env = EnvPoolVectorEnv(
                task.task_id,
                len(self.envs),
                num_threads,
                task.time_limit,
                task.observation_space,
                task.action_space,
                task.observation_wrappers,
                **{**task.options, **options},
            )
            self.vector_env.spec = self.envs[0].spec
            self._raw_game_in_monitor = task.raw_game_in_monitor
            if task.raw_game_in_monitor:
                self.monitored_steps = self.vector_env.options["frame_skip"]
        super().__init__([])
        info_keys = {key for monitor in self._monitors if monitor is not None for key in monitor.info_keywords}
        self.vector_env.return_infos(info_keys)
        if seed is not None:
            self.seed(seed)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        if seed is not None:
            check_seed(seed)
        return super().seed(seed)

    def _within_monitor(
        self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self._raw_game_in_monitor:
            return super()._within_monitor(rewards, terminated, truncated)
        # Before rewards are clipped, and until the game is over
        infos = self.vector_env.last_infos
        return infos["reward"], truncated | (terminated & infos["terminated"].astype(bool))
