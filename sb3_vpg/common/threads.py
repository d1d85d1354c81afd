"""
Threads for small networks.

PyTorch splits each operation across its threads. For small networks, synchronizing these threads costs more than the
computation. Here, each thread processes whole chunks of a batch instead.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch as th

Chunk = TypeVar("Chunk")
Extra = TypeVar("Extra")


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which PyTorch runs each operation on one thread."""
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    # PyTorch's number of threads is a setting of each thread
    return ThreadPoolExecutor(n_threads, thread_name_prefix="sb3_vpg", initializer=partial(th.set_num_threads, 1))


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Gradient:
    """
    The gradient of a number that depends on some outputs of networks, by PyTorch's automatic differentiation.

    :param outputs: the outputs
    :param derivatives: derivatives of the number by the outputs
    """

    def __init__(self, outputs: Sequence[th.Tensor], derivatives: Sequence[th.Tensor]):
        self._outputs, self._derivatives = outputs, derivatives

    def add_to(self, parameters: Sequence[th.nn.Parameter], to_zero: bool = False) -> None:
        """Add the gradient to ``grad`` of the parameters. ``to_zero`` says that it is zero or None."""
        th.autograd.backward(self._outputs, self._derivatives, inputs=parameters)

    def of(self, parameters: Sequence[th.nn.Parameter]) -> tuple[th.Tensor | None, ...]:
        """:return: the gradients of the parameters; None if the number does not depend on a parameter"""
        return th.autograd.grad(self._outputs, parameters, self._derivatives, allow_unused=True)


def accumulate_gradients(
    compute_gradient: Callable[[Chunk], tuple[Any, Extra]],
    chunks: Iterable[Chunk],
    parameters: Iterable[th.nn.Parameter],
    n_threads: int = 1,
) -> Iterator[Extra]:
    """
    Compute the gradient of the sum of the losses of all chunks, and add it to ``grad`` of the parameters, which is zero or
    None at first. Gradients are added in the order of the chunks, so the number of threads does not change the result. With
    more than one thread, call it within :func:`one_thread`.

    :param compute_gradient: returns the :class:`Gradient` of the loss of a chunk, and any further result; called from several
        threads if ``n_threads`` > 1
    :param chunks: parts of a batch
    :param parameters: the parameters whose gradients are computed
    :param n_threads: number of chunks that are processed in parallel, >= 1
    :return: the further result of each chunk, in order
    """
    # Parameters may have been frozen since the groups were made
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if n_threads == 1:
        for k, chunk in enumerate(chunks):
            gradient, extra = compute_gradient(chunk)
            gradient.add_to(parameters, to_zero=k == 0)
            yield extra
        return

    def compute(chunk: Chunk) -> tuple[tuple[th.Tensor | None, ...], Extra]:
        gradient, extra = compute_gradient(chunk)
        return gradient.of(parameters), extra

    for gradients, extra in _pool(n_threads).map(compute, chunks):
        for parameter, part in zip(parameters, gradients):
            if part is None:
                continue
            if parameter.grad is None:
                # Optimizers expect gradient and parameter to have the same memory layout
                parameter.grad = th.zeros_like(parameter)
            parameter.grad += part
        yield extra
