"""SB3's interface for natively vectorized gymnasium environments, which step many environments in one call."""

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_vpg.envs.autoreset import autoreset_of, reset_in_next_step
from sb3_vpg.envs.vector import SeparatelySeededVectorEnv

# Vectorized environments that support next-step autoreset only, and their replacements with same-step autoreset
SAME_STEP_ENTRY_POINTS = {
    "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv": "sb3_vpg.envs.cartpole:SameStepCartPoleVectorEnv"
}
# Wrappers whose effect the vectorized environment or NativeVecEnv itself provides
KNOWN_WRAPPERS = (Monitor, TimeLimit, OrderEnforcing, PassiveEnvChecker)
# Keys in the infos of a vectorized environment that describe the last step of an episode
FINAL_KEYS = frozenset({"final_obs", "_final_obs", "final_info", "_final_info"})


class NoVectorFormError(Exception):
    """No vectorized environment is equivalent to the given environments; the message gives the reason."""


class StandInEnv(gym.Env):
    """Spaces and spec of an environment that a vectorized environment steps. It cannot be stepped itself."""

    def __init__(self, vector_env: VectorEnv):
        self.observation_space = vector_env.single_observation_space
        self.action_space = vector_env.single_action_space
        self.metadata = vector_env.metadata
        self.spec = getattr(vector_env, "spec", None)

    def step(self, action: Any) -> NoReturn:
        raise NotImplementedError("This environment is a part of a vectorized environment: step `vector_env`")

    reset = step  # type: ignore[assignment]


