"""
The states of the random number generators that a training draws from, in the form of plain data: a run that goes on from them
draws what it would have drawn.
"""

import base64
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

State = dict[str, Any]


def get_random_states(env: VecEnv | None) -> State:
    """
    The generator of an environment is left out, with a warning that names it, if its state cannot be read or stored.

    :param env: environments; their generators are ``np_random``, as gymnasium's API has it. Generators of other names are
        theirs alone.
    :return: states of Python's, NumPy's and PyTorch's global generators and of the environments', as JSON can hold them
    """
    version, python_state, gauss_next = random.getstate()
    return {
        "python": [version, encode(np.array(python_state, np.uint32)), gauss_next],
        # SB3 seeds the global generator, and environments and callbacks may draw from it
        "numpy": _to_plain(np.random.get_state(legacy=False)),  # noqa: NPY002
        "torch": encode(th.get_rng_state().numpy()),
        "cuda": [encode(state.numpy()) for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else [],
        "environments": [] if env is None else _get_environment_states(env),
    }


def set_random_states(states: State, env: VecEnv) -> None:
    """
    The generator of an environment is left as it is, with a warning that names it, if it does not take its state.

    :param states: as :func:`get_random_states` returned them
    :param env: environments. Those that get a state will not use a seed that they have been given for their next reset; where
        their number is another one, their generators are left as they are.
    """
    version, python_state, gauss_next = states["python"]
    random.setstate((version, tuple(decode(python_state, np.uint32).tolist()), gauss_next))
    # np.random.set_bit_generator() may have chosen another one
    if np.random.get_state(legacy=False)["bit_generator"] == states["numpy"]["bit_generator"]:  # noqa: NPY002
        np.random.set_state(_from_plain(states["numpy"]))  # noqa: NPY002
    th.set_rng_state(th.from_numpy(decode(states["torch"], np.uint8)))
    if states["cuda"] and th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(decode(state, np.uint8)) for state in states["cuda"]])
    if len(states["environments"]) == env.num_envs:
        _set_environment_states(states["environments"], env)


def _get_environment_states(env: VecEnv) -> list[State | None]:
    """:return: for each environment the state of its generator; None if it has none, or it cannot be stored"""
    states: list[State | None] = [None] * env.num_envs

    def get_state(i: int) -> None:
        try:
            (generator,) = env.get_attr("np_random", indices=i)
        except (AttributeError, NotImplementedError):
            # It has none
            return
        states[i] = _state_of(generator)

    # There is nobody to ask once the processes have been ended
    if not getattr(env.unwrapped, "closed", False):
        _for_each_environment(get_state, range(env.num_envs), env, "saved")
    return states


def _set_environment_states(states: Sequence[State | None], env: VecEnv) -> None:
    def set_state(i: int) -> None:
        state: State = states[i]  # type: ignore[assignment]
        (generator,) = env.get_attr("np_random", indices=i)
        if type(generator.bit_generator).__name__ != state["bit_generator"]:
            generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = _from_plain(state)
        # In this process it is the environment's own by now, which may be read-only; from another one came a copy
        if _state_of(*env.get_attr("np_random", indices=i)) != state:
            env.set_attr("np_random", generator, indices=i)
        env.unwrapped._seeds[i] = None

    _for_each_environment(set_state, [i for i, state in enumerate(states) if state is not None], env, "restored", to_set=True)


def _for_each_environment(
    function: Callable[[int], None], indices: Sequence[int], env: VecEnv, done: str, to_set: bool = False
) -> None:
    """
    Call the function for each of the environments, as far as it does not fail, and warn of those for which it does.

    :param function: is given the index of an environment
    :param done: what it does to the state of the generator
    :param to_set: whether it sets the generator
    """
    problems = _lost_if_asked(env, indices, to_set)
    for i in indices:
        if i not in problems:
            try:
                function(i)
            except Exception as error:
                problems[i] = repr(error)
    for reason in dict.fromkeys(problems.values()):
        which = [str(i) for i in indices if problems.get(i) == reason]
        others = f" and {len(which) - 8} others" if len(which) > 8 else ""
        warnings.warn(
            f"The state of np_random of environment {', '.join(which[:8])}{others} is not {done}: {reason}. "
            "A run that goes on from the file draws other random numbers there.",
            stacklevel=5,
        )


def _lost_if_asked(env: VecEnv, indices: Sequence[int], to_set: bool) -> dict[int, str]:
    """
    An exception in a process of SubprocVecEnv ends it, whether an attribute raises or cannot be sent. So an environment is
    asked for its generator only if its process says, by way of :class:`_Failing`, that this raises nothing.

    :return: index of each environment that must not be asked, and why
    """
    if not isinstance(env.unwrapped, SubprocVecEnv) or not indices:
        return {}
    try:
        wrapped = env.env_is_wrapped(gym.Wrapper, indices)
        failing = env.env_is_wrapped(_Failing(to_set), indices)  # type: ignore[arg-type]
    except Exception as error:
        return dict.fromkeys(indices, repr(error))
    raises = "reading, pickling or setting it raises an exception" if to_set else "reading or pickling it raises an exception"
    unknown = "SubprocVecEnv cannot find out whether it can be read, unless the environment has a wrapper, such as Monitor"
    answers = zip(indices, wrapped, failing)
    return {i: raises if fails else unknown for i, has_wrapper, fails in answers if fails or not has_wrapper}


class _Failing:
    """
    Takes the place of the wrapper class in ``VecEnv.env_is_wrapped``: a process of SubprocVecEnv then evaluates
    ``isinstance(env, _Failing(...))``, for each wrapper, and answers whether its ``np_random`` raises an exception.

    :param to_set: whether it is set, to what it is
    """

    def __init__(self, to_set: bool):
        self.to_set = to_set

    def __instancecheck__(self, env: gym.Wrapper) -> bool:
        try:
            generator = env.get_wrapper_attr("np_random")
            # As it would be sent
            ForkingPickler.dumps(generator)
            if self.to_set:
                env.np_random = generator
        except Exception:
            return True
        return False


def _state_of(generator: np.random.Generator) -> State:
    """:raises TypeError: if it is not one of NumPy's, which alone can be made from their state"""
    bit_generator = generator.bit_generator
    name = type(bit_generator).__name__
    if type(bit_generator) is not getattr(np.random, name, None):
        raise TypeError(f"its bit generator, {name}, is not one of NumPy's")
    return _to_plain(bit_generator.state)


def _to_plain(state: Mapping[str, Any]) -> State:
    """:return: the state of one of NumPy's bit generators, with its arrays as text"""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return encode(value) if isinstance(value, np.ndarray) else value

    return plain(state)


def _from_plain(state: State) -> State:
    """:return: the state that :func:`_to_plain` was given"""
    dtype = np.uint32 if state["bit_generator"] == "MT19937" else np.uint64

    def array(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: array(name, part) for name, part in value.items()}
        return decode(value, dtype) if isinstance(value, str) and key != "bit_generator" else value

    return array("", state)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
