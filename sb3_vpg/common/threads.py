"""
Threads for small networks: PyTorch's own, which share each operation, wait for each other more than they work there. Ours take
whole chunks of a batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeVar

import torch as th

Chunk = TypeVar("Chunk")
Rest = TypeVar("Rest")


@contextmanager
def one_thread() -> Iterator[None]:
    """Each operation of PyTorch on one thread, and then again on as many as before."""
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    # PyTorch's number of threads is set for each thread on its own
    return ThreadPoolExecutor(n_threads, thread_name_prefix="sb3_vpg", initializer=partial(th.set_num_threads, 1))


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def accumulate_gradients(
    loss_of: Callable[[Chunk], tuple[th.Tensor, Rest]],
    chunks: Iterable[Chunk],
    parameters: Iterable[th.nn.Parameter],
    n_threads: int = 1,
) -> Iterator[Rest]:
    """
    Add the gradient of the sum of the losses of all chunks to ``grad`` of the parameters. The sums are taken in the order of
    the chunks: the number of threads does not change the result. With several, to be called within :func:`one_thread`.

    :param loss_of: the loss of a chunk, and what else is to be told of it; called in threads, if there are several
    :param chunks: parts of a batch
    :param parameters: others are left alone
    :param n_threads: number of chunks at a time
    :return: what ``loss_of`` told of each chunk, in order
    """
    # Some may have been frozen since
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if n_threads == 1:
        for chunk in chunks:
            loss, rest = loss_of(chunk)
            loss.backward(inputs=parameters)
            yield rest
        return

    def gradient_of(chunk: Chunk) -> tuple[tuple[th.Tensor | None, ...], Rest]:
        loss, rest = loss_of(chunk)
        return th.autograd.grad(loss, parameters, allow_unused=True), rest

    for gradient, rest in _pool(n_threads).map(gradient_of, chunks):
        for parameter, part in zip(parameters, gradient):
            if part is None:
                continue
            if parameter.grad is None:
                # Optimizers expect it to lie in memory as the parameter does
                parameter.grad = th.zeros_like(parameter)
            parameter.grad += part
        yield rest
