"""Features of images."""

from __future__ import annotations

from typing import cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
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


class ChannelsLastMixin(BaseModel):
    """
    For networks with a Nature CNN: lays images out channels-last, which is faster on CPU, while they are bytes and not yet
    floats of four times the size.
    """

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        if isinstance(features_extractor, NatureCNN) and isinstance(obs, th.Tensor):
            obs = obs.contiguous(memory_format=th.channels_last)
        return super().extract_features(obs, features_extractor)
