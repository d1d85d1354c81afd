"""Which of many environments has failed, and nothing left running behind it."""

import traceback

from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

#: What the loss of a worker process looks like from the other end of the pipe
LOST_WORKER = (EOFError, ConnectionError)
# A worker whose pipe is closed is about to end: seconds that it is given before it is taken for one that lives
SECONDS_TO_END = 2.0


def failed_environment(env: VecEnv, error: Exception) -> tuple[int | None, str]:
    """
    Find out what has failed. The processes of a ``SubprocVecEnv`` that has lost one of them are ended, and it is closed.

    :param env: the environments
    :param error: what stepping or resetting them has raised
    :return: index of the environment, None if that is not known; what happened to it
    """
    base = env.unwrapped
    if isinstance(base, SubprocVecEnv) and isinstance(error, LOST_WORKER):
        return _lost_worker(base)
    index = None
    if isinstance(base, DummyVecEnv):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_locals.get("self") is base and "env_idx" in frame.f_locals:
                index = frame.f_locals["env_idx"]
    return index, f"{type(error).__name__}: {error}"


def _lost_worker(env: SubprocVecEnv) -> tuple[int | None, str]:
    ended: list[int] = []
    for i, process in enumerate(env.processes):
        process.join(0.0 if ended else SECONDS_TO_END / len(env.processes))
        if not process.is_alive():
            ended.append(i)
    codes = {i: env.processes[i].exitcode for i in ended}
    for process in env.processes:
        process.terminate()
    for process in env.processes:
        process.join()
    for remote in env.remotes:
        remote.close()
    # There is nobody left whom close() could tell
    env.waiting, env.closed = False, True
    if not ended:
        return None, "the connection to its process was lost"
    others = f" (and those of {', '.join(map(str, ended[1:]))})" if len(ended) > 1 else ""
    code = codes[ended[0]]
    how = f"was killed by signal {-code}" if code < 0 else f"has ended with exit code {code}; its own error is printed above"
    return ended[0], f"its process{others} {how}. The others have been ended"
