"""Layers of a network as functions, without the overhead of calling modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

Layer = Callable[[th.Tensor], th.Tensor]
ModuleType = TypeVar("ModuleType", bound=nn.Module)


class _LinearTanh(th.autograd.Function):
    """
    tanh(x W^T + b), faster than PyTorch's own layers on a CPU:

    - NumPy's vectorized tanh takes a fifth of the time of PyTorch's (results differ in the last bit).
    - The gradient of W is computed as (x^T g)^T. PyTorch computes g^T x, which takes five times as long if x has few columns,
      such as observations of classic control.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        y = _linear_tanh(x.detach(), weight.detach(), bias.detach())
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: th.Tensor) -> tuple[th.Tensor | None, th.Tensor, th.Tensor]:
        x, weight, y = ctx.saved_tensors
        grad_z = th.ops.aten.tanh_backward(grad_y, y)
        grad_x = grad_z @ weight if ctx.needs_input_grad[0] else None
        return grad_x, (x.T @ grad_z).T, grad_z.sum(dim=0)


def _linear_tanh(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    y = th.addmm(bias, x, weight.T)
    np.tanh(y.numpy(), out=y.numpy())
    return y


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks: hooks of this module, or global hooks."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook()


def needs_whole_batch(module: nn.Module, n_ranks: int) -> bool:
    """
    :param module: a policy
    :param n_ranks: number of ranks, among which a batch is split
    :return: whether a batch cannot be split: batch normalization uses statistics of all of it
    :raises ValueError: if so, and there are several ranks
    """
    found = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    if found and n_ranks > 1:
        raise ValueError(
            "Batch normalization in the policy's networks needs the whole batch, but the batch is split across "
            f"{n_ranks} ranks; allowed: torch.nn.LayerNorm or GroupNorm, or one process"
        )
    return found


@contextmanager
def buffers_kept_on_error(module: nn.Module) -> Iterator[None]:
    """Context in which an error leaves the buffers unchanged: batch normalization changes its statistics in each pass."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    except BaseException:
        for buffer, value in zip(module.buffers(), before):
            buffer.copy_(value)
        raise


def is_plain(module: nn.Module | None, kind: type[ModuleType]) -> TypeGuard[ModuleType]:
    """Whether the module is exactly of this class: not of a subclass, and without a replaced ``forward()``."""
    return type(module) is kind and "forward" not in vars(module)


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether the module is a linear layer that NumPy can compute: with a bias, in single precision, on a CPU."""
    if not is_plain(module, nn.Linear) or module.bias is None:
        return False
    return module.weight.is_cpu and module.weight.dtype == th.float32


def _fuse_tanh(linear: nn.Linear) -> Layer:
    """:return: the linear layer and a tanh, as one function"""
    weight, bias = linear.weight, linear.bias

    def layer(x: th.Tensor) -> th.Tensor:
        return _LinearTanh.apply(x, weight, bias) if th.is_grad_enabled() else _linear_tanh(x, weight, bias)

    return layer


def make_layers(*modules: nn.Module) -> list[Layer]:
    """
    Build the functions that compute a sequence of layers, without the overhead of calling modules:

    - a Linear followed by a Tanh becomes one function (on a CPU, in single precision)
    - other modules are replaced by their ``forward()``: for a small layer, ``Module.__call__`` takes half of the time
    - modules with hooks are kept

    :param modules: layers, in order
    :return: functions to call in order
    """
    layers: list[Layer] = []
    previous: nn.Module | None = None
    for module in modules:
        if is_plain(module, nn.Tanh) and is_plain_linear(previous) and not has_hooks(previous) and not has_hooks(module):
            layers[-1] = _fuse_tanh(previous)
        else:
            layers.append(module if has_hooks(module) else module.forward)
        previous = module
    return layers
