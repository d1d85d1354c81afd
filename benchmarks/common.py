"""What the benchmarks share: processes, statistics, one thread."""

import os

# Before NumPy and torch are imported: the networks are small, more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing as mp
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.stats import bootstrap, trim_mean

T = TypeVar("T")


def interquartile_mean(scores: Sequence[float]) -> str:
    """
    Interquartile mean over seeds, and its 95 % percentile bootstrap interval
    (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264).
    """
    x = np.asarray(scores, dtype=np.float64)
    mean = trim_mean(x, 0.25)
    if len(x) < 2 or np.ptp(x) == 0:
        return f"{mean:.1f}"
    low, high = bootstrap(
        (x,), lambda s, axis: trim_mean(s, 0.25, axis=axis), method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def result_line(
    name: str, scores: Sequence[float], seconds: Sequence[float], threshold: float | None = None, details: str = ""
) -> str:
    """
    :param scores: one for each seed
    :param seconds: of training, one for each seed
    :param details: to stand between the scores and the seconds
    :return: name, interquartile mean [interval], how many seeds reach the threshold, the details, median seconds, the seeds'
        scores
    """
    reached = "" if threshold is None else f">= {threshold}: {sum(s >= threshold for s in scores)}/{len(scores)}"
    each = " ".join(f"{score:.0f}" for score in scores)
    columns = (f"{name:>28}", f"{interquartile_mean(scores):>24}", reached, details, f"{np.median(seconds):6.1f} s", each)
    return "  ".join(filter(None, columns))


def in_processes(function: Callable[[Any], T], jobs: list[Any], n_processes: int) -> Iterator[T]:
    """Results of ``function`` for all jobs, in order, computed in fresh processes."""
    with mp.get_context("spawn").Pool(n_processes, maxtasksperchild=1) as pool:
        yield from pool.imap(function, jobs, chunksize=1)
