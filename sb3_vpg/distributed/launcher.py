"""Run the zoo's training command in the processes that ``torchrun`` has started: ``torchrun ... -m sb3_vpg train``."""

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

#: Seconds that a rank waits for the others; the environment variable overrides the default
TIMEOUT_VARIABLE, TIMEOUT = "SB3_VPG_TIMEOUT", 600.0
#: File in the folder of a training run that holds the id of its torchrun job
JOB_FILE = "torchrun_job.txt"


def launched_by_torchrun() -> bool:
    """:return: whether this process was started by torchrun"""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Context with a process group of all processes that torchrun has started. If each has a GPU, NCCL connects the GPUs."""
    backend = "gloo"
    # NCCL refuses two processes on one GPU
    if th.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        backend = "cpu:gloo,cuda:nccl"
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT)))
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart by torchrun, the store still has the addresses of the previous processes
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


def run_in_process_group(function: Callable[..., None], *args: Any) -> None:
    """Call the function in a process group. Only rank 0 prints and warns."""
    from torch.distributed.elastic.multiprocessing.errors import record

    with process_group() as processes, ExitStack() as silence:
        if processes.rank > 0:
            silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        # torchrun reads the recorded errors, and shows the one of the process that failed first
        record(function)(*args)


def job_id() -> str:
    """:return: an id of the torchrun job, the same after each restart and different in each job"""
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    # torchrun's id is "none" unless --rdzv-id is given
    return f"{socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id


def restarted_by_torchrun() -> bool:
    """:return: whether torchrun has restarted the processes after a failure"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def last_model_of_this_job(folder: Path, env_name: str) -> Path | None:
    """
    :param folder: folder with the training runs of an algorithm
    :param env_name: name of the environment
    :return: the newest model that this torchrun job has saved before its restart (a checkpoint, or the model of an
        interrupted run); None if there is none
    """
    files = [file for file in folder.glob(f"{env_name}_*/{env_name}/{JOB_FILE}") if file.read_text() == job_id()]
    runs = [file.parent.parent for file in files]
    models = [path for run in runs for pattern in ("rl_model_*_steps.zip", f"{env_name}.zip") for path in run.glob(pattern)]
    return max(models, key=lambda path: path.stat().st_mtime, default=None)