class NativeVecEnv(VecEnv):
    """
    Steps all environments at once in a natively vectorized environment. It is a replacement for SB3's ``DummyVecEnv``, if
    gymnasium's registry has a vectorized form of the environment (``vector_entry_point``), as for ``CartPole-v1`` and the
    swing-ups: ::

        make_vec_env("CartPoleSwingUp-v0", n_envs=128, vec_env_cls=NativeVecEnv)

    Its observable behavior is that of ``DummyVecEnv``. The step that ends an episode resets the environment; ``infos[i]`` then
    has "terminal_observation", "TimeLimit.truncated" and, with a ``Monitor``, "episode". Monitor files are written. With the
    same seeds and actions, observations are the same. The given environments provide spec, time limit and monitor; they
    are not stepped. If the environment or one of its wrappers has no vectorized form, or if the environment was changed after
    ``gym.make``, the result *is* a ``DummyVecEnv``, and a warning gives the reason.

    It also takes a ``gymnasium.vector.VectorEnv``, such as ALE's: ::

        NativeVecEnv(AtariVectorEnv("pong", num_envs=8, autoreset_mode="SameStep"))

    Infos then always have "episode". A vectorized environment that resets in the next step (``AutoresetMode.NEXT_STEP``) is
    reset in the same step if a part of it can be reset, as with ALE's and gymnasium's ``SyncVectorEnv``. For others, see
    :attr:`reset_steps`.

    ``set_attr``, ``env_method`` and options always apply to all environments.

    While an episode runs, the info of its environment is the same object at each step: copy it before you change it.

    :param env_fns: functions that return the environments, as for ``DummyVecEnv``, or a vectorized environment. Typical
        number: 8 to 4096. Larger: more steps per second, and larger batches.
    :raises ValueError: if there are no environments, or if the given vectorized environment does not say when it resets, or
        cannot be reset as it says
    """

    def __new__(cls, env_fns: Sequence[Callable[[], gym.Env]] | VectorEnv | None = None) -> "VecEnv":  # type: ignore[misc]
        # Copying and unpickling call this method without arguments
        native = super().__new__(cls)
        if isinstance(env_fns, VectorEnv):
            native.vector_env = env_fns
            native.envs = [Monitor(StandInEnv(env_fns)) for _ in range(env_fns.num_envs)]
        elif env_fns is not None:
            check_not_empty(env_fns)
            envs = [fn() for fn in env_fns]
            try:
                native.vector_env = make_vector_form(envs)
            except NoVectorFormError as reason:
                warnings.warn(f"NativeVecEnv falls back to DummyVecEnv: {reason}.", stacklevel=3)
                return DummyVecEnv([lambda env=env: env for env in envs])  # type: ignore[misc]
            native.envs = envs
        return native

    #: The vectorized environment
    vector_env: VectorEnv
    #: The given environments, which are not stepped
    envs: list[gym.Env]
    #: Number of steps that the ``Monitor`` of an environment sees in one step
    monitored_steps = 1
    #: Whether :attr:`reset_steps` are allowed without VPG's training. Set it for an evaluation (of a policy without memory)
    allow_reset_steps = False

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]] | VectorEnv):
        super().__init__(len(self.envs), self.vector_env.single_observation_space, self.vector_env.single_action_space)
        self.metadata = self.vector_env.metadata
        self._monitors = [next((w for w in wrappers_of(env) if isinstance(w, Monitor)), None) for env in self.envs]
        self._running_infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._was_reset = False
        self._autoreset = autoreset_of(self.vector_env)
        self._reset_steps = np.zeros(self.num_envs, dtype=bool)
        # Whether the next step of each environment will be spent on its reset
        self.reset_is_due = np.zeros(self.num_envs, dtype=bool)
        self._reset_steps_are_read = False

    @property
    def reset_steps(self) -> np.ndarray | None:
        """
        Whether each environment has spent the last step on its reset, shape (N,); None if no environment ever does. The array
        is updated in place.

        Only environments with ``AutoresetMode.NEXT_STEP`` that cannot be reset in part spend steps on resets. Such a step is
        no transition: the action is ignored, and the reward is 0. VPG does not record it. Other algorithms would, so that a
        step of this kind is an error unless this attribute has been read since the last reset of all environments, or
        :attr:`allow_reset_steps` is set. SB3's wrappers count it: ``VecMonitor`` in the length of the next episode,
        ``VecNormalize`` in its statistics.
        """
        if self._autoreset is not reset_in_next_step:
            return None
        self._reset_steps_are_read = True
        return self._reset_steps

    def reset(self) -> VecEnvObs:
        if any(options != self._options[0] for options in self._options):
            raise ValueError("NativeVecEnv supports only the same options for all environments; use DummyVecEnv for others")
        if any(monitor is not None and not monitor.allow_early_resets for monitor in self._monitors) and self._was_reset:
            raise RuntimeError("Tried to reset an environment before done, which Monitor(allow_early_resets=False) forbids")
        # SB3 seeds environment i with seed + i
        observations, infos = self.vector_env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [extract_info(infos, i) for i in range(self.num_envs)]
        self._returns[:], self._lengths[:] = 0.0, 0
        self._reset_steps[:], self.reset_is_due[:] = False, False
        # Another algorithm may use the environments now
        self._reset_steps_are_read = False
        self._was_reset = True
        return copy.deepcopy(observations)

    def step_async(self, actions: np.ndarray) -> None:
        if not self._was_reset:
            raise RuntimeError("Tried to step environments that need a reset: call reset() first")
        self._actions = np.asarray(actions)

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminated, truncated, infos = self.vector_env.step(self._actions)
        self._reset_steps[:], self.reset_is_due[:] = self.reset_is_due, False
        if self._reset_steps.any():
            rewards = self._ignore_reset_steps(rewards)
        dones = terminated | truncated
        monitored_rewards, monitored_ends = self._within_monitor(rewards, terminated, truncated)
        self._returns += monitored_rewards
        self._lengths += self.monitored_steps * ~self._reset_steps
        step_infos = self._running_infos.copy()
        if not infos.keys() <= FINAL_KEYS:
            step_infos = [{**running, **extract_info(infos, i)} for i, running in enumerate(step_infos)]
        if dones.any():
            observations = self._end_episodes(observations, dones, terminated, monitored_ends, infos, step_infos)
        # A copy, as in DummyVecEnv, since the vectorized environment may reuse its arrays
        return copy.deepcopy(observations), rewards.astype(np.float32), dones, step_infos

    def _within_monitor(
        self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        :param rewards: rewards of a step, shape (N,)
        :param terminated: whether the step has terminated an episode, shape (N,)
        :param truncated: whether the step has truncated an episode, shape (N,)
        :return: rewards, and whether the episode has ended, as the ``Monitor`` of each environment sees them
        """
        return rewards, terminated | truncated

    def _ignore_reset_steps(self, rewards: np.ndarray) -> np.ndarray:
        """:return: the rewards, 0 where the step was spent on a reset"""
        if not (self._reset_steps_are_read or self.allow_reset_steps):
            raise RuntimeError(
                f"{self.vector_env} resets in the next step (AutoresetMode.NEXT_STEP), and cannot be reset in part. Only VPG "
                "can be trained on it: other algorithms would record the step of the reset as a transition. Use a vectorized "
                "environment with AutoresetMode.SAME_STEP or AutoresetMode.DISABLED. For an evaluation, set "
                "`allow_reset_steps = True`."
            )
        return np.where(self._reset_steps, 0.0, rewards)

    def _end_episodes(
        self,
        observations: VecEnvObs,
        dones: np.ndarray,
        terminated: np.ndarray,
        monitored_ends: np.ndarray,
        infos: dict[str, Any],
        step_infos: list[dict[str, Any]],
    ) -> VecEnvObs:
        """
        Reset the environments whose episodes have ended, and fill in their infos, including the entries that ``Monitor`` adds.

        :return: the observations, with the first ones of new episodes
        """
        observations, final_obs, final_infos, first_infos = self._autoreset(self.vector_env, observations, dones, infos)
        if self._autoreset is reset_in_next_step:
            self.reset_is_due[:] = dones
        now = time.time()
        ended = dones.nonzero()[0]
        columns = (ended, terminated[ended], monitored_ends[ended], self._returns[ended], self._lengths[ended])
        for i, was_terminated, was_end, episode_return, length in zip(*(column.tolist() for column in columns)):
            self.reset_infos[i] = extract_info(first_infos, i)
            info = step_infos[i] = extract_info(final_infos, i)
            info["TimeLimit.truncated"] = not was_terminated
            info["terminal_observation"] = copy.deepcopy(final_obs[i])
            monitor = self._monitors[i]
            if monitor is not None and was_end:
                episode = {"r": round(episode_return, 6), "l": length, "t": round(now - monitor.t_start, 6)}
                episode.update((key, info[key]) for key in monitor.info_keywords)
                if monitor.results_writer:
                    monitor.results_writer.write_row(episode)
                info["episode"] = episode
        self._returns[monitored_ends], self._lengths[monitored_ends] = 0.0, 0
        return observations

    def close(self) -> None:
        self.vector_env.close()
        for env in self.envs:
            env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        images = None if self.render_mode is None else self.vector_env.render()
        return images or [None] * self.num_envs  # type: ignore[return-value]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Get an attribute of the vectorized environment that has one value for all environments, or "np_random", the random
        generators of the environments.

        :raises AttributeError: if there is no such attribute, or if it is one array, generator or seed for all environments
        """
        if attr_name == "np_random" and (generators := self._generators()) is not None:
            return [generators[i] for i in self._get_indices(indices)]
        # `observation_space` and `action_space` of a vectorized environment are for all environments together
        prefix = "single_" if attr_name in ("observation_space", "action_space") else ""
        value = getattr(self.vector_env, prefix + attr_name)
        shared = {
            "array": isinstance(value, np.ndarray),
            "generator": isinstance(value, np.random.Generator),
            "seed": attr_name == "np_random_seed",
        }
        kind = next((kind for kind, is_shared in shared.items() if is_shared), None)
        if kind is not None:
            raise AttributeError(
                f"{attr_name!r} is one {kind} for all environments: read `vector_env.{attr_name}` of NativeVecEnv instead"
            )
        return [value for _ in self._get_indices(indices)]

    def _generators(self) -> Sequence[np.random.Generator] | None:
        """:return: the random generator of each environment; None if all have one together"""
        base: Any = self.vector_env.unwrapped
        generators = base.generators if isinstance(base, SeparatelySeededVectorEnv) else base.np_random
        return None if isinstance(generators, np.random.Generator) else generators

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of the vectorized environment, or "np_random", the random generator of each environment in
        ``indices``.

        :raises AttributeError: if there is no such attribute
        :raises NotImplementedError: if ``indices`` does not include all environments ("np_random" excepted)
        """
        if attr_name == "np_random" and (generators := self._generators()) is not None:
            chosen = list(self._get_indices(indices))
            new = [value if i in chosen else generator for i, generator in enumerate(generators)]
            base: Any = self.vector_env.unwrapped
            if isinstance(base, SeparatelySeededVectorEnv):
                base.generators[:] = new
            else:
                base.set_attr("np_random", new)
            return
        self._require_all(f"set {attr_name!r}", indices)
        if not hasattr(self.vector_env, attr_name):
            raise AttributeError(f"{self.vector_env} has no attribute {attr_name!r}")
        setattr(self.vector_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of the vectorized environment that applies to all environments, such as ``set_start_std`` of the
        swing-ups, or ``action_masks``, which returns the masks of all environments.

        :return: the result of the call, repeated for each environment; of ``action_masks``, one mask for each
        :raises NotImplementedError: if there is no such method, if it is a method of gymnasium's ``VectorEnv`` (such as
            ``reset``), or if ``indices`` does not include all environments
        """
        method = getattr(self.vector_env, method_name, None)
        if not callable(method) or hasattr(VectorEnv, method_name):
            raise NotImplementedError(
                f"NativeVecEnv has no single environments to call {method_name!r} on: all are in one array. "
                "Call a method of `vector_env`, or use DummyVecEnv"
            )
        if method_name == "action_masks":
            masks = method(*method_args, **method_kwargs)
            return [masks[i] for i in self._get_indices(indices)]
        self._require_all(f"call {method_name!r}", indices)
        return [method(*method_args, **method_kwargs)] * self.num_envs

    def _require_all(self, action: str, indices: VecEnvIndices) -> None:
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise NotImplementedError(f"NativeVecEnv can {action} for all environments only; use DummyVecEnv")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [is_wrapped(self.envs[i], wrapper_class) for i in self._get_indices(indices)]


def check_not_empty(env_fns: Sequence[Callable[[], gym.Env]]) -> None:
    """:raises ValueError: if there are no environments"""
    if not env_fns:
        raise ValueError("There are no environments; allowed: at least one function that returns an environment")


def wrappers_of(env: gym.Env) -> Iterator[gym.Wrapper]:
    """:return: the wrappers of an environment, from the outermost to the innermost"""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def time_limits_of(env: gym.Env) -> list[int]:
    """:return: the limits of an environment's ``TimeLimit`` wrappers, from the outermost to the innermost"""
    return [wrapper._max_episode_steps for wrapper in wrappers_of(env) if isinstance(wrapper, TimeLimit)]


def keywords_of(spec: EnvSpec) -> dict[str, Any]:
    """:return: the keyword arguments of an environment, which can be compared: with lists in place of arrays"""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in spec.kwargs.items()}


