"""
RL Baselines3 Zoo's training in the processes that ``torchrun`` has started: ``torchrun ... -m sb3_vpg train``.
"""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch as th
import torch.distributed as dist

from sb3_vpg.common.collectives import ProcessGroup

#: Seconds that a rank waits for the others; this environment variable sets others
TIMEOUT_VARIABLE, TIMEOUT = "SB3_VPG_TIMEOUT", 600.0
#: In the folder of a training: which of torchrun's jobs it is part of
JOB_FILE = "torchrun_job.txt"


def launched() -> bool:
    """:return: whether this process was started by torchrun"""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """In this context there is the process group of the processes that torchrun has started, on GPUs where there are any."""
    backend = "gloo"
    if th.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT)))
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # When torchrun starts the processes again, the store still has the addresses of those before
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


def run_together(function: Callable[..., None], *args: Any) -> None:
    """Call the function in the process group, of which rank 0 speaks for all."""
    from torch.distributed.elastic.multiprocessing.errors import record

    with joined() as processes, ExitStack() as silence:
        if processes.rank > 0:
            silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        # torchrun shows the error of the process that failed first
        record(function)(*args)


def job_id() -> str:
    """:return: the same in all attempts of one torchrun, and another one in each torchrun"""
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    # What torchrun says if it has not been told
    return f"{socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id


def restarted() -> bool:
    """:return: whether torchrun has started the processes again, after a failure"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def last_model_of_this_job(folder: Path, env_name: str) -> Path | None:
    """
    :param folder: of the trainings of an algorithm
    :return: the newest model that an earlier attempt of this job has saved, be it a checkpoint or because it was interrupted
    """
    files = [file for file in folder.glob(f"{env_name}_*/{env_name}/{JOB_FILE}") if file.read_text() == job_id()]
    runs = [file.parent.parent for file in files]
    models = [path for run in runs for pattern in ("rl_model_*_steps.zip", f"{env_name}.zip") for path in run.glob(pattern)]
    return max(models, key=lambda path: path.stat().st_mtime, default=None)
