"""Features of images."""

from __future__ import annotations

from typing import cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn


class ConvFeatures(NatureCNN):
    """
    The convolutions of the Nature CNN without the linear layer behind them, which each head has for itself.

    :param observation_space: Image observation space, channel-first
    :param normalized_image: See ``NatureCNN``
    """

    def __init__(self, observation_space: spaces.Box, normalized_image: bool = False) -> None:
        super().__init__(observation_space, features_dim=1, normalized_image=normalized_image)
        self._features_dim = cast(nn.Linear, self.linear[0]).in_features
        del self.linear

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.cnn(observations.contiguous(memory_format=th.channels_last))
