"""Multilayer perceptrons that call few operators, and those that are fastest on the processor."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _processor() -> str:
    """:return: a description that names the maker, as far as the system gives one"""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()


# On CPU, torch sends Linear layers to MKL. On AMD processors with AVX-512, oneDNN, which torch brings for convolutions, is a
# little to twice as fast for large products, and on Intel's as fast; without AVX-512, it is not. oneDNN also applies bias and
# ReLU on the way. The operator is the one that torch.compile uses; without it, all products go to MKL.
_has_onednn = th.backends.mkldnn.is_available() and th.backends.cpu.get_cpu_capability() == "AVX512"
_onednn_linear: Any = getattr(th.ops.mkldnn, "_linear_pointwise", None) if _has_onednn else None

# Products with fewer multiplications than this are as fast in MKL, because calling it costs less
_MIN_PRODUCT = 2**24

# The same for gradients of weights and inputs: MKL takes the transposed factors as they are and writes gradients of weights to
# their place, which makes it as fast to twice as fast on Intel's processors
_is_amd = "AuthenticAMD" in _processor()
_MIN_WEIGHT_PRODUCT = 2**23 if _is_amd else math.inf
_MIN_INPUT_PRODUCT = _MIN_PRODUCT if _is_amd else math.inf

# Gradients of weights from batches smaller than this are more memory to write than multiplications, and MKL writes them once
_MIN_WEIGHT_ROWS = 64

# Networks are computed in numpy up to so many multiplications. OpenBLAS divides larger products among threads, and these wait
# long for each other on a busy machine.
_MAX_NUMPY_PRODUCT = 2**18

# Without gradients, so many rows go through all layers at a time: what lies between the layers stays in the processor's cache,
# and the memory for it is used again instead of being returned to the system and fetched anew
_BLOCK_ROWS = 512

# The same for products with the Jacobian, which call more operators for a block
_GRADIENT_BLOCK_ROWS = 2048


class MLP(nn.Sequential):
    """
    A sequence of layers that behaves as ``nn.Sequential``, and is faster on CPU if it is plain: ``Linear`` layers with biases
    and the same activation, ``ReLU`` or ``Tanh``, between them.

    Hooks of the single layers are not called, and layers must not be replaced later.

    :param layers: As ``create_mlp`` returns them
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        # Looked up once, because a module looks for its parameters slowly
        self._weights = [linear.weight for linear in self._linears]
        self._weights_and_biases = [parameter for linear in self._linears for parameter in (linear.weight, linear.bias)]
        hidden_layers = [layer for layer in layers if not isinstance(layer, nn.Linear)]
        #: Between the layers, if the network is plain
        self.activation_fn = type(hidden_layers[0]) if hidden_layers else nn.ReLU
        # Linear, ReLU, Linear, ReLU, ..., Linear
        alternating = [self.activation_fn if index % 2 else nn.Linear for index in range(2 * len(self._linears) - 1)]
        #: Whether the methods below ``forward`` can be used
        self.is_plain = (
            self.activation_fn in ACTIVATIONS
            and [type(layer) for layer in layers] == alternating
            and all(linear.bias is not None for linear in self._linears)
        )

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (batch, input_dim)
        :return: (batch, output_dim)
        """
        suits = inputs.device.type == "cpu" and inputs.dtype in (th.float32, th.bfloat16) and inputs.dim() == 2
        if not (self.is_plain and suits) or is_recorded():
            return super().forward(in_type_of(self._weights[0], inputs) if self._weights else inputs)
        if th.is_grad_enabled():
            return _MLPFunction.apply(self.activation_fn, inputs, *self.weights_and_biases())
        return last_of_blocks(self.activations, inputs)

    def weights_and_biases(self) -> list[th.Tensor]:
        """
        :return: Weight (output_dim, input_dim) and bias (output_dim,) of each layer, in turns
        """
        return self._weights_and_biases

    def activations(self, inputs: th.Tensor) -> list[th.Tensor]:
        """
        :param inputs: (batch, input_dim)
        :return: The inputs and the output of each layer, after its activation function; without a graph for autograd
        """
        with without_gradients():
            return forward_layers(inputs, self.weights_and_biases(), self.activation_fn)

    def gradients(
        self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor] | None = None
    ) -> list[th.Tensor]:
        """
        The product of a vector with the Jacobian of the outputs with respect to the parameters, from the right.

        :param activations: As ``activations`` returned them
        :param grad_output: Gradient of a loss with respect to the output, (batch, output_dim)
        :param out: Where to write the result, if given
        :return: Gradient of that loss with respect to each of ``weights_and_biases``
        """
        if len(grad_output) > _GRADIENT_BLOCK_ROWS:
            first, *others = [
                self.gradients(block, block_grad_output)
                for *block, block_grad_output in _blocks(_GRADIENT_BLOCK_ROWS, *activations, grad_output)
            ]
            for other in others:
                th._foreach_add_(first, other)
            if out is not None:
                th._foreach_copy_(list(out), first)
            return first
        _, *gradients = self._all_gradients(activations, grad_output, out, of_inputs=False)
        return cast("list[th.Tensor]", gradients)

    def backward(self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor]) -> th.Tensor:
        """
        As ``gradients``, for layers that have others in front of them.

        :param activations: As ``activations`` returned them
        :param grad_output: Gradient of a loss with respect to the output, (batch, output_dim)
        :param out: Where to write its gradient with respect to each of ``weights_and_biases``
        :return: Its gradient with respect to the inputs, (batch, input_dim)
        """
        return cast(th.Tensor, self._all_gradients(activations, grad_output, out, of_inputs=True)[0])

    def _all_gradients(
        self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor] | None, of_inputs: bool
    ) -> list[th.Tensor | None]:
        wanted = [of_inputs] + [True] * len(self._weights_and_biases)
        with without_gradients():
            return backward_layers(activations[:-1], self._weights, grad_output, self.activation_fn, wanted, out)

    def tangent(self, activations: Sequence[th.Tensor], tangents: Sequence[th.Tensor]) -> th.Tensor:
        """
        The product of the Jacobian of the outputs with respect to the parameters and a vector, from the left: how fast the
        outputs change when the parameters move in a direction.

        :param activations: As ``activations`` returned them
        :param tangents: The direction, in the shapes of ``weights_and_biases``
        :return: (batch, output_dim)
        """
        if len(activations[0]) > _GRADIENT_BLOCK_ROWS:
            return th.cat([self.tangent(block, tangents) for block in _blocks(_GRADIENT_BLOCK_ROWS, *activations)])
        derivative = ACTIVATIONS[self.activation_fn].derivative
        with without_gradients():
            tangent = _multiply(activations[0], tangents[0], tangents[1])
            for layer, weight in enumerate(self._weights[1:], start=1):
                tangent = derivative(tangent, activations[layer])
                tangent = _multiply(tangent, weight, tangents[2 * layer + 1])
                tangent.addmm_(activations[layer], tangents[2 * layer].t())
        return tangent

    def as_numpy(self) -> Callable[[np.ndarray], np.ndarray]:
        """
        :return: This network, see :func:`layers_as_numpy`
        """
        return layers_as_numpy(self._weights_and_biases, self.activation_fn)


def has_hooks(*modules: nn.Module) -> bool:
    """
    :param modules: Any
    :return: Whether there is something to call when one is called, or when the gradient of a parameter of its own is computed
    """
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(parameter._backward_hooks for parameter in module.parameters(recurse=False))
        for module in modules
    )


def is_recorded() -> bool:
    """
    :return: Whether torch writes down what is computed, to export or to compile it. It sees only operators of its own.
    """
    return th.jit.is_tracing() or th.compiler.is_compiling()


def suits_numpy(n_rows: int, parameters: Iterable[th.Tensor]) -> bool:
    """
    :param n_rows: Rows of a batch
    :param parameters: Of perceptrons
    :return: Whether the perceptrons' ``as_numpy`` is faster than torch for the batch
    """
    sizes = [parameter.numel() for parameter in parameters if parameter.is_cpu]
    return 0 < n_rows * sum(sizes) <= _MAX_NUMPY_PRODUCT


def mlp(
    input_dim: int, output_dim: int, net_arch: list[int], activation_fn: type[nn.Module] = nn.ReLU, with_bias: bool = True
) -> MLP:
    """
    :param input_dim: Size of the input
    :param output_dim: Size of the output
    :param net_arch: Sizes of the hidden layers
    :param activation_fn: Activation function of the hidden layers
    :param with_bias: Whether the layers have biases
    :return: SB3's ``create_mlp`` as an :class:`MLP`
    """
    return MLP(*create_mlp(input_dim, output_dim, net_arch, activation_fn, with_bias=with_bias))


class Activation(NamedTuple):
    """
    :param onednn_name: Its name in oneDNN, if it is fastest there
    :param in_place: Apply it to a tensor
    :param derivative: (vector, output) -> the vector, in place times the derivative at the input that gave the output
    :param numpy_in_place: Apply it to an array
    """

    onednn_name: str | None
    in_place: Callable[[th.Tensor], th.Tensor]
    derivative: Callable[[th.Tensor, th.Tensor], th.Tensor]
    numpy_in_place: Callable[[np.ndarray], np.ndarray]


def _tanh_(tensor: th.Tensor) -> th.Tensor:
    # On CPU, numpy's is the faster one, but it has no bfloat16
    if not tensor.is_cpu or tensor.dtype == th.bfloat16:
        return tensor.tanh_()
    array = tensor.numpy()
    np.tanh(array, out=array)
    return tensor


#: Those of plain networks
ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(
        "relu",
        th.Tensor.relu_,
        lambda vector, output: th.ops.aten.threshold_backward.grad_input(vector, output, 0, grad_input=vector),
        lambda array: np.maximum(array, 0, out=array),
    ),
    nn.Tanh: Activation(
        None,
        _tanh_,
        lambda vector, output: th.ops.aten.tanh_backward.grad_input(vector, output, grad_input=vector),
        lambda array: np.tanh(array, out=array),
    ),
}


def without_gradients() -> AbstractContextManager[None]:
    """
    :return: A context without graphs for autograd
    """
    # Entering one that changes nothing would cost as much as a small product
    return th.no_grad() if th.is_grad_enabled() else nullcontext()


def _multiply(
    left: th.Tensor, right: th.Tensor, bias: th.Tensor | None = None, activation_fn: type[nn.Module] | None = None
) -> th.Tensor:
    """
    :param left: (n, k)
    :param right: (m, k)
    :param bias: (m,)
    :param activation_fn: Applied to the product
    :return: ``left @ right.T + bias``, (n, m)
    """
    activation = None if activation_fn is None else ACTIVATIONS[activation_fn]
    if _onednn_linear is not None and left.numel() * right.shape[0] >= _MIN_PRODUCT and left.is_cpu:
        if activation is not None and activation.onednn_name is not None:
            return _onednn_linear(left, right, bias, activation.onednn_name, [], "")
        product = _onednn_linear(left, right, bias, "none", [], "")
    else:
        product = F.linear(left, right, bias)
    return product if activation is None else activation.in_place(product)


def _weight_gradient(grad: th.Tensor, inputs: th.Tensor, out: th.Tensor | None) -> th.Tensor:
    """
    :param grad: (n, m)
    :param inputs: (n, k)
    :param out: Where to write the result, if given
    :return: ``grad.T @ inputs``, (m, k)
    """
    is_small = len(grad) < _MIN_WEIGHT_ROWS or grad.numel() * inputs.shape[1] < _MIN_WEIGHT_PRODUCT
    if out is not None and out.dtype != grad.dtype:
        return out.copy_(_weight_gradient(grad, inputs, None))
    if _onednn_linear is None or is_small:
        return th.mm(grad.t(), inputs, out=out)
    product = _multiply(grad.t(), inputs.t())
    return product if out is None else out.copy_(product)


def _input_gradient(grad: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """
    :param grad: (n, m)
    :param weight: (m, k)
    :return: ``grad @ weight``, (n, k)
    """
    if _onednn_linear is None or grad.numel() * weight.shape[1] < _MIN_INPUT_PRODUCT:
        return th.mm(grad, weight)
    return _multiply(grad, weight.t())


def _blocks(n_rows: int, *tensors: th.Tensor) -> Iterator[tuple[th.Tensor, ...]]:
    """:return: the tensors' first ``n_rows`` rows, then the next ones, and so on"""
    return zip(*[tensor.split(n_rows) for tensor in tensors], strict=True)


