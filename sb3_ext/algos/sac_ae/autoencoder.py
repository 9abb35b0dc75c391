"""The regularized autoencoder of SAC-AE."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_ext.common.mlp import is_recorded


class _ReLUFunction(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: th.Tensor) -> th.Tensor:
        ctx.mark_dirty(inputs.relu_())
        ctx.save_for_backward(inputs)
        return inputs

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        (outputs,) = ctx.saved_tensors
        result = gradient if gradient.is_contiguous(memory_format=th.channels_last) else th.empty_like(gradient)
        return th.ops.aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=result)


class _ReLU(nn.Module):
    """
    Between convolutions: maps of a batch take more memory than caches have, so this writes over them, and on the way back over
    the gradient, which nothing else may read.
    """

    def forward(self, maps: th.Tensor) -> th.Tensor:
        return _ReLUFunction.apply(maps) if maps.requires_grad and not is_recorded() else maps.relu_()


class _ConvTranspose2d(nn.ConvTranspose2d):
    """Without padding. Adds the bias afterwards, because the gradient of the one within torch's own is slow on CPU."""

    def forward(self, maps: th.Tensor) -> th.Tensor:  # type: ignore[override]
        sizes = {"stride": self.stride, "output_padding": self.output_padding}
        outputs = nn.functional.conv_transpose2d(maps, self.weight, **sizes)  # type: ignore[arg-type]
        return outputs if self.bias is None else outputs.add_(self.bias.view(-1, 1, 1))


class ConvEncoder(BaseFeaturesExtractor):
    """
    Convolutions of 3 x 3, the first with stride 2, and a linear layer with layer normalization and tanh behind them.

    Source: Yarats et al. 2019, appendix B.1.

    :param observation_space: Images, channels first
    :param features_dim: Size of the latent vector, >= 1
    :param n_layers: Number of convolutions, >= 1
    :param n_filters: Channels of each, >= 1
    :raises ValueError: if there is no layer, or the images are too small for so many
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 50, n_layers: int = 4, n_filters: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, but got {n_layers}.")
        self.image_shape = observation_space.shape
        n_channels, height, width = self.image_shape
        # The first convolution halves the image, each of the others takes a border of one pixel
        height, width = ((size - 3) // 2 + 1 - 2 * (n_layers - 1) for size in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"Images of shape {self.image_shape} are too small for {n_layers} convolutions: give fewer `n_layers` in "
                "`features_extractor_kwargs`, or larger images."
            )
        self.n_layers = n_layers
        self.conv_shape = (n_filters, height, width)
        layers: list[nn.Module] = [nn.Conv2d(n_channels, n_filters, 3, stride=2), _ReLU()]
        for _ in range(n_layers - 1):
            layers += [nn.Conv2d(n_filters, n_filters, 3), _ReLU()]
        self.convolutions = nn.Sequential(*layers).to(memory_format=th.channels_last)  # type: ignore[call-overload]
        self.projection = nn.Sequential(
            nn.Linear(n_filters * height * width, features_dim), nn.LayerNorm(features_dim), nn.Tanh()
        )
        self.apply(init_weights)

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: In [0, 1], (batch, channels, height, width)
        :return: Latent vectors in (-1, 1), (batch, features_dim)
        """
        return self.project(self.convolutions(images))

    def project(self, maps: th.Tensor) -> th.Tensor:
        """
        :param maps: Of the convolutions, (batch, filters, height, width)
        :return: Latent vectors in (-1, 1), (batch, features_dim)
        """
        # Channels last, which is how they lie in memory
        return self.projection(maps.permute(0, 2, 3, 1).flatten(1))


