"""Identify the environment that failed, and terminate the remaining worker processes."""

import traceback
from contextlib import suppress
from types import FrameType

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

#: Errors that the main process gets when a worker process of ``SubprocVecEnv`` has exited
LOST_WORKER_ERRORS = (EOFError, ConnectionError)
# Seconds to wait for a worker with a closed pipe to exit. A worker that is alive after that is not the one that failed
EXIT_TIMEOUT = 2.0


def is_raised_by(env: VecEnv, error: BaseException, method: str | None = None) -> bool:
    """:return: whether a method of the environments, or this one, raised the error: a callback may lose a connection, too"""
    return any(method in (None, frame.f_code.co_name) for frame in _frames_within(env, error))


def _frames_within(env: VecEnv, error: BaseException) -> list[FrameType]:
    """:return: the frames of the error's traceback that are methods of the environments"""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [frame for frame in frames if frame.f_locals.get("self") is env.unwrapped]


def discard_answers(env: VecEnv) -> None:
    """Receive what worker processes have answered to a call that was interrupted: the next answer would be taken for it."""
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv) and not base.closed:
        # A worker that has exited is found at the reset
        with suppress(*LOST_WORKER_ERRORS):
            for remote in base.remotes:
                remote.send(("get_spaces", None))
                while not _are_spaces(remote.recv()):
                    pass
            base.waiting = False


def _are_spaces(answer: object) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(part, gym.Space) for part in answer)


def find_failed_environment(env: VecEnv, error: Exception) -> tuple[int | None, str]:
    """
    Find the environment that failed. If a worker process of a ``SubprocVecEnv`` has exited, the other workers are terminated
    and the ``SubprocVecEnv`` is closed.

    :param env: the environments
    :param error: the error that stepping or resetting them raised
    :return: index of the environment (None if unknown), and a description of the failure
    """
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv) and isinstance(error, LOST_WORKER_ERRORS):
        return _find_lost_worker(base)
    index = None
    if isinstance(base, DummyVecEnv):
        for frame in _frames_within(env, error):
            if "env_idx" in frame.f_locals:
                index = frame.f_locals["env_idx"]
    return index, f"{type(error).__name__}: {error}"


def _find_lost_worker(env: SubprocVecEnv) -> tuple[int | None, str]:
    exited: list[int] = []
    for i, process in enumerate(env.processes):
        process.join(0.0 if exited else EXIT_TIMEOUT / len(env.processes))
        if not process.is_alive():
            exited.append(i)
    exit_codes = {i: env.processes[i].exitcode for i in exited}
    for process in env.processes:
        process.terminate()
    for process in env.processes:
        process.join()
    for remote in env.remotes:
        remote.close()
    # close() would send messages to workers that no longer exist
    env.waiting, env.closed = False, True
    if not exited:
        return None, "the connection to its process was lost"
    others = f" (and those of {', '.join(map(str, exited[1:]))})" if len(exited) > 1 else ""
    code = exit_codes[exited[0]]
    cause = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}; its own error is printed above"
    return exited[0], f"its process{others} {cause}. The other processes were terminated"