def change_of(envs: Sequence[gym.Env]) -> str | None:
    """
    :param envs: environments that :func:`gym.make` has made with the same spec, maybe changed since
    :return: how one differs from one that is new: its class, or an attribute (number, text, tuple, array) that a reset does
        not change; None if there is no difference. What lies deeper, as in MuJoCo's ``model``, is not compared
    """
    own = [env.unwrapped for env in envs]
    new = gym.make(own[0].spec).unwrapped  # type: ignore[arg-type]
    kinds = (int, float, str, tuple, np.ndarray)
    # An attribute of the class may be one of the instance now
    names = {name for one in (new, *own) for name in vars(one) if hasattr(new, name) and "np_random" not in name}
    at_first = {name: copy.copy(getattr(new, name)) for name in sorted(names) if isinstance(getattr(new, name), kinds)}

    def stays(name: str) -> bool:
        # A text with few values, such as MiniGrid's mission, is often drawn again
        for _ in range(20):
            new.reset()
            if not np.array_equal(at_first[name], getattr(new, name)):
                return False
        return True

    try:
        for one in own:
            if type(one) is not type(new):
                return f"{type(one).__name__} instead of {type(new).__name__}"
        for name, value in at_first.items():
            others = [other for one in own if not np.array_equal(value, other := getattr(one, name, value))]
            if others and stays(name):
                return f"{name}={others[0]!r} instead of {value!r}"
        return None
    finally:
        new.close()