class ConvDecoder(nn.Module):
    """
    The mirror image of an encoder.

    :param encoder: The encoder
    """

    def __init__(self, encoder: ConvEncoder) -> None:
        super().__init__()
        n_channels, image_height, image_width = encoder.image_shape
        self.conv_shape = n_filters, height, width = encoder.conv_shape
        self.linear = nn.Linear(encoder.features_dim, n_filters * height * width)
        layers: list[nn.Module] = []
        for _ in range(encoder.n_layers - 1):
            layers += [_ConvTranspose2d(n_filters, n_filters, 3), _ReLU()]
        # The row and the column that a stride of 2 leaves out when the size is even
        output_padding = ((image_height - 3) % 2, (image_width - 3) % 2)
        layers.append(_ConvTranspose2d(n_filters, n_channels, 3, stride=2, output_padding=output_padding))
        self.convolutions = nn.Sequential(*layers).to(memory_format=th.channels_last)  # type: ignore[call-overload]
        self.apply(init_weights)

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: Latent vectors, (batch, features_dim)
        :return: Reconstructed images, around 0, see :func:`quantize`, (batch, channels, height, width)
        """
        n_filters, height, width = self.conv_shape
        maps = self.linear(features).relu_().view(-1, height, width, n_filters).permute(0, 3, 1, 2)
        return self.convolutions(maps)


def quantize(images: th.Tensor, n_bits: int) -> th.Tensor:
    """
    What the decoder is to reconstruct: fewer colours, with noise of the size of the steps between them, around 0.

    Source: Kingma and Dhariwal 2018 ("Glow"), as in the code of SAC-AE.

    :param images: uint8
    :param n_bits: Bits that are kept of each byte, 1 to 8
    :return: ``floor(images / 2**(8 - n_bits)) / 2**n_bits + U(0, 1) / 2**n_bits - 0.5``, in [-0.5, 0.5). ``U(0, 1)`` is a
        random byte over 256, because floats take longer to draw.
    """
    levels = (images >> (8 - n_bits)).float()
    return levels.add_(_random_bytes(images), alpha=1 / 256).div_(2**n_bits).sub_(0.5)


def _random_bytes(images: th.Tensor) -> th.Tensor:
    """:return: eight of each random number, of the shape and on the device of ``images``, and laid out alike"""
    if images.device.type not in ("cpu", "cuda"):
        # Not every device draws whole 64-bit numbers
        return th.randint_like(images, 256)
    numbers = th.empty(-(-images.numel() // 8), dtype=th.int64, device=images.device).random_(-(2**63), None)
    return numbers.view(th.uint8).as_strided(images.shape, th.empty_like(images).stride())


class _ReconstructionLoss(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reconstruction: th.Tensor, quantized: th.Tensor) -> th.Tensor:
        ctx.errors = quantized.neg_().add_(reconstruction)
        return th.linalg.vector_norm(ctx.errors).square() / ctx.errors.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None]:
        if ctx.errors is None:
            raise RuntimeError("This loss has been differentiated, which can be done once.")
        # Errors become their own gradient
        errors, ctx.errors = ctx.errors, None
        return errors.mul_(2 / errors.numel() * gradient), None


def reconstruction_loss(reconstruction: th.Tensor, images: th.Tensor, n_bits: int) -> th.Tensor:
    """
    A batch of images takes more memory than caches have, so this writes errors and gradient over what it compares with.

    :param reconstruction: Of the decoder, around 0, (batch, channels, height, width)
    :param images: uint8, of the same shape
    :param n_bits: See :func:`quantize`
    :return: Mean squared error, which can be differentiated once
    """
    return _ReconstructionLoss.apply(reconstruction, quantize(images, n_bits))


def to_image(reconstruction: th.Tensor) -> th.Tensor:
    """
    :param reconstruction: Of the decoder, around 0
    :return: uint8 images
    """
    return ((reconstruction + 0.5) * 256).clamp(0, 255).to(th.uint8)


def init_weights(module: nn.Module) -> None:
    """
    Linear layers orthogonal; convolutions delta-orthogonal, that is, orthogonal in the middle of the kernel and 0 elsewhere
    (Xiao et al. 2018, https://arxiv.org/abs/1806.05393); biases 0.

    :param module: A layer; other kinds stay as they are
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        with th.no_grad():
            middle = th.empty(module.weight.shape[:2], device=module.weight.device)
            nn.init.orthogonal_(middle, nn.init.calculate_gain("relu"))
            module.weight.zero_()
            module.weight[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = middle
        if module.bias is not None:
            nn.init.zeros_(module.bias)
