"""
SB3 vectorised environments over natively vectorised gymnasium environments: many environments in one array.
"""

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_vpg.envs.cartpole import SameStepCartPoleVectorEnv
from sb3_vpg.envs.vector import SeparatelySeededVectorEnv

# Vectorised environments that gymnasium offers with next-step autoreset only, and what stands in for them
SAME_STEP_FORMS: dict[type[VectorEnv], type[VectorEnv]] = {CartPoleVectorEnv: SameStepCartPoleVectorEnv}
# Wrappers whose effect the vectorised environment or NativeVecEnv itself has
KNOWN_WRAPPERS = (Monitor, TimeLimit, OrderEnforcing, PassiveEnvChecker)
# What the infos of a vectorised environment tell of episodes that have just ended
OF_LAST_EPISODE = frozenset({"final_obs", "_final_obs", "final_info", "_final_info"})


class NoVectorFormError(Exception):
    """There is no vectorised environment that behaves as the given ones do; the message says why."""


class NativeVecEnv(VecEnv):
    """
    Steps all environments at once in a natively vectorised environment, where gymnasium's registry names one
    (``vector_entry_point``: ``CartPole-v1`` and the swing-ups have it). To be used as SB3's ``DummyVecEnv``, whose observable
    behaviour it has: ::

        make_vec_env("CartPoleSwingUp-v0", n_envs=128, vec_env_cls=NativeVecEnv)

    Episodes begin anew in the step that ends them, ``infos[i]`` then has "terminal_observation", "TimeLimit.truncated" and,
    under a ``Monitor``, "episode"; monitor files are written. With the same seeds and actions the observations are those of
    ``DummyVecEnv``. The environments that are given lend their spec, time limit and monitor; they themselves do not move.

    Where the environment or one of its wrappers has no vectorised form, the result *is* a ``DummyVecEnv``, and a warning says
    why. To differ by environment is not possible: ``set_attr``, ``env_method`` and options are for all.

    The info of an environment whose episode goes on is the same object at each step: copy it before you change it.

    :param env_fns: functions that return the environments, as for ``DummyVecEnv``
    """

    def __new__(cls, env_fns: Sequence[Callable[[], gym.Env]] | None = None) -> "VecEnv":  # type: ignore[misc]
        # Without arguments where it is copied or unpickled
        native = super().__new__(cls)
        if env_fns is not None:
            envs = [fn() for fn in env_fns]
            try:
                native.vector_env = make_vector_form(envs)
            except NoVectorFormError as reason:
                warnings.warn(f"NativeVecEnv falls back to DummyVecEnv: {reason}.", stacklevel=3)
                return DummyVecEnv([lambda env=env: env for env in envs])  # type: ignore[misc]
            native.envs = envs
        return native

    #: The vectorised environment
    vector_env: VectorEnv
    #: The environments that were given; they do not move
    envs: list[gym.Env]

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]):
        super().__init__(len(self.envs), self.vector_env.single_observation_space, self.vector_env.single_action_space)
        self.metadata = self.vector_env.metadata
        self._monitors = [next((w for w in wrappers_of(env) if isinstance(w, Monitor)), None) for env in self.envs]
        self._running_infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._was_reset = False

    def reset(self) -> VecEnvObs:
        if any(options != self._options[0] for options in self._options):
            raise ValueError("NativeVecEnv takes the same options for all environments only, use DummyVecEnv for others")
        if any(monitor is not None and not monitor.allow_early_resets for monitor in self._monitors) and self._was_reset:
            raise RuntimeError("Tried to reset an environment before done, which Monitor(allow_early_resets=False) forbids")
        # SB3 seeds environment i with seed + i
        observations, infos = self.vector_env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [info_of(infos, i) for i in range(self.num_envs)]
        self._returns[:], self._lengths[:] = 0.0, 0
        self._was_reset = True
        return copy.deepcopy(observations)

    def step_async(self, actions: np.ndarray) -> None:
        if not self._was_reset:
            raise RuntimeError("Tried to step environments that need a reset: call reset() first")
        self._actions = np.asarray(actions)

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated, infos = self.vector_env.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        dones = terminated | truncated
        step_infos = self._running_infos.copy()
        if not infos.keys() <= OF_LAST_EPISODE:
            step_infos = [{**running, **info_of(infos, i)} for i, running in enumerate(step_infos)]
        if dones.any():
            self._end_episodes(dones.nonzero()[0], terminated, infos, step_infos)
        # As DummyVecEnv: a copy, since the vectorized environment may use its arrays again
        return copy.deepcopy(observations), rewards.astype(np.float32), dones, step_infos

    def _end_episodes(
        self, ended: np.ndarray, terminated: np.ndarray, infos: dict[str, Any], step_infos: list[dict[str, Any]]
    ) -> None:
        """Make the infos of episodes that have ended, with what ``Monitor`` adds."""
        now = time.time()
        final_infos = infos.get("final_info", {})
        columns = (ended, terminated[ended], self._returns[ended], self._lengths[ended])
        for i, was_terminated, episode_return, length in zip(*(column.tolist() for column in columns)):
            self.reset_infos[i] = info_of(infos, i)
            info = step_infos[i] = info_of(final_infos, i)
            info["TimeLimit.truncated"] = not was_terminated
            info["terminal_observation"] = copy.deepcopy(infos["final_obs"][i])
            monitor = self._monitors[i]
            if monitor is not None:
                episode = {"r": round(episode_return, 6), "l": length, "t": round(now - monitor.t_start, 6)}
                episode.update((key, info[key]) for key in monitor.info_keywords)
                if monitor.results_writer:
                    monitor.results_writer.write_row(episode)
                info["episode"] = episode
        self._returns[ended], self._lengths[ended] = 0.0, 0

    def close(self) -> None:
        self.vector_env.close()
        for env in self.envs:
            env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.vector_env.render() or [None] * self.num_envs  # type: ignore[return-value]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        An attribute of the vectorised environment that has one value for all environments, or "np_random", the generators of
        the environments.

        :raises AttributeError: if it has no such attribute, or it is an array, or one generator for all
        """
        if attr_name == "np_random" and isinstance(self.vector_env, SeparatelySeededVectorEnv):
            return [self.vector_env.generators[i] for i in self._get_indices(indices)]
        # The vectorised environment's own spaces are for all environments together
        prefix = "single_" if attr_name in ("observation_space", "action_space") else ""
        value = getattr(self.vector_env, prefix + attr_name)
        if isinstance(value, np.ndarray | np.random.Generator):
            kind = "array" if isinstance(value, np.ndarray) else "generator"
            raise AttributeError(
                f"{attr_name!r} is one {kind} for all environments: read `vector_env.{attr_name}` of NativeVecEnv instead"
            )
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of the vectorised environment, or "np_random", the generators of the environments that are meant.

        :raises AttributeError: if it has no such attribute
        :raises NotImplementedError: if not all environments are meant
        """
        if attr_name == "np_random" and isinstance(self.vector_env, SeparatelySeededVectorEnv):
            for i in self._get_indices(indices):
                self.vector_env.generators[i] = value
            return
        self._refuse_some(f"set {attr_name!r}", indices)
        if not hasattr(self.vector_env, attr_name):
            raise AttributeError(f"{self.vector_env} has no attribute {attr_name!r}")
        setattr(self.vector_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method that the vectorised environment has for all environments together, such as ``set_start_std`` of the
        swing-ups.

        :return: what it returns, for each environment the same
        :raises NotImplementedError: if there is no such method, or it is one of every vectorised environment (such as
            ``reset``), or not all environments are meant
        """
        method = getattr(self.vector_env, method_name, None)
        if not callable(method) or hasattr(VectorEnv, method_name):
            raise NotImplementedError(
                f"NativeVecEnv has no single environments to call {method_name!r} on: all are in one array. "
                "Call a method of `vector_env`, or use DummyVecEnv"
            )
        self._refuse_some(f"call {method_name!r}", indices)
        return [method(*method_args, **method_kwargs)] * self.num_envs

    def _refuse_some(self, what: str, indices: VecEnvIndices) -> None:
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise NotImplementedError(f"NativeVecEnv can {what} for all environments only; use DummyVecEnv")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [is_wrapped(self.envs[i], wrapper_class) for i in self._get_indices(indices)]


def wrappers_of(env: gym.Env) -> Iterator[gym.Wrapper]:
    """:return: the wrappers around an environment, from outside to inside"""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def make_vector_form(envs: Sequence[gym.Env]) -> VectorEnv:
    """
    :param envs: single environments, wrapped
    :return: one vectorised environment with same-step autoreset that behaves as they do
    :raises NoVectorFormError: if there is none
    """
    spec = envs[0].unwrapped.spec
    if spec is None or spec.vector_entry_point is None:
        raise NoVectorFormError(f"{envs[0].unwrapped} has no vectorised form (vector_entry_point)")
    for env in envs:
        if env.unwrapped.spec is None or (env.unwrapped.spec.id, env.unwrapped.spec.kwargs) != (spec.id, spec.kwargs):
            raise NoVectorFormError(f"the environments differ: {env.unwrapped.spec}, {spec}")
        for wrapper in wrappers_of(env):
            # rl_zoo3 puts a TimeLimit of its own in place of gymnasium's, maybe after KNOWN_WRAPPERS was made
            if type(wrapper) not in (*KNOWN_WRAPPERS, gym.wrappers.TimeLimit):
                raise NoVectorFormError(f"the wrapper {type(wrapper).__name__} has no vectorised form")
            if isinstance(wrapper, Monitor) and wrapper.reset_keywords:
                raise NoVectorFormError("Monitor(reset_keywords=...) has no vectorised form")
    limits = {tuple(w._max_episode_steps for w in wrappers_of(env) if isinstance(w, TimeLimit)) for env in envs}
    if len(limits) > 1 or len(limit := limits.pop()) != 1:
        raise NoVectorFormError("the environments must have one and the same time limit")
    if spec.kwargs.get("render_mode") == "human":
        raise NoVectorFormError("render_mode='human' is for single environments")

    entry_point = spec.vector_entry_point
    creator: Any = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    creator = SAME_STEP_FORMS.get(creator, creator)
    kwargs = {**spec.kwargs, "max_episode_steps": limit[0]}
    if "autoreset_mode" in inspect.signature(creator).parameters:
        kwargs["autoreset_mode"] = AutoresetMode.SAME_STEP
    try:
        inspect.signature(creator).bind(num_envs=len(envs), **kwargs)
    except TypeError as error:
        raise NoVectorFormError(f"the vectorised form of {spec.id} does not take the same arguments: {error}") from error
    vector_env = creator(num_envs=len(envs), **kwargs)
    if vector_env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        vector_env.close()
        raise NoVectorFormError(f"{type(vector_env).__name__} cannot begin a new episode in the step that ends the last one")
    vector_env.spec = spec
    return vector_env


def info_of(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """
    :param infos: infos of a vectorised gymnasium environment, a dict of arrays
    :param i: index of an environment
    :return: the info of that environment, without what is told of its last episode
    """
    if infos.keys() <= OF_LAST_EPISODE:
        return {}
    return {
        key: info_of(value, i) if isinstance(value, dict) else value[i]
        for key, value in infos.items()
        if key not in OF_LAST_EPISODE
        and not (key[:1] == "_" and key[1:] in infos)
        and (f"_{key}" not in infos or infos[f"_{key}"][i])
    }
