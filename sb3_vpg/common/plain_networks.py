"""
Networks of linear layers with a tanh between them, forward and backward by hand.

PyTorch's automatic differentiation records and calls some sixty small functions for each batch. With layers of 64 and a few
hundred steps, calling them takes longer than computing them.
"""

import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_vpg.common.distribution_heads import NumPyHead
from sb3_vpg.common.layers import has_hooks, is_plain, is_plain_linear
from sb3_vpg.common.threads import Gradient

#: Largest size (in numbers) of memory that is kept for a layer between calls
LARGEST_BUFFER = 2**20
#: Number of shapes for which views of this memory are kept
MOST_VIEWS = 64

_tanh_backward = th.ops.aten.tanh_backward.grad_input


class _Buffers(threading.local):
    """
    Memory for intermediate results, one for each thread. It is kept between calls: the operating system would clear new memory
    each time, which takes as long as a matrix product with 64 columns.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], th.Tensor] = {}
        self._views: dict[tuple[str, int, int, int], tuple[th.Tensor, np.ndarray]] = {}

    def get(self, role: str, layer: int, n: int, width: int) -> tuple[th.Tensor, np.ndarray]:
        """:return: memory of shape (n, width) for PyTorch and NumPy, which the next call with this role and layer uses"""
        key = (role, layer, n, width)
        if key in self._views:
            return self._views[key]
        size = n * width
        if size > LARGEST_BUFFER:
            view = th.empty(n, width, dtype=th.float32, device="cpu")
            return view, view.numpy()
        buffer = self._buffers.get((role, layer))
        if buffer is None or len(buffer) < size or len(self._views) == MOST_VIEWS:
            # Views of the old memory would keep it
            self._views.clear()
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[role, layer] = th.empty(size, dtype=th.float32, device="cpu")
        view = buffer[:size].view(n, width)
        self._views[key] = view, view.numpy()
        return self._views[key]


_buffers = _Buffers()


class PlainNetwork:
    """
    h_k = tanh(h_{k-1} W_k^T + b_k), the last layer without the tanh. It uses the memory of the modules' weights.

    Two networks with different roles can be used at the same time in a thread.

    :param linears: the linear layers
    :param role: "actor" or "critic"
    """

    def __init__(self, linears: Sequence[nn.Linear], role: str):
        self._role = role
        #: weight and bias of each layer
        self.parameters: list[th.Tensor] = [parameter for linear in linears for parameter in (linear.weight, linear.bias)]
        self._layers = [(linear.weight.detach(), linear.bias.detach()) for linear in linears]

    def forward(self, x: th.Tensor) -> list[th.Tensor]:
        """
        :param x: inputs, shape (N, features)
        :return: the input of each layer, and the output of the last. The next call in this thread overwrites the inputs of
            hidden layers
        """
        inputs = [x]
        for k, (weight, bias) in enumerate(self._layers[:-1]):
            h, array = _buffers.get(self._role, k, x.shape[0], bias.shape[0])
            th.addmm(bias, inputs[-1], weight.T, out=h)
            np.tanh(array, out=array)
            inputs.append(h)
        weight, bias = self._layers[-1]
        return [*inputs, th.addmm(bias, inputs[-1], weight.T)]

    def gradients(self, inputs: Sequence[th.Tensor], derivative: th.Tensor, out: Sequence[th.Tensor]) -> None:
        """
        :param inputs: the input of each layer
        :param derivative: derivative of a number by the output of the last layer, shape (N, outputs)
        :param out: memory for the gradients of this number, in the order and the memory layout of ``parameters``
        """
        for k in reversed(range(len(self._layers))):
            h, (weight, _) = inputs[k], self._layers[k]
            of_weight, of_bias = out[2 * k : 2 * k + 2]
            if h.shape[1] < derivative.shape[1]:
                # The product with few rows is the faster one
                of_weight.copy_((h.T @ derivative).T)
            else:
                th.mm(derivative.T, h, out=of_weight)
            th.sum(derivative, dim=0, out=of_bias)
            if k > 0:
                buffer, _ = _buffers.get("backward", k, *h.shape)
                th.mm(derivative, weight, out=buffer)
                derivative = _tanh_backward(buffer, h, grad_input=buffer)


def make_plain_network(role: str, *modules: nn.Module) -> PlainNetwork | None:
    """
    :param role: "actor" or "critic"
    :param modules: layers, in order
    :return: the network; None unless it consists of alternating Linear and Tanh, without hooks, in single precision on a CPU
    """
    linears, activations = modules[::2], modules[1::2]
    if len(linears) != len(activations) + 1 or any(map(has_hooks, modules)):
        return None
    if not all(map(is_plain_linear, linears)) or not all(is_plain(module, nn.Tanh) for module in activations):
        return None
    return PlainNetwork(linears, role)  # type: ignore[arg-type]


def has_gradient_hooks(parameter: th.Tensor) -> bool:
    """Whether the parameter has a hook that sees or changes its gradient."""
    hooks: Any = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return bool(hooks)


#: A network, the inputs of its layers, and the derivative of a number by its outputs
BackwardPass = tuple[PlainNetwork, Sequence[th.Tensor], th.Tensor]


class PlainEvaluation:
    """
    The same as :class:`sb3_vpg.common.policy_runner.Evaluation`, by hand.

    :param x: N observations
    :param actor: the head, the network before it, and N actions; None if only values are needed
    :param critic: the network of the values; None if they are not needed
    :param inputs: further inputs of the policy
    """

    log_prob: th.Tensor
    entropy: th.Tensor
    values: th.Tensor | None = None

    def __init__(
        self,
        x: th.Tensor,
        actor: tuple[NumPyHead, PlainNetwork, th.Tensor] | None,
        critic: PlainNetwork | None,
        **inputs: th.Tensor,
    ):
        self._actor, self._critic = actor, critic
        if actor is not None:
            head, network, actions = actor
            *self._actor_inputs, outputs = network.forward(x)
            with th.no_grad():
                self._distributions = head.parameters(outputs, **inputs)
                self.log_prob, self.entropy = head.terms(self._distributions, actions)
        if critic is not None:
            *self._critic_inputs, values = critic.forward(x)
            self.values = values.flatten()

    def gradient(
        self, by_values: th.Tensor | None, by_log_prob: th.Tensor | None = None, by_entropy: float = 0.0
    ) -> "PlainGradient":
        """See :meth:`sb3_vpg.common.policy_runner.Evaluation.gradient`."""
        parts: list[tuple[th.Tensor, th.Tensor]] = []
        passes: list[BackwardPass] = []
        if self._actor is not None and by_log_prob is not None:
            head, network, actions = self._actor
            with th.no_grad():
                by_outputs, parts = head.gradient(self._distributions, actions, by_log_prob, by_entropy)
            passes.append((network, self._actor_inputs, by_outputs))
        if self._critic is not None and by_values is not None:
            passes.append((self._critic, self._critic_inputs, by_values.unsqueeze(1)))
        return PlainGradient(parts, passes)


class PlainGradient(Gradient):
    """
    The same by hand. It is computed by the methods, which must be called before the networks are used again.

    :param parts: parameters and their gradients
    :param passes: networks, inputs of their layers, and derivatives by their outputs
    """

    def __init__(self, parts: list[tuple[th.Tensor, th.Tensor]], passes: list[BackwardPass]):
        self._parts, self._passes = parts, passes

    def _compute(self, in_place: Collection[int] = ()) -> list[tuple[th.Tensor, th.Tensor]]:
        """
        :param in_place: ids of parameters whose ``grad`` is zero or None
        :return: parameters and gradients, without those of networks whose gradients were written to ``grad``
        """
        parts = [*self._parts]
        for network, inputs, derivative in self._passes:
            written = all(id(p) in in_place and p.grad is not None for p in network.parameters)
            gradients: Any = [p.grad if written else th.empty_like(p) for p in network.parameters]
            network.gradients(inputs, derivative, gradients)
            if not written:
                parts += zip(network.parameters, gradients)
        return parts

    def add_to(self, parameters: Sequence[nn.Parameter], to_zero: bool = False) -> None:
        wanted = set(map(id, parameters))
        for parameter, gradient in self._compute(wanted if to_zero else ()):
            if id(parameter) in wanted and parameter.grad is not None:
                parameter.grad += gradient
            elif id(parameter) in wanted:
                parameter.grad = gradient

    def of(self, parameters: Sequence[nn.Parameter]) -> tuple[th.Tensor | None, ...]:
        gradients = {id(parameter): gradient for parameter, gradient in self._compute()}
        return tuple(gradients.get(id(parameter)) for parameter in parameters)