def last_of_blocks(activations: Callable[[th.Tensor], Sequence[th.Tensor]], inputs: th.Tensor) -> th.Tensor:
    """
    :param activations: From inputs to the output of each layer
    :param inputs: (batch, input_dim)
    :return: The last layer's outputs, computed in blocks if there are many rows, (batch, output_dim)
    """
    if len(inputs) <= _BLOCK_ROWS:
        return activations(inputs)[-1]
    return th.cat([activations(block)[-1] for (block,) in _blocks(_BLOCK_ROWS, inputs)])


def layers_as_numpy(parameters: Sequence[th.Tensor], activation_fn: type[nn.Module]) -> Callable[[np.ndarray], np.ndarray]:
    """
    For a handful of rows, where calling numpy costs less than calling torch, see :func:`suits_numpy`.

    :param parameters: Weight and bias of each layer, on CPU
    :param activation_fn: Between the layers
    :return: A function that maps float32 inputs (batch, input_dim) to outputs (batch, output_dim), with the parameters'
        values at the time of calling it, as long as their memory is not replaced
    """
    arrays = [parameter.detach().numpy() for parameter in parameters]
    weights = [(weight.T, bias) for weight, bias in zip(arrays[::2], arrays[1::2], strict=True)]
    in_place = ACTIVATIONS[activation_fn].numpy_in_place

    def forward(inputs: np.ndarray) -> np.ndarray:
        outputs = inputs @ weights[0][0]
        outputs += weights[0][1]
        for weight, bias in weights[1:]:
            outputs = in_place(outputs) @ weight
            outputs += bias
        return outputs

    return forward


