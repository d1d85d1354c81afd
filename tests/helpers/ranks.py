"""Processes that form a process group of torch.distributed, on this machine."""

import multiprocessing as mp
import pickle
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist

#: Seconds until processes that have not ended are killed, which fails the test
DEADLINE = 120


def _run(
    rank: int, size: int, folder: Path, timeout: float, backend: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    # See test_cuda.py
    for message in ("You are trying to run", "Attempting to run cuBLAS"):
        warnings.filterwarnings("ignore", message, UserWarning)
    th.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        outcome = function(*args)
    except Exception as error:
        outcome = error
    (folder / f"outcome_{rank}").write_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()


def in_ranks(
    function: Callable[..., Any], *args: Any, folder: Path, size: int = 2, timeout: float = 60.0, backend: str = "gloo"
) -> list[Any]:
    """
    :param function: of a module, called in each of ``size`` new processes, which form a process group
    :param folder: a new one, for the processes to find each other and for what they return
    :param timeout: of the process group, in seconds
    :param backend: of the process group
    :return: for each rank what the function returned or raised; its exit code, if it left without either
    """
    folder.mkdir()
    # See conftest.py: what takes seconds to import is imported once
    context = mp.get_context("forkserver")
    common = (size, folder, timeout, backend, function, args)
    processes = [context.Process(target=_run, args=(rank, *common)) for rank in range(size)]
    deadline = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in processes), "a rank waits for ever"
    finally:
        for process in processes:
            process.kill()
    outcomes = [folder / f"outcome_{rank}" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else p.exitcode for file, p in zip(outcomes, processes)]
