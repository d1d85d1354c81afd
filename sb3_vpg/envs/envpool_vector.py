"""EnvPool's C++ environments as a vectorized gymnasium environment, with same-step autoreset."""

import difflib
import numbers
import os
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from sb3_vpg.envs.autoreset import observation_of

# EnvPool's seeds are less than this
N_SEEDS = 2**31
# Options that this class sets itself
RESERVED = (
    "num_envs",
    "batch_size",
    "num_threads",
    "seed",
    "env_seed",
    "max_num_players",
    "gym_reset_return_info",
    "base_path",
)
# Smaller values end the process in EnvPool's C++ code
AT_LEAST_ONE = ("frame_skip", "frame_stack", "img_height", "img_width", "max_episode_steps", "noop_max", "stack_num")
# What EnvPool takes as a number of a type
NUMBERS: dict[type, Any] = {int: numbers.Integral, float: numbers.Real}


def import_envpool() -> ModuleType:
    """
    :return: the package EnvPool
    :raises ImportError: if it is not installed
    """
    try:
        import envpool
    except ModuleNotFoundError as error:
        if error.name != "envpool":
            raise
        message = "EnvPool is not installed: pip install 'sb3_vpg[envpool]' (Linux or macOS, Python 3.11 or newer)"
        raise ImportError(message) from error
    return envpool


def envpool_options(task_id: str) -> dict[str, Any]:
    """
    :param task_id: id of an environment in EnvPool, such as "HalfCheetah-v5" or "Pong-v5"
    :return: its options and their defaults
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if EnvPool has no environment with this id
    """
    envpool = import_envpool()
    task_ids = envpool.list_all_envs()
    if task_id not in task_ids:
        near = difflib.get_close_matches(task_id, task_ids, n=3)
        hint = f"; similar ids: {', '.join(near)}" if near else ""
        raise ValueError(f"EnvPool has no environment {task_id!r}{hint}. envpool.list_all_envs() gives all ids")
    config = envpool.make_spec(task_id).config
    return {key: value for key, value in zip(config._fields, config) if key not in RESERVED}


