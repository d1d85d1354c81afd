"""Functions that the benchmarks share: processes, statistics, speed and result files. The default is one thread."""

import os

# Set before NumPy and torch are imported. For small networks, one thread is faster than several
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing as mp
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def median_and_range(values: Sequence[float] | np.ndarray) -> str:
    return f"{np.median(values):.2f} [{np.min(values):.2f}, {np.max(values):.2f}]"


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """:return: the JSON objects in a file, one per line; none if there is no file"""
    return [json.loads(line) for line in path.read_text().splitlines()] if path is not None and path.exists() else []


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_processes(function: Callable[[Any], T], jobs: list[Any], n_processes: int) -> Iterator[T]:
    """Yield the results of ``function`` for all jobs, in order. Each job runs in a new process."""
    with mp.get_context("spawn").Pool(n_processes, maxtasksperchild=1) as pool:
        yield from pool.imap(function, jobs, chunksize=1)


def frames_per_second(
    run: Callable[[int], int], n_frames: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """
    Measure the speed of ``run``. A first call, which is not measured, warms up.

    :param run: runs for at least the given number of frames, and returns the actual number
    :param n_frames: minimum number of frames of a call, such as one rollout
    :param seconds: approximate duration of the measurement
    :param clock: the time in seconds; ``time.process_time`` for processor time, if other programs use the machine
    :return: frames per second
    """
    gc.collect()
    run(n_frames)
    while True:
        start = clock()
        n_done = run(n_frames)
        elapsed = clock() - start
        if elapsed > seconds / 2:
            return n_done / elapsed
        # Too short for a measurement: at least twice as many frames in the next call
        n_frames = int(n_done * max(2.0, seconds / elapsed))


def machine() -> dict[str, Any]:
    """:return: processor and versions of packages, saved with the results"""
    cpu, cpu_info = platform.processor(), Path("/proc/cpuinfo")
    if cpu_info.exists():
        fields = (line.partition(":") for line in cpu_info.read_text().splitlines())
        cpu = next((value.strip() for name, _, value in fields if name.strip() == "model name"), cpu)
    packages = ("sb3_vpg", "stable_baselines3", "rl_zoo3", "torch", "gymnasium", "numpy", "tianshou", "envpool")
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    import torch as th

    gpu = {"gpu": th.cuda.get_device_name()} if th.cuda.is_available() else {}
    return {"cpu": cpu, "cores": os.cpu_count(), **gpu, "python": platform.python_version(), **versions}


def save(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write results, machine and arguments to the JSON file ``args.output``, if there is one."""
    if args.output is None:
        return
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    text = json.dumps({"machine": machine(), "settings": settings, "results": results}, indent=1)
    args.output.write_text(text + "\n")
