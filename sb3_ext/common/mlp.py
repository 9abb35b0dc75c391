"""Multilayer perceptrons whose matrix products run in oneDNN on CPU."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

# On CPU, torch sends Linear layers to MKL, which leaves out AVX-512 on processors that are not Intel's: there oneDNN, which
# torch brings for convolutions, is more than twice as fast, and elsewhere as fast. It also applies bias and ReLU on the way.
# The operator is the one that torch.compile uses; without it, layers are computed as usual.
_onednn_linear: Any = getattr(th.ops.mkldnn, "_linear_pointwise", None) if th.backends.mkldnn.is_available() else None

# Products with fewer multiplications than these are as fast in MKL, or faster, because calling it costs less
_MIN_PRODUCT = 2**22
_MIN_PRODUCT_WITH_GRADIENT = 2**23


class MLP(nn.Sequential):
    """
    A sequence of layers that behaves as ``nn.Sequential`` and computes ``Linear`` layers, with the ReLUs behind them, faster.

    :param layers: As ``create_mlp`` returns them
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        # Each layer, without the ReLUs behind Linear layers, and whether there is one
        self._steps: list[tuple[nn.Module, bool]] = []
        for layer in layers:
            if isinstance(layer, nn.ReLU) and self._steps and isinstance(self._steps[-1][0], nn.Linear):
                self._steps[-1] = (self._steps[-1][0], True)
            else:
                self._steps.append((layer, False))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (batch, input_dim)
        :return: (batch, output_dim)
        """
        onednn = _onednn_linear is not None and inputs.device.type == "cpu" and inputs.dtype == th.float32
        min_product = _MIN_PRODUCT_WITH_GRADIENT if th.is_grad_enabled() else _MIN_PRODUCT
        outputs = inputs
        for layer, relu in self._steps:
            if not isinstance(layer, nn.Linear):
                outputs = layer(outputs)
                continue
            if onednn and len(inputs) * layer.weight.numel() >= min_product:
                outputs = _OneDNNLinear.apply(outputs, layer.weight, layer.bias, relu)
            else:
                outputs = F.linear(outputs, layer.weight, layer.bias)
                if relu:
                    # In place: Linear does not need its output in the backward pass
                    outputs = F.relu_(outputs)
        return outputs


def mlp(input_dim: int, output_dim: int, net_arch: list[int], activation_fn: type[nn.Module] = nn.ReLU) -> MLP:
    """
    :param input_dim: Size of the input
    :param output_dim: Size of the output
    :param net_arch: Sizes of the hidden layers
    :param activation_fn: Activation function of the hidden layers
    :return: SB3's ``create_mlp`` as an :class:`MLP`
    """
    return MLP(*create_mlp(input_dim, output_dim, net_arch, activation_fn))


class _OneDNNLinear(th.autograd.Function):
    """``Linear``, and ReLU if so desired, with gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor, relu: bool) -> th.Tensor:
        outputs = _onednn_linear(inputs, weight, bias, "relu" if relu else "none", [], "")
        ctx.relu = relu
        ctx.save_for_backward(inputs, weight, *([outputs] if relu else []))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        (grad,) = grads
        inputs, weight, *outputs = ctx.saved_tensors
        if ctx.relu:
            grad = th.ops.aten.threshold_backward(grad, outputs[0], 0)
        grad_inputs = _onednn_linear(grad, weight.t(), None, "none", [], "") if ctx.needs_input_grad[0] else None
        grad_weight = _onednn_linear(grad.t(), inputs.t(), None, "none", [], "") if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None
