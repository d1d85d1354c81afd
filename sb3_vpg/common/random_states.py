"""
Read and restore the states of all random number generators that a training run uses.

The states are plain data (JSON). A run that resumes from them draws the same random numbers as the uninterrupted run.
"""

import base64
import random
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

State = dict[str, Any]


def get_random_states(env: VecEnv | None) -> State:
    """
    Read the states of Python's, NumPy's and PyTorch's global generators and of the environments' generators. If the generator
    of an environment cannot be read or stored, a warning names the environment and its state is left out.

    :param env: environments. Their generators are the attributes ``np_random`` of gymnasium's API; generators in other
        attributes are not read.
    :return: the states, as data that JSON can store
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
    Restore states that :func:`get_random_states` has read. If the state of an environment's generator cannot be restored, a
    warning names the environment and its generator is not changed.

    :param states: the states
    :param env: environments. Their generators are restored only if the number of environments is the same. A seed that was
        set for the next reset of such an environment is discarded.
    """
    version, python_state, gauss_next = states["python"]
    random.setstate((version, tuple(decode(python_state, np.uint32).tolist()), gauss_next))
    # A user can replace it by np.random.set_bit_generator()
    if np.random.get_state(legacy=False)["bit_generator"] == states["numpy"]["bit_generator"]:  # noqa: NPY002
        np.random.set_state(_from_plain(states["numpy"]))  # noqa: NPY002
    th.set_rng_state(th.from_numpy(decode(states["torch"], np.uint8)))
    if states["cuda"] and th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(decode(state, np.uint8)) for state in states["cuda"]])
    if len(states["environments"]) == env.num_envs:
        _set_environment_states(states["environments"], env)


def _get_environment_states(env: VecEnv) -> list[State | None]:
    """:return: the state of each environment's generator; None if there is no generator or its state cannot be stored"""
    states: list[State | None] = [None] * env.num_envs

    def get_state(i: int) -> None:
        try:
            (generator,) = env.get_attr("np_random", indices=i)
        except (AttributeError, NotImplementedError):
            # This environment has no generator
            return
        states[i] = _state_of(generator)

    # The worker processes of a closed VecEnv have exited
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
        # In this process, `generator` is the environment's own object and is restored already (np_random may be read-only).
        # From a worker process came a copy, which must be sent back
        if _state_of(*env.get_attr("np_random", indices=i)) != state:
            env.set_attr("np_random", generator, indices=i)
        env.unwrapped._seeds[i] = None

    _for_each_environment(set_state, [i for i, state in enumerate(states) if state is not None], env, "restored", writes=True)


def _for_each_environment(
    function: Callable[[int], None], indices: Sequence[int], env: VecEnv, verb: str, writes: bool = False
) -> None:
    """
    Call the function for each environment, and warn about the environments for which it raises.

    :param function: called with the index of an environment
    :param indices: indices of the environments
    :param env: the environments
    :param verb: "saved" or "restored", for the warning
    :param writes: whether the function sets the generator
    """
    problems = _find_failing_workers(env, indices, writes)
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
            f"The state of np_random of environment {', '.join(which[:8])}{others} is not {verb}: {reason}. "
            "A run that resumes from the file draws different random numbers there.",
            stacklevel=5,
        )


def _find_failing_workers(env: VecEnv, indices: Sequence[int], writes: bool) -> dict[int, str]:
    """
    Find the environments whose generator must not be accessed. An exception in a worker process of SubprocVecEnv terminates
    the worker, so each worker first tests the access by means of :class:`_AccessProbe`, which catches the exception.

    :return: index of each such environment, and the reason
    """
    if not isinstance(env.unwrapped, SubprocVecEnv) or not indices:
        return {}
    try:
        wrapped = env.env_is_wrapped(gym.Wrapper, indices)
        failing = env.env_is_wrapped(_AccessProbe(writes), indices)  # type: ignore[arg-type]
    except Exception as error:
        return dict.fromkeys(indices, repr(error))
    raises = "reading, pickling or setting it raises an exception" if writes else "reading or pickling it raises an exception"
    unknown = "SubprocVecEnv cannot test the access unless the environment has a wrapper, such as Monitor"
    answers = zip(indices, wrapped, failing)
    return {i: raises if fails else unknown for i, has_wrapper, fails in answers if fails or not has_wrapper}


class _AccessProbe:
    """
    Tests in a worker process whether access to ``np_random`` raises an exception. It takes the place of the wrapper class in
    ``VecEnv.env_is_wrapped``: the worker evaluates ``isinstance(env, _AccessProbe(...))`` for each wrapper.

    :param writes: whether the test includes setting the generator (to its present value)
    """

    def __init__(self, writes: bool):
        self.writes = writes

    def __instancecheck__(self, env: gym.Wrapper) -> bool:
        try:
            generator = env.get_wrapper_attr("np_random")
            # As the worker would send it
            ForkingPickler.dumps(generator)
            if self.writes:
                env.np_random = generator
        except Exception:
            return True
        return False


def _state_of(generator: np.random.Generator) -> State:
    """:raises TypeError: if the bit generator is not one of NumPy's: only these can be restored from their state"""
    bit_generator = generator.bit_generator
    name = type(bit_generator).__name__
    if type(bit_generator) is not getattr(np.random, name, None):
        raise TypeError(f"its bit generator, {name}, is not one of NumPy's")
    return _to_plain(bit_generator.state)


def _to_plain(state: Any) -> Any:
    """:return: the state of a NumPy bit generator, its arrays encoded as text"""
    if isinstance(state, dict):
        return {key: _to_plain(part) for key, part in state.items()}
    return encode(state) if isinstance(state, np.ndarray) else state


def _from_plain(state: State) -> State:
    """Inverse of :func:`_to_plain`."""
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
