"""Which of EnvPool's environments, with which options, is equivalent to given gymnasium environments."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common import atari_wrappers as atari
from stable_baselines3.common.monitor import Monitor

from sb3_vpg.envs.envpool_vector import envpool_options, has_text
from sb3_vpg.envs.native_vec_env import KNOWN_WRAPPERS, change_of, keywords_of, time_limits_of, wrappers_of

# EnvPool's options for each of SB3's Atari wrappers
ATARI_OPTIONS: dict[type[gym.Wrapper], Callable[[Any], dict[str, Any]]] = {
    atari.AtariWrapper: lambda wrapper: {},
    atari.StickyActionEnv: lambda wrapper: {"repeat_action_probability": wrapper.action_repeat_probability},
    atari.NoopResetEnv: lambda wrapper: {"noop_max": wrapper.noop_max},
    atari.MaxAndSkipEnv: lambda wrapper: {"frame_skip": wrapper._skip},
    atari.EpisodicLifeEnv: lambda wrapper: {"episodic_life": True},
    atari.FireResetEnv: lambda wrapper: {"use_fire_reset": True},
    atari.WarpFrame: lambda wrapper: {"img_width": wrapper.width, "img_height": wrapper.height},
    atari.ClipRewardEnv: lambda wrapper: {"reward_clip": True},
}
# EnvPool's options without these wrappers
NO_ATARI_WRAPPERS = {"noop_max": 1, "frame_skip": 1, "use_fire_reset": False, "stack_num": 1}
# Keyword arguments of ALE's environments that are options of EnvPool
ATARI_KEYWORDS = ("repeat_action_probability", "full_action_space", "mode", "difficulty")
# EnvPool's largest number of steps
NO_LIMIT = 2**31 - 1


class Equivalent(NamedTuple):
    """
    :param task_id: id of the environment in EnvPool
    :param options: its options
    :param time_limit: maximum number of steps in an episode, None for EnvPool's own limit
    :param observation_space: space of the environment before its observation wrappers
    :param action_space: space of the environment
    :param observation_wrappers: those of each environment, from the innermost to the outermost
    :param raw_game_in_monitor: whether the monitor is within the wrappers that clip rewards, skip frames and end episodes when
        a life is lost
    """

    task_id: str
    options: dict[str, Any]
    time_limit: int | None
    observation_space: spaces.Space
    action_space: spaces.Space
    observation_wrappers: list[list[gym.ObservationWrapper]]
    raw_game_in_monitor: bool = False


def find_equivalent(envs: Sequence[gym.Env]) -> Equivalent:
    """
    :param envs: single environments with their wrappers
    :return: the equivalent in EnvPool
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if there is none; the message names the reason
    """
    env = envs[0]
    spec = env.unwrapped.spec
    if spec is None:
        raise ValueError(f"EnvPool cannot replace {env.unwrapped}: it is not registered with gymnasium")
    if spec.kwargs.get("render_mode") == "human":
        raise ValueError("EnvPool has no equivalent of render_mode='human'")
    for other in envs[1:]:
        if describe(other) != describe(env):
            raise ValueError(f"EnvPool cannot replace different environments: {describe(env)}, {describe(other)}")
    if (change := change_of(envs)) is not None:
        raise ValueError(f"EnvPool cannot replace an environment that was changed after gym.make(): {change}")
    wrappers = list(wrappers_of(env))
    # rl_zoo3 replaces gymnasium's TimeLimit by a class of its own, possibly after KNOWN_WRAPPERS was defined
    known = (*KNOWN_WRAPPERS, *ATARI_OPTIONS, gym.wrappers.TimeLimit, *map(type, observation_wrappers_of(env)))
    for wrapper in wrappers:
        if type(wrapper) not in known:
            raise ValueError(f"EnvPool has no equivalent of the wrapper {type(wrapper).__name__} around {spec.id}")
        if isinstance(wrapper, Monitor) and wrapper.reset_keywords:
            raise ValueError("EnvPool has no equivalent of Monitor(reset_keywords=...)")
    if "game" in spec.kwargs:
        return find_atari_equivalent(envs, spec, wrappers)
    options = translate_keywords(spec)
    if has_text(env.observation_space):
        raise ValueError(f"SB3 does not support texts in observations, as {spec.id} has: use an observation wrapper")
    limits = time_limits_of(env)
    # MiniGrid's own limit, by which its rewards are scaled, or else none. In BabyAI, it is 0 until a mission sets it
    own_limit = getattr(env.unwrapped, "max_steps", NO_LIMIT)
    if own_limit > 0:
        options["max_episode_steps"] = own_limit
    elif limits:
        raise ValueError(f"EnvPool has no equivalent of a TimeLimit around {spec.id}, whose missions have their own")
    return Equivalent(
        spec.id,
        options,
        min((limit for limit in limits if limit < own_limit), default=None),
        env.unwrapped.observation_space,
        env.action_space,
        [list(observation_wrappers_of(one))[::-1] for one in envs],
    )


def find_atari_equivalent(envs: Sequence[gym.Env], spec: Any, wrappers: Sequence[gym.Wrapper]) -> Equivalent:
    """:return: the equivalent of ALE's environments with SB3's Atari wrappers; see :func:`find_equivalent`"""
    is_atari = [type(wrapper) in ATARI_OPTIONS for wrapper in wrappers]
    if not any(isinstance(wrapper, atari.WarpFrame) for wrapper in wrappers):
        raise ValueError(f"EnvPool resizes the pictures of {spec.id}: use make_atari_env, or SB3's AtariWrapper")
    if spec.kwargs.get("frameskip", 1) != 1:
        raise ValueError(f"EnvPool has no equivalent of frameskip={spec.kwargs['frameskip']!r}: use the id ...NoFrameskip-v4")
    for other in observation_wrappers_of(envs[0]):
        raise ValueError(f"EnvPool has no equivalent of the wrapper {type(other).__name__} around {spec.id}")
    default = keywords_of(gym.spec(spec.id))
    for name, value in keywords_of(spec).items():
        known = (*ATARI_KEYWORDS, "game", "frameskip", "render_mode", "max_num_frames_per_episode")
        if name not in known and value != default.get(name):
            raise ValueError(f"EnvPool has no equivalent of {name}={value!r} of {spec.id}")
    options = {**NO_ATARI_WRAPPERS, **{name: spec.kwargs[name] for name in ATARI_KEYWORDS if name in spec.kwargs}}
    for wrapper in wrappers:
        if type(wrapper) in ATARI_OPTIONS:
            options |= ATARI_OPTIONS[type(wrapper)](wrapper)
    # Limits are numbers of frames. Around the wrappers that skip frames, they would be numbers of steps
    if any(isinstance(wrapper, TimeLimit) and any(is_atari[i:]) for i, wrapper in enumerate(wrappers)):
        raise ValueError(f"EnvPool has no equivalent of a TimeLimit around SB3's Atari wrappers of {spec.id}")
    n_frames = min(spec.kwargs["max_num_frames_per_episode"], *time_limits_of(envs[0]), NO_LIMIT)
    options["max_episode_steps"] = -(-n_frames // options["frame_skip"])
    monitors = [i for i, wrapper in enumerate(wrappers) if isinstance(wrapper, Monitor)]
    return Equivalent(
        "".join(part.capitalize() for part in spec.kwargs["game"].split("_")) + "-v5",
        options,
        None,
        envs[0].observation_space,
        envs[0].action_space,
        [],
        raw_game_in_monitor=bool(monitors) and any(is_atari[: monitors[0]]),
    )


def translate_keywords(spec: Any) -> dict[str, Any]:
    """
    :param spec: gymnasium's spec of an environment
    :return: EnvPool's options for the keyword arguments that differ from the registered ones
    :raises ValueError: if EnvPool has no such option
    """
    default = keywords_of(gym.spec(spec.id))
    known = envpool_options(spec.id).keys()
    options: dict[str, Any] = {}
    for name, value in keywords_of(spec).items():
        bounds = [name.removesuffix("_range") + suffix for suffix in ("_min", "_max")]
        if name == "render_mode" or (name in default and value == default[name]):
            continue
        # EnvPool looks for the file in its own folder only
        if name in known and name != "xml_file":
            options[name] = value
        elif name.endswith("_range") and all(bound in known or np.isinf(number) for bound, number in zip(bounds, value)):
            options |= {bound: float(number) for bound, number in zip(bounds, value) if bound in known}
        else:
            raise ValueError(
                f"EnvPool's {spec.id} has no equivalent of {name}={value!r}; it has {', '.join(sorted(known - {'xml_file'}))}"
            )
    return options


def observation_wrappers_of(env: gym.Env) -> Iterator[gym.ObservationWrapper]:
    """:return: the wrappers that compute observations from observations alone, from the outermost to the innermost"""
    for wrapper in wrappers_of(env):
        cls: Any = type(wrapper)
        if (
            isinstance(wrapper, gym.ObservationWrapper)
            and cls not in ATARI_OPTIONS
            and cls.step is gym.ObservationWrapper.step
            and cls.reset is gym.ObservationWrapper.reset
            # Such as MiniGrid's FullyObsWrapper, which reads the state of the environment
            and not reads_environment(wrapper)
        ):
            yield wrapper


def reads_environment(wrapper: gym.ObservationWrapper) -> bool:
    """Whether the wrapper's functions read the environment that it wraps: one that is never stepped."""
    classes = itertools.takewhile(lambda cls: cls is not gym.ObservationWrapper, type(wrapper).__mro__)
    functions = [f for cls in classes for name, f in vars(cls).items() if isinstance(f, FunctionType) and name != "__init__"]
    # Of TransformObservation. Its closure may have the environment: gymnasium's own functions use the spaces of it
    given = getattr(wrapper, "func", None)
    names = set().union(*(names_in(f.__code__) for f in (*functions, given) if isinstance(f, FunctionType)))
    cells = given.__closure__ or () if isinstance(given, FunctionType) else ()
    kept = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, gym.Env)]
    of_gymnasium = isinstance(given, FunctionType) and given.__module__.startswith("gymnasium.")
    uses_kept = any(hasattr(gym.Env, name) for name in names) or not of_gymnasium
    return bool(names & {"env", "unwrapped", "get_wrapper_attr"} or (kept and uses_kept))


def names_in(code: CodeType) -> set[str]:
    """:return: names of globals and attributes that a function uses, with those of the functions in it"""
    nested = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def describe(env: gym.Env) -> tuple[Any, ...]:
    """:return: what must be the same for all environments"""
    spec = env.unwrapped.spec
    wrappers = [
        (type(one).__name__, getattr(one, "_max_episode_steps", None), ATARI_OPTIONS.get(type(one), lambda _: {})(one))
        for one in wrappers_of(env)
    ]
    return (None, None, wrappers) if spec is None else (spec.id, keywords_of(spec), wrappers)