def check_options(task_id: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    :param task_id: id of an environment in EnvPool
    :param options: options of the environment
    :return: all options of the environment and their defaults
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if EnvPool has no such environment or option, or if a value is too small or of another type
    """
    defaults = envpool_options(task_id)
    for name, value in options.items():
        if name not in defaults:
            raise ValueError(f"EnvPool's {task_id} has no option {name!r}; it has {', '.join(sorted(defaults))}")
        kind = type(defaults[name])
        if not isinstance(value, NUMBERS.get(kind, kind)):
            raise ValueError(f"{name}={value!r} is not allowed; allowed: {kind.__name__}, such as {defaults[name]!r}")
        if name in AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer of at least 1")
    return defaults


class EnvPoolVectorEnv(VectorEnv[Any, Any, npt.NDArray[Any]]):
    """
    EnvPool's environments, with gymnasium's interface. The environments whose episodes have ended in a step are reset in the
    same step, all in one call. As with gymnasium's ``TimeLimit``, the step at the time limit may be both terminated and
    truncated.

    Environments are created in :meth:`reset`, since EnvPool's seeds are fixed at creation. Copies and pickles do not include
    the state of the environments: a copy needs a reset.

    :param task_id: id of an environment in EnvPool, such as "HalfCheetah-v5" or "Pong-v5"
    :param num_envs: number of environments
    :param num_threads: number of threads that step the environments, at least 1; None for as many as processors
    :param time_limit: maximum number of steps in an episode; None for EnvPool's own limit
    :param observation_space: space of one environment, for its dtype and shape; None for EnvPool's own
    :param action_space: space of one environment; None for EnvPool's own
    :param observation_wrappers: for each environment, wrappers that change its observations, from the innermost to the
        outermost
    :param options: options of the environment in EnvPool, see :func:`envpool_options`
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if an argument is not allowed
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
    # Of the class: older versions of gymnasium close an environment, too, whose __init__ has raised an error
    _pool: Any = None

    def __init__(
        self,
        task_id: str,
        num_envs: int,
        num_threads: int | None = None,
        time_limit: int | None = None,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        observation_wrappers: Sequence[Sequence[gym.ObservationWrapper]] = (),
        **options: Any,
    ):
        #: EnvPool's options of the environment, and their defaults
        self.defaults = check_options(task_id, options)
        for name, value in (("n_envs", num_envs), ("num_threads", num_threads), ("time limit", time_limit)):
            if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer of at least 1")
        self._goes_on_after_life = bool(options.get("episodic_life", False))
        if time_limit is not None and self._goes_on_after_life:
            # EnvPool counts the steps of the game, through all lives
            options, time_limit = {**options, "max_episode_steps": time_limit}, None
        if time_limit is not None:
            # EnvPool does not tell whether the step at its own limit has terminated the episode
            time_limit = min(time_limit, options.get("max_episode_steps", time_limit))
            options = {"max_episode_steps": self.defaults["max_episode_steps"], **options}
            options["max_episode_steps"] = max(options["max_episode_steps"], time_limit + 1)
        self.task_id, self.num_envs, self.time_limit = task_id, num_envs, time_limit
        self.options = {**options, "num_envs": num_envs, "num_threads": num_threads or 0}
        envpool_spec = import_envpool().make_spec(task_id, **self.options)
        if envpool_spec.config.max_num_players != 1:
            raise ValueError(f"EnvPool's {task_id} has several players; SB3 supports one")
        own_observation_space, own_action_space = spaces_of(envpool_spec)
        self._base_space = self._choose_space("observations", own_observation_space, observation_space)
        self._wrappers = observation_wrappers if any(observation_wrappers) else ()
        self.single_observation_space = self._wrappers[0][-1].observation_space if self._wrappers else self._base_space
        self.single_action_space = self._choose_space("actions", own_action_space, action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        #: EnvPool's infos of the last step, arrays of shape (N, ...)
        self.last_infos: dict[str, Any] = {}
        #: Names of all infos that EnvPool has
        self.available_infos = {key.split(":")[1].split(".")[0] for key in envpool_spec._state_keys if key.startswith("info:")}
        self._info_keys: tuple[str, ...] = ()

    def return_infos(self, keys: Iterable[str]) -> None:
        """
        :param keys: names of EnvPool's infos that :meth:`step` will return
        :raises ValueError: if the environment has no such info
        """
        for key in keys:
            if key not in self.available_infos:
                raise ValueError(f"EnvPool's {self.task_id} has no info {key!r}; it has {sorted(self.available_infos)}")
        self._info_keys = tuple(keys)

    def _choose_space(self, kind: str, own: spaces.Space, given: spaces.Space | None) -> spaces.Space:
        if given is None:
            return own
        if not same_layout(own, given):
            raise ValueError(f"EnvPool's {self.task_id} has other {kind} than the given environment: {own} instead of {given}")
        return given

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Reset all environments. New ones are created if there are none yet, or with a seed.

        :param seed: at least 0; environment i gets ``(seed + i) % 2**31``. None continues the random numbers; without a seed
            in the first reset they are random.
        :param options: not supported
        :return: first observations, and an empty dict
        :raises ValueError: if there are options, or the seed is not an integer of at least 0
        """
        if options:
            raise ValueError(f"EnvPool's environments have no reset options: {options}")
        if self._pool is not None or self.closed:
            self._check_pool()
        if seed is None and self._pool is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        if seed is not None:
            check_seed(seed)
            self._pool = None
            self._pool = self._make_pool(seed)
        observations, self.last_infos = self._pool.reset()
        self._steps = np.zeros(self.num_envs, dtype=np.int64)
        return self._convert(observations, range(self.num_envs)), {}

    def _make_pool(self, seed: int) -> Any:
        self._process = os.getpid()
        env_seed = [(int(seed) + i) % N_SEEDS for i in range(self.num_envs)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pool = import_envpool().make_gymnasium(self.task_id, env_seed=env_seed, **self.options)
            # The pool creates its spaces at the first use, with warnings about their precision
            _ = pool.observation_space, pool.action_space
        return pool

    def step(self, actions: npt.ArrayLike) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """
        :param actions: shape (N, ...)
        :return: observations, rewards, whether episodes have terminated, whether they were truncated, infos. The observation
            of an episode that has ended is the first one of the next episode; the last one is ``infos["final_obs"]``.
        :raises ValueError: if actions have another shape or type than the action space, are not finite, or not in a
            ``Discrete`` space
        :raises RuntimeError: if there are no environments, or if they belong to another process
        """
        self._check_pool()
        observations, rewards, terminated, truncated, self.last_infos = self._pool.step(self._check_actions(actions))
        self._steps += 1
        if self.time_limit is not None:
            truncated = self._steps >= self.time_limit
        observations = self._convert(observations, range(self.num_envs))
        infos = {key: self.last_infos[key] for key in self._info_keys}
        ended = terminated | truncated
        if ended.any():
            indices = ended.nonzero()[0].astype(np.int32)
            running = {f"_{key}": ~ended for key in infos}
            infos = {**infos, **running, "final_info": infos, "_final_info": ended, "_final_obs": ended}
            infos["final_obs"] = {i: observation_of(observations, i) for i in indices.tolist()}
            if self._goes_on_after_life:
                # A reset would begin a new game. A step after a lost life ignores the action and continues the game
                first_observations = self._pool.step(np.zeros(len(indices), dtype=np.int32), indices)[0]
            else:
                first_observations = self._pool.reset(indices)[0]
            put(observations, indices, self._convert(first_observations, indices.tolist()))
            self._steps[indices] = 0
        return observations, rewards, terminated, truncated, infos

    def _check_pool(self) -> None:
        if self.closed:
            raise RuntimeError("The environments are closed")
        if self._pool is None:
            raise RuntimeError("Tried to step environments that need a reset: call reset() first")
        if self._process != os.getpid():
            raise RuntimeError(
                "EnvPool's threads do not exist in a forked process. Create the environments there, or use the start method "
                "'forkserver' or 'spawn'"
            )

    def _check_actions(self, actions: npt.ArrayLike) -> npt.NDArray[Any]:
        """EnvPool does not check actions: a wrong number of them would wait forever."""
        actions = np.asarray(actions)
        space = self.single_action_space
        if actions.shape != (self.num_envs, *space.shape):  # type: ignore[misc]
            raise ValueError(f"actions have shape {actions.shape}; allowed: {(self.num_envs, *space.shape)}")  # type: ignore[misc]
        allowed = None
        if isinstance(space, spaces.Discrete) and actions.dtype.kind in "iu":
            allowed = (actions >= space.start) & (actions < space.start + space.n)
        elif isinstance(space, spaces.Box) and actions.dtype.kind in "fiu":
            allowed = np.isfinite(actions)
        if allowed is None:
            raise ValueError(f"actions have dtype {actions.dtype}; allowed: the one of {space}")
        if not allowed.all():
            i = int(np.argwhere(~allowed)[0][0])
            reason = "not finite" if isinstance(space, spaces.Box) else f"not in {space}"
            raise ValueError(f"The action of environment {i} is {reason}: {actions[i]}")
        return actions

    def _convert(self, observations: Any, indices: Sequence[int]) -> Any:
        """
        :param observations: EnvPool's observations of these environments
        :param indices: indices of the environments
        :return: the observations as elements of the observation space
        """
        observations = to_space(self._base_space, observations)
        if not self._wrappers:
            return observations
        converted = []
        for k, i in enumerate(indices):
            observation = single_observation(self._base_space, observations, k)
            for wrapper in self._wrappers[i]:
                try:
                    observation = wrapper.observation(observation)
                except Exception as error:
                    name = type(wrapper).__name__
                    raise ValueError(
                        f"{name} cannot be applied to EnvPool's observations of {self.task_id}: {error}"
                    ) from error
            converted.append(observation)
        out = create_empty_array(self.single_observation_space, len(converted))
        return concatenate(self.single_observation_space, converted, out)  # type: ignore[arg-type]

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads."""
        # In a forked process there are no threads to stop
        if self._pool is not None and self._process == os.getpid():
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "last_infos": {}}


def check_seed(seed: int) -> None:
    """:raises ValueError: if this is no seed"""
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed={seed!r} is not allowed; allowed: an integer of at least 0")


def spaces_of(spec: Any) -> tuple[spaces.Space, spaces.Space]:
    """:return: the observation space and the action space of EnvPool's spec"""
    with warnings.catch_warnings():
        # EnvPool creates the bounds in double precision
        warnings.simplefilter("ignore")
        return spec.gymnasium_observation_space, spec.gymnasium_action_space


def make_vector_env(env_id: str, num_envs: int, num_threads: int | None = None, **options: Any) -> EnvPoolVectorEnv:
    """
    :param env_id: id of an environment in EnvPool. If gymnasium has it, too, spaces and time limit are gymnasium's, as far as
        EnvPool's observations and actions fit.
    :param num_envs: number of environments
    :param num_threads: see :class:`EnvPoolVectorEnv`
    :param options: see :class:`EnvPoolVectorEnv`
    :return: the environments
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if an argument is not allowed
    """
    check_options(env_id, options)
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError):
        # Not registered, or its dependencies are not installed
        return EnvPoolVectorEnv(env_id, num_envs, num_threads, **options)
    own_observation_space, own_action_space = spaces_of(import_envpool().make_spec(env_id, **options))
    time_limit = env.spec.max_episode_steps if env.spec is not None else None
    if time_limit is not None:
        time_limit = options.pop("max_episode_steps", time_limit)
    vector_env = EnvPoolVectorEnv(
        env_id,
        num_envs,
        num_threads,
        time_limit,
        env.observation_space
        if same_layout(own_observation_space, env.observation_space) and not has_text(env.observation_space)
        else None,
        env.action_space if same_layout(own_action_space, env.action_space) else None,
        **options,
    )
    vector_env.spec = env.spec
    env.close()
    return vector_env


