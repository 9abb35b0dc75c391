"""SB3's Q-network, for updates without automatic differentiation."""

from __future__ import annotations

from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.dqn import policies as dqn

from sb3_ext.common.conv_features import PreprocessingMixin
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.mlp import MLP


class QNetwork(PreprocessingMixin, dqn.QNetwork):
    """
    SB3's Q-network, whose outputs can be differentiated without automatic differentiation.

    :param args: As of SB3's ``QNetwork``
    :param kwargs: As of SB3's ``QNetwork``
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_net = MLP(*self.q_net.children())

    @property
    def heads(self) -> Heads:
        """The network as its only head, behind the features."""
        return Heads(self.features_extractor, [cast(MLP, self.q_net)])

    @property
    def is_perceptron(self) -> bool:
        """Whether this is a plain perceptron of the flattened observations as they are, no images and no classes."""
        space = self.observation_space
        return (
            isinstance(space, spaces.Box)
            and not (self.normalize_images and is_image_space(space))
            and type(self.features_extractor) is FlattenExtractor
            and type(self).forward is QNetwork.forward
            and cast(MLP, self.q_net).is_plain
        )

    def acting_layers(self) -> list[th.Tensor]:
        """
        :return: Weight and bias of each layer of the perceptron behind the features whose largest output is the best action's
        """
        return cast(MLP, self.q_net).weights_and_biases()

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Batch of observations
        :return: Values of all actions, (batch, n_actions)
        """
        return self.q_values(self.preprocess(obs))

    def q_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Batch of preprocessed observations
        :return: Values of all actions, (batch, n_actions)
        """
        (q_values,) = self.heads(obs)
        return q_values

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        # SB3's counts the actions from 0
        return super()._predict(observation, deterministic) + int(self.action_space.start)
