"""
The states of the random number generators that a training draws from, in the form of plain data: a run that goes on from them
draws what it would have drawn.
"""

import base64
import random
from contextlib import suppress
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv


def get_random_states(env: VecEnv | None) -> dict[str, Any]:
    """
    :param env: environments; their generators are ``np_random``, as gymnasium's API has it. Generators of other names are
        theirs alone.
    :return: states of Python's, NumPy's and PyTorch's global generators and of the environments', as JSON can hold them
    """
    version, python_state, gauss_next = random.getstate()
    # SB3 seeds the global generator, and environments and callbacks may draw from it
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    key = encode(numpy_state["state"]["key"])
    states: dict[str, Any] = {
        "python": [version, encode(np.array(python_state, np.uint32)), gauss_next],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": encode(th.get_rng_state().numpy()),
        "cuda": [encode(state.numpy()) for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else [],
        "environments": [],
    }
    # Without those of environments that have none of their own, or whose processes have ended
    with suppress(AttributeError, NotImplementedError, EOFError, OSError):
        if env is not None:
            states["environments"] = [generator.bit_generator.state for generator in env.get_attr("np_random")]
    return states


def set_random_states(states: dict[str, Any], env: VecEnv) -> None:
    """
    :param states: as :func:`get_random_states` returned them
    :param env: environments, which will not use seeds that they have been given for their next reset; where their number is
        another one, their generators are left as they are
    """
    version, python_state, gauss_next = states["python"]
    random.setstate((version, tuple(decode(python_state, np.uint32).tolist()), gauss_next))
    numpy_state = states["numpy"]
    key = decode(numpy_state["state"]["key"], np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})  # noqa: NPY002
    th.set_rng_state(th.from_numpy(decode(states["torch"], np.uint8)))
    if states["cuda"] and th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(decode(state, np.uint8)) for state in states["cuda"]])
    if len(states["environments"]) == env.num_envs:
        env.unwrapped._reset_seeds()
        for i, state in enumerate(states["environments"]):
            generator = np.random.default_rng()
            generator.bit_generator.state = state
            env.set_attr("np_random", generator, indices=i)


def encode(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
