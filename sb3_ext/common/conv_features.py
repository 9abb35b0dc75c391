"""Features of images."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_ext.common.mlp import has_hooks

# Named tuples with the fields of SB3's ReplayBufferSamples
Batch = TypeVar("Batch", bound=Any)


class ConvFeatures(NatureCNN):
    """
    The convolutions of the Nature CNN without the linear layer behind them, which each head has for itself.

    :param observation_space: Image observation space, channel-first
    :param normalized_image: See ``NatureCNN``
    :param mixed_precision: Whether the convolutions and the hidden layers behind them are computed in bfloat16, with eight
        significant bits. Parameters, their updates and the last layer stay as they are. On processors that multiply in
        bfloat16 (AVX512-BF16 or AMX) this is faster; others emulate it, which can be slower.
    """

    def __init__(self, observation_space: spaces.Box, normalized_image: bool = False, mixed_precision: bool = False) -> None:
        super().__init__(observation_space, features_dim=1, normalized_image=normalized_image)
        self._features_dim = cast(nn.Linear, self.linear[0]).in_features
        del self.linear
        #: Of the images that are convolved, and of the features
        self.dtype = th.bfloat16 if mixed_precision else th.float32

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.dtype == th.float32:
            return self._convolve(observations)
        with th.autocast(observations.device.type, self.dtype):
            return self._convolve(observations)

    def _convolve(self, observations: th.Tensor) -> th.Tensor:
        outputs = observations.contiguous(memory_format=th.channels_last)
        if has_hooks(*self.cnn.modules()):
            return self.cnn(outputs)
        for module in self.cnn:
            # In place: nothing else needs what the convolutions return, not even their gradients
            outputs = F.relu_(outputs) if isinstance(module, nn.ReLU) else module(outputs)
        return outputs


class MinAtarFeatures(BaseFeaturesExtractor):
    """
    The convolution of the MinAtar paper (Young and Tian 2019, https://arxiv.org/abs/1903.03176): 16 kernels of 3 x 3.

    :param observation_space: ``Box`` of 0 and 1, (height, width, channels)
    :raises ValueError: if it has another number of dimensions
    """

    def __init__(self, observation_space: spaces.Box) -> None:
        if len(observation_space.shape) != 3:
            raise ValueError(
                f"MinAtarFeatures supports Box observation spaces (height, width, channels), but got {observation_space}."
            )
        height, width, channels = observation_space.shape
        super().__init__(observation_space, features_dim=16 * (height - 2) * (width - 2))
        self.cnn = nn.Sequential(nn.Conv2d(channels, 16, kernel_size=3), nn.ReLU(), nn.Flatten())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.cnn(observations.permute(0, 3, 1, 2))


def channels_last(images: th.Tensor) -> th.Tensor:
    """
    :param images: (batch, channels, height, width)
    :return: The same, laid out as convolutions on CPU are faster with; cheaper to arrange while they are bytes
    """
    if images.is_contiguous(memory_format=th.channels_last) or not images.is_cpu or images.dtype != th.uint8:
        return images.contiguous(memory_format=th.channels_last)
    # Channel after channel, in numpy, which takes a third of torch's time
    return th.from_numpy(np.stack(list(images.numpy().swapaxes(0, 1)), axis=-1)).permute(0, 3, 1, 2)


def normalized(images: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
    """
    :param images: Of values from 0 to 255
    :param dtype: Of the result
    :return: In [0, 1]; what SB3's ``preprocess_obs`` returns, which takes the memory twice
    """
    return images.to(dtype, copy=True).div_(255.0)


class PreprocessingMixin(BaseModel):
    """
    Networks whose observations can be preprocessed once for all of them. With a Nature CNN, images are laid out channels-last,
    which is faster on CPU, while they are bytes and not yet floats of four times the size.
    """

    features_extractor: BaseFeaturesExtractor

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """
        :param obs: Batch of observations
        :return: What the features extractor takes
        """
        if isinstance(self.features_extractor, NatureCNN) and isinstance(obs, th.Tensor):
            obs = channels_last(obs)
            if self.normalize_images and is_image_space(self.observation_space):
                return normalized(obs, getattr(self.features_extractor, "dtype", th.float32))
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)

    def preprocess_batch(self, replay_data: Batch) -> Batch:
        """
        :param replay_data: A batch of transitions
        :return: The same with preprocessed observations
        """
        observations = self.preprocess(replay_data.observations), self.preprocess(replay_data.next_observations)
        return replay_data._replace(observations=observations[0], next_observations=observations[1])

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        return features_extractor(self.preprocess(obs))