def make_vector_form(envs: Sequence[gym.Env]) -> VectorEnv:
    """
    :param envs: single environments with their wrappers
    :return: an equivalent vectorized environment with same-step autoreset
    :raises NoVectorFormError: if there is none
    """
    spec = envs[0].unwrapped.spec
    if spec is None or spec.vector_entry_point is None:
        raise NoVectorFormError(f"{envs[0].unwrapped} has no vectorized form (vector_entry_point)")
    for env in envs:
        own = env.unwrapped.spec
        if own is None or (own.id, keywords_of(own)) != (spec.id, keywords_of(spec)):
            raise NoVectorFormError(f"the environments differ: {own}, {spec}")
        for wrapper in wrappers_of(env):
            # rl_zoo3 replaces gymnasium's TimeLimit by its own class, possibly after KNOWN_WRAPPERS was defined
            if type(wrapper) not in (*KNOWN_WRAPPERS, gym.wrappers.TimeLimit):
                raise NoVectorFormError(f"the wrapper {type(wrapper).__name__} has no vectorized form")
            if isinstance(wrapper, Monitor) and wrapper.reset_keywords:
                raise NoVectorFormError("Monitor(reset_keywords=...) has no vectorized form")
    if spec.kwargs.get("render_mode") == "human":
        raise NoVectorFormError("render_mode='human' needs single environments")
    if (change := change_of(envs)) is not None:
        raise NoVectorFormError(f"an environment was changed after gym.make(): {change}")
    limits = {tuple(time_limits_of(env)) for env in envs}
    if len(limits) > 1 or len(limit := limits.pop()) != 1:
        raise NoVectorFormError("the environments must have the same time limit")

    entry_point = spec.vector_entry_point
    creator: Any = entry_point
    if isinstance(entry_point, str):
        creator = load_env_creator(SAME_STEP_ENTRY_POINTS.get(entry_point, entry_point))
    kwargs = {**spec.kwargs, "max_episode_steps": limit[0]}
    if "autoreset_mode" in inspect.signature(creator).parameters:
        kwargs["autoreset_mode"] = AutoresetMode.SAME_STEP
    try:
        inspect.signature(creator).bind(num_envs=len(envs), **kwargs)
    except TypeError as error:
        raise NoVectorFormError(f"the vectorized form of {spec.id} does not take the same arguments: {error}") from error
    vector_env = creator(num_envs=len(envs), **kwargs)
    if vector_env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        vector_env.close()
        raise NoVectorFormError(f"{type(vector_env).__name__} does not support same-step autoreset")
    vector_env.spec = spec
    return vector_env


def extract_info(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """
    :param infos: infos of a vectorized gymnasium environment, a dict of arrays
    :param i: index of an environment
    :return: the info of that environment, without the keys that describe the last step of an episode
    """
    if infos.keys() <= FINAL_KEYS:
        return {}
    return {
        key: extract_info(value, i) if isinstance(value, dict) else value[i]
        for key, value in infos.items()
        if key not in FINAL_KEYS
        and not (key[:1] == "_" and key[1:] in infos)
        and (f"_{key}" not in infos or infos[f"_{key}"][i])
    }