def same_layout(own: spaces.Space, given: spaces.Space) -> bool:
    """
    :return: whether EnvPool's arrays become elements of the given space by a change of dtype and of axes of length 1. A space
        of texts, such as MiniGrid's missions, takes arrays of bytes.
    """
    if isinstance(own, spaces.Dict) and isinstance(given, spaces.Dict):
        return all(key in own.spaces and same_layout(own[key], space) for key, space in given.spaces.items())
    if isinstance(own, spaces.Discrete) and isinstance(given, spaces.Discrete):
        return bool(own.n == given.n and own.start == given.start)
    if not isinstance(own, spaces.Box) or isinstance(given, spaces.Dict | spaces.Tuple | spaces.Discrete):
        return False
    if is_text(given):
        return own.dtype == np.uint8 and len(own.shape) == 1
    own_shape, given_shape = ([length for length in space.shape if length != 1] for space in (own, given))  # type: ignore
    return own_shape == given_shape


def is_text(space: spaces.Space) -> bool:
    """:return: whether the elements of the space are texts"""
    return space.shape is None and isinstance(space.sample(), str)


def has_text(space: spaces.Space) -> bool:
    """:return: whether the elements of the space are texts, or dicts of which a part is a text"""
    return any(map(has_text, space.spaces.values())) if isinstance(space, spaces.Dict) else is_text(space)


def to_space(space: spaces.Space, observations: Any) -> Any:
    """:return: observations of N environments as arrays with dtype and shape of the space; texts remain arrays of bytes"""
    if isinstance(space, spaces.Dict):
        return {key: to_space(part, observations[key]) for key, part in space.spaces.items()}
    if space.dtype is None or space.shape is None:
        return observations
    return observations.astype(space.dtype, copy=False).reshape(-1, *space.shape)


def single_observation(space: spaces.Space, observations: Any, k: int) -> Any:
    """:return: the k-th observation, as a gymnasium environment returns it"""
    if isinstance(space, spaces.Dict):
        return {key: single_observation(part, observations[key], k) for key, part in space.spaces.items()}
    if space.dtype is None or space.shape is None:
        return observations[k].tobytes().rstrip(b"\0").decode()
    return int(observations[k]) if isinstance(space, spaces.Discrete) else observation_of(observations, k)


def put(observations: Any, indices: npt.NDArray[np.integer[Any]], values: Any) -> None:
    """Replace the observations of these environments."""
    if isinstance(observations, dict):
        for key, part in observations.items():
            put(part, indices, values[key])
    else:
        observations[indices] = values
