"""Multilayer perceptrons whose matrix products run in oneDNN on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# On CPU, torch sends Linear layers to MKL. On the AMD processor of the benchmarks, oneDNN, which torch brings for
# convolutions, is more than twice as fast for large products; it also applies bias and ReLU on the way. The operator is the
# one that torch.compile uses; without it, all products go to MKL.
_onednn_linear: Any = getattr(th.ops.mkldnn, "_linear_pointwise", None) if th.backends.mkldnn.is_available() else None

# Products with fewer multiplications than this are as fast in MKL, because calling it costs less
_MIN_PRODUCT = 2**21


class MLP(nn.Sequential):
    """
    A sequence of layers that behaves as ``nn.Sequential``, and is faster on CPU if it has ``Linear`` and ``ReLU`` layers only.

    Hooks of the single layers are not called, and layers must not be replaced later.

    :param layers: As ``create_mlp`` returns them
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        # Linear, ReLU, Linear, ReLU, ..., Linear
        alternating = [nn.ReLU if index % 2 else nn.Linear for index in range(2 * len(self._linears) - 1)]
        self._is_plain = [type(layer) for layer in layers] == alternating and all(
            linear.bias is not None for linear in self._linears
        )

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (batch, input_dim)
        :return: (batch, output_dim)
        """
        if not (self._is_plain and inputs.device.type == "cpu" and inputs.dtype == th.float32 and inputs.dim() == 2):
            return super().forward(inputs)
        parameters = [parameter for linear in self._linears for parameter in (linear.weight, linear.bias)]
        if th.is_grad_enabled():
            return _MLPFunction.apply(inputs, *parameters)
        return _activations(inputs, parameters)[-1]


def mlp(input_dim: int, output_dim: int, net_arch: list[int], activation_fn: type[nn.Module] = nn.ReLU) -> MLP:
    """
    :param input_dim: Size of the input
    :param output_dim: Size of the output
    :param net_arch: Sizes of the hidden layers
    :param activation_fn: Activation function of the hidden layers
    :return: SB3's ``create_mlp`` as an :class:`MLP`
    """
    return MLP(*create_mlp(input_dim, output_dim, net_arch, activation_fn))


def _multiply(left: th.Tensor, right: th.Tensor, bias: th.Tensor | None = None, relu: bool = False) -> th.Tensor:
    """
    :param left: (n, k)
    :param right: (m, k)
    :param bias: (m,)
    :param relu: Whether to set negative results to 0
    :return: ``left @ right.T + bias``, (n, m)
    """
    if _onednn_linear is not None and left.numel() * right.shape[0] >= _MIN_PRODUCT:
        return _onednn_linear(left, right, bias, "relu" if relu else "none", [], "")
    product = F.linear(left, right, bias)
    return product.relu_() if relu else product


def _activations(inputs: th.Tensor, parameters: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    :param inputs: (batch, input_dim)
    :param parameters: Weight and bias of each layer
    :return: The inputs and the output of each layer, after its ReLU
    """
    activations = [inputs]
    for index in range(0, len(parameters), 2):
        is_last = index == len(parameters) - 2
        activations.append(_multiply(activations[-1], parameters[index], parameters[index + 1], relu=not is_last))
    return activations


class _MLPFunction(th.autograd.Function):
    """All layers as one node of the graph: for small layers, the nodes cost more than the products."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        activations = _activations(inputs, parameters)
        ctx.save_for_backward(*activations[:-1], *parameters[::2])
        return activations[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: th.Tensor) -> tuple[th.Tensor | None, ...]:
        n_layers = len(ctx.saved_tensors) // 2
        activations, weights = ctx.saved_tensors[:n_layers], ctx.saved_tensors[n_layers:]
        grad = grad_outputs[0]
        grads: list[th.Tensor | None] = [None] * (1 + 2 * n_layers)
        for layer in reversed(range(n_layers)):
            if ctx.needs_input_grad[1 + 2 * layer]:
                grads[1 + 2 * layer] = _multiply(grad.t(), activations[layer].t())
            if ctx.needs_input_grad[2 + 2 * layer]:
                grads[2 + 2 * layer] = grad.sum(0)
            if not any(ctx.needs_input_grad[: 1 + 2 * layer]):
                break
            grad = _multiply(grad, weights[layer].t())
            if layer > 0:
                grad = th.ops.aten.threshold_backward(grad, activations[layer], 0)
        if ctx.needs_input_grad[0]:
            grads[0] = grad
        return tuple(grads)