def in_type_of(other: th.Tensor, tensor: th.Tensor) -> th.Tensor:
    """
    :param other: Any
    :param tensor: Any
    :return: ``tensor`` as numbers of the other's type
    """
    # Asking first costs less than calling ``to`` in vain
    return tensor if tensor.dtype == other.dtype else tensor.to(other.dtype)


def forward_layers(inputs: th.Tensor, parameters: Sequence[th.Tensor], activation_fn: type[nn.Module]) -> list[th.Tensor]:
    """
    :param inputs: (batch, input_dim)
    :param parameters: Weight and bias of each layer
    :param activation_fn: Between the layers
    :return: The inputs and the output of each layer, after its activation function. Hidden layers are computed in the type
        of the inputs, the last one in that of the parameters.
    """
    activations = [inputs]
    for index in range(0, len(parameters) - 2, 2):
        hidden = activations[-1]
        weight, bias = in_type_of(hidden, parameters[index]), in_type_of(hidden, parameters[index + 1])
        activations.append(_multiply(hidden, weight, bias, activation_fn))
    if parameters:
        weight, bias = parameters[-2:]
        activations.append(_multiply(in_type_of(weight, activations[-1]), weight, bias))
    return activations


def backward_layers(
    activations: Sequence[th.Tensor],
    weights: Sequence[th.Tensor],
    grad_output: th.Tensor,
    activation_fn: type[nn.Module],
    wanted: Sequence[bool],
    out: Sequence[th.Tensor | None] | None = None,
) -> list[th.Tensor | None]:
    """
    :param activations: The input of each layer
    :param weights: The weight of each layer
    :param grad_output: (batch, output_dim)
    :param activation_fn: Between the layers
    :param wanted: For the inputs, then weight and bias of each layer, whether their gradients are needed
    :param out: For weight and bias of each layer, where to write their gradients; None for new tensors
    :return: The gradients in the order of ``wanted``, None where they are not
    """
    derivative = ACTIVATIONS[activation_fn].derivative
    grad = grad_output
    grads: list[th.Tensor | None] = [None] * len(wanted)
    for layer in reversed(range(len(weights))):
        weight_out, bias_out = (None, None) if out is None else out[2 * layer : 2 * layer + 2]
        if wanted[1 + 2 * layer]:
            grads[1 + 2 * layer] = _weight_gradient(grad, in_type_of(grad, activations[layer]), weight_out)
        if wanted[2 + 2 * layer]:
            grads[2 + 2 * layer] = th.sum(grad, 0, dtype=None if bias_out is None else bias_out.dtype, out=bias_out)
        if not any(wanted[: 1 + 2 * layer]):
            return grads
        grad = in_type_of(activations[layer], _input_gradient(grad, in_type_of(grad, weights[layer])))
        if layer > 0:
            grad = derivative(grad, activations[layer])
    grads[0] = grad
    return grads


class _MLPFunction(th.autograd.Function):
    """All layers as one node of the graph: for small layers, the nodes cost more than the products."""

    @staticmethod
    def forward(ctx: Any, activation_fn: type[nn.Module], inputs: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        activations = forward_layers(inputs, parameters, activation_fn)
        ctx.activation_fn = activation_fn
        ctx.save_for_backward(*activations[:-1], *parameters[::2])
        return activations[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: th.Tensor) -> tuple[th.Tensor | None, ...]:
        n_layers = len(ctx.saved_tensors) // 2
        activations, weights = ctx.saved_tensors[:n_layers], ctx.saved_tensors[n_layers:]
        wanted = ctx.needs_input_grad[1:]
        return (None, *backward_layers(activations, weights, grad_outputs[0], ctx.activation_fn, wanted))
