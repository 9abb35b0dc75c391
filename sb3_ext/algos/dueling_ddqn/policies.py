"""Networks of Dueling Double DQN: separate streams for the value of a state and the advantages of its actions."""

from __future__ import annotations

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ext.algos.ddqn.policies import DDQNPolicy, DDQNQNetwork
from sb3_ext.common.conv_features import ConvFeatures
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.mlp import MLP, mlp


class DuelingQNetwork(DDQNQNetwork):
    """
    ``Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')`` (Wang et al. 2016, equation 9).

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Module to extract features
    :param features_dim: Number of features
    :param net_arch: Hidden layers; the last one is in each stream, those before it are shared
    :param activation_fn: Activation function
    :param normalize_images: Whether to divide images by 255
    :param shared_gradient_scale: The gradient that the streams send back is multiplied by it before it reaches what they share
    """

    def __init__(
        self,
        *args: Any,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        shared_gradient_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, net_arch=[], activation_fn=activation_fn, **kwargs)
        # SB3's single stream
        del self.q_net
        self.net_arch = net_arch
        self.shared_gradient_scale = shared_gradient_scale
        *shared, last = net_arch
        self.trunk: MLP | None = None
        hidden_dim = self.features_dim
        if shared:
            self.trunk = mlp(self.features_dim, shared[-1], shared[:-1], activation_fn)
            hidden_dim = shared[-1]
        self.value_net = mlp(hidden_dim, 1, [last], activation_fn)
        self.advantage_net = mlp(hidden_dim, int(self.action_space.n), [last], activation_fn)

    @property
    def heads(self) -> Heads:
        streams = [self.value_net, self.advantage_net]
        return Heads(self.extract_features_of, streams, self.trunk, self.activation_fn, self.shared_gradient_scale)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        return self.combine(*self.heads(obs))

    def combine(self, *outputs: th.Tensor) -> th.Tensor:
        values, advantages = outputs
        return values + (advantages - advantages.mean(dim=1, keepdim=True))

    def split_gradient(self, gradient: th.Tensor) -> tuple[th.Tensor, ...]:
        return gradient.sum(dim=1, keepdim=True), gradient - gradient.mean(dim=1, keepdim=True)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "shared_gradient_scale": self.shared_gradient_scale}


class DuelingDDQNPolicy(DDQNPolicy):
    """
    Policy of Dueling Double DQN. The other parameters are SB3's, see ``DQNPolicy``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers; the last one is in each stream, those before it are shared (None: 64-64 for vectors, 512
        behind the convolutions for images)
    :param rescale_shared_gradient: Whether to multiply the gradient that the streams send back by ``1/sqrt(2)``, as the paper
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        rescale_shared_gradient: bool = True,
        **kwargs: Any,
    ) -> None:
        self.rescale_shared_gradient = rescale_shared_gradient
        if net_arch is None:
            is_convolution = issubclass(kwargs.get("features_extractor_class", FlattenExtractor), NatureCNN)
            net_arch = [512] if is_convolution else [64, 64]
        if not net_arch:
            raise ValueError("net_arch must have at least one layer, that of the two streams, but got [].")
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def make_q_net(self) -> DuelingQNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        scale = 1.0 / math.sqrt(2.0) if self.rescale_shared_gradient else 1.0
        return DuelingQNetwork(**net_args, shared_gradient_scale=scale).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "rescale_shared_gradient": self.rescale_shared_gradient}


MlpPolicy = DuelingDDQNPolicy


class CnnPolicy(DuelingDDQNPolicy):
    """:class:`DuelingDDQNPolicy` for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", ConvFeatures)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(DuelingDDQNPolicy):
    """:class:`DuelingDDQNPolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
