"""Networks of Dueling Double DQN: separate streams for the value of a state and the advantages of its actions."""

from __future__ import annotations

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_ext.algos.ddqn.policies import DDQNPolicy
from sb3_ext.common.conv_features import ConvFeatures
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.mlp import mlp
from sb3_ext.common.q_network import QNetwork


class DuelingQNetwork(QNetwork):
    """
    ``Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')`` (Wang et al. 2016, equation 9).

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Module to extract features
    :param features_dim: Number of features
    :param net_arch: Hidden layers; the units of the last one are divided between the two streams
    :param activation_fn: Activation function
    :param normalize_images: Whether to divide images by 255
    """

    def __init__(self, *args: Any, net_arch: list[int], activation_fn: type[nn.Module] = nn.ReLU, **kwargs: Any) -> None:
        super().__init__(*args, net_arch=[], activation_fn=activation_fn, **kwargs)
        # SB3's single stream
        del self.q_net
        self.net_arch = net_arch
        *shared, last = net_arch
        # The hidden layers of both streams are one product, at the end of the trunk
        self.trunk = mlp(self.features_dim, last, shared, activation_fn)
        self.value_net = mlp(last - last // 2, 1, [], activation_fn)
        self.advantage_net = mlp(last // 2, int(self.action_space.n), [], activation_fn)

    @property
    def heads(self) -> Heads:
        streams = [self.value_net, self.advantage_net]
        return Heads(self.features_extractor, streams, self.trunk, self.activation_fn)

    def shared_parameters(self) -> list[nn.Parameter]:
        """
        :return: Those in front of the two streams, in the order of ``parameters``
        """
        # The last weight and bias of the trunk belong to the streams
        return [*self.features_extractor.parameters(), *list(self.trunk.parameters())[:-2]]

    def combine(self, *outputs: th.Tensor) -> th.Tensor:
        values, advantages = outputs
        return values + (advantages - advantages.mean(dim=1, keepdim=True))

    def split_gradient(self, gradient: th.Tensor) -> tuple[th.Tensor, ...]:
        return gradient.sum(dim=1, keepdim=True), gradient - gradient.mean(dim=1, keepdim=True)


class DuelingDDQNPolicy(DDQNPolicy):
    """
    Policy of Dueling Double DQN. The other parameters are SB3's, see ``DQNPolicy``.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers; the units of the last one are divided between the two streams, those before it are shared
        (None: 64-64 for vectors, 1024 behind the convolutions for images)
    :param rescale_shared_gradient: Whether to multiply the gradient that the streams send back by ``1/sqrt(2)``, as the paper
    :raises ValueError: if the streams have no units
    """

    q_net: DuelingQNetwork
    q_net_target: DuelingQNetwork

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
            net_arch = [1024] if is_convolution else [64, 64]
        if not net_arch or net_arch[-1] < 2:
            raise ValueError(f"net_arch must end with a layer of at least 2 units, one for each stream, but got {net_arch}.")
        super().__init__(observation_space, action_space, lr_schedule, net_arch, **kwargs)

    def make_flat_parameters(self) -> FlatParameters:
        shared = self.q_net.shared_parameters()
        # With the shared parameters first, their gradients are one block
        self.n_shared = sum(parameter.numel() for parameter in shared)
        return FlatParameters(*shared, self.q_net)

    def make_q_net(self) -> DuelingQNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        return DuelingQNetwork(**net_args).to(self.device)

    def step(self, max_grad_norm: float) -> None:
        if self.rescale_shared_gradient and self.flat.tensor.grad is not None:
            self.flat.tensor.grad[: self.n_shared].mul_(1.0 / math.sqrt(2.0))
        super().step(max_grad_norm)

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
