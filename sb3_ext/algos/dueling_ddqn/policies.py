"""Networks of Dueling Double DQN: separate streams for the value of a state and the advantages of its actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ext.algos.ddqn.policies import DDQNPolicy
from sb3_ext.common.conv_features import ConvFeatures
from sb3_ext.common.mlp import (
    ACTIVATIONS,
    backward_layers,
    forward_layers,
    has_hooks,
    in_type_of,
    is_recorded,
    last_of_blocks,
    mlp,
    without_gradients,
)
from sb3_ext.common.q_network import QNetwork


class DuelingMLP(nn.Module):
    """
    Shared layers, and behind them one stream for the value of a state and one for the advantages of its actions:
    ``Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')`` (Wang et al. 2016, equation 9).

    The hidden layers of both streams are one product, and since their outputs are combined linearly, so are their last layers:
    whatever is computed without autograd sees a perceptron.

    :param features_dim: Number of features
    :param n_actions: Number of actions
    :param net_arch: Hidden layers; the units of the last one are divided between the two streams
    :param activation_fn: Activation function
    :param shared_gradient_scale: Factor of the gradient that the streams send back into the layers in front of them
    """

    def __init__(
        self,
        features_dim: int,
        n_actions: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        shared_gradient_scale: float = 1.0,
    ) -> None:
        super().__init__()
        *shared, last = net_arch
        # Without its last activation function
        self.trunk = mlp(features_dim, last, shared, activation_fn)
        self.value_net = nn.Linear(last - last // 2, 1)
        self.advantage_net = nn.Linear(last // 2, n_actions)
        self.activation_fn, self.shared_gradient_scale = activation_fn, shared_gradient_scale
        self.is_plain = activation_fn in ACTIVATIONS and self.trunk.is_plain
        streams = [parameter for stream in (self.value_net, self.advantage_net) for parameter in stream.parameters()]
        self._weights_and_biases: list[th.Tensor] = [*self.trunk.weights_and_biases(), *streams]

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :return: Values of all actions, (batch, n_actions)
        """
        if self.is_plain and not th.is_grad_enabled() and not is_recorded():
            return last_of_blocks(self.activations, features)
        *shared, streams = self.trunk
        hidden = nn.Sequential(*shared)(in_type_of(self.value_net.weight, features))
        # The same values, whose gradient is scaled
        hidden = th.lerp(hidden.detach(), hidden, self.shared_gradient_scale)
        hidden = self.activation_fn()(streams(hidden))
        of_value, of_advantages = hidden.split([self.value_net.in_features, self.advantage_net.in_features], dim=1)
        advantages = self.advantage_net(of_advantages)
        return self.value_net(of_value) + (advantages - advantages.mean(dim=1, keepdim=True))

    def weights_and_biases(self) -> list[th.Tensor]:
        """
        :return: Weight and bias of each layer of the trunk, of the value's layer and of the advantages' layer, in turns
        """
        return self._weights_and_biases

    def activations(self, features: th.Tensor) -> list[th.Tensor]:
        """
        :param features: (batch, features_dim)
        :return: The features, the output of each hidden layer, and the values of all actions; without a graph
        """
        with without_gradients():
            trunk = [in_type_of(features, parameter) for parameter in self.trunk.weights_and_biases()]
            self._layers = [*trunk, *self._folded()]
            return forward_layers(features, self._layers, self.activation_fn)

    def _folded(self) -> tuple[th.Tensor, th.Tensor]:
        """:return: weight (n_actions, units of both streams) and bias (n_actions,) of the layer that both streams end in"""
        value, advantages = self.value_net, self.advantage_net
        of_value = value.weight.expand(advantages.out_features, -1)
        weight = th.cat([of_value, advantages.weight - advantages.weight.mean(dim=0)], dim=1)
        return weight, advantages.bias + (value.bias - advantages.bias.mean())

    def advantage_layers(self) -> list[th.Tensor]:
        """
        :return: Weight and bias of each layer of the perceptron from the features to the advantages, in turns
        """
        *shared, weight, bias = self.trunk.weights_and_biases()
        of_advantages = slice(self.value_net.in_features, None)
        return [*shared, weight[of_advantages], bias[of_advantages], *self._weights_and_biases[-2:]]

    def gradients(self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor]) -> None:
        """
        :param activations: As ``activations`` returned them last
        :param grad_output: Gradient of a loss with respect to the values, (batch, n_actions)
        :param out: Where to write its gradient with respect to each of ``weights_and_biases``
        """
        self._differentiate(activations, grad_output, out, of_inputs=False)

    def backward(self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor]) -> th.Tensor:
        """
        :param activations: As ``activations`` returned them last
        :param grad_output: Gradient of a loss with respect to the values, (batch, n_actions)
        :param out: Where to write its gradient with respect to each of ``weights_and_biases``
        :return: Its gradient with respect to the features, (batch, features_dim)
        """
        return cast(th.Tensor, self._differentiate(activations, grad_output, out, of_inputs=True))

    def _differentiate(
        self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor], of_inputs: bool
    ) -> th.Tensor | None:
        trunk_out = list(out[:-4])
        # Those of the activations: the parameters have not changed since
        *shared, streams, last = self._layers[::2]
        n_shared, fn = len(shared), self.activation_fn
        with without_gradients():
            weights = [streams, last]
            wanted = [of_inputs or n_shared > 0, True, True, True, True]
            streams_out = [*trunk_out[2 * n_shared :], None, None]
            grad, _, _, weight, bias = backward_layers(activations[n_shared:-1], weights, grad_output, fn, wanted, streams_out)
            self._unfold(cast(th.Tensor, weight), cast(th.Tensor, bias), out[-4:])
            if grad is None:
                return None
            grad.mul_(self.shared_gradient_scale)
            if not shared:
                return grad
            grad = ACTIVATIONS[fn].derivative(grad, activations[n_shared])
            wanted = [of_inputs] + [True] * 2 * n_shared
            return backward_layers(activations[:n_shared], shared, grad, fn, wanted, trunk_out[: 2 * n_shared])[0]

    def _unfold(self, weight: th.Tensor, bias: th.Tensor, out: Sequence[th.Tensor]) -> None:
        """
        :param weight: Gradient with respect to the folded layer's weight
        :param bias: Gradient with respect to its bias
        :param out: Where to write those with respect to weight and bias of the value's and of the advantages' layer
        """
        value_weight, value_bias, advantage_weight, advantage_bias = out
        of_value, of_advantages = weight.split([self.value_net.in_features, self.advantage_net.in_features], dim=1)
        th.sum(of_value, 0, keepdim=True, out=value_weight)
        th.sum(bias, 0, keepdim=True, out=value_bias)
        th.sub(of_advantages, of_advantages.mean(dim=0), out=advantage_weight)
        th.sub(bias, bias.mean(), out=advantage_bias)


class DuelingQNetwork(QNetwork):
    """
    SB3's Q-network with a :class:`DuelingMLP`.

    :param args: As of SB3's ``QNetwork``
    :param net_arch: Hidden layers; the units of the last one are divided between the two streams
    :param activation_fn: Activation function
    :param shared_gradient_scale: See :class:`DuelingMLP`
    :param kwargs: As of SB3's ``QNetwork``
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
        self.net_arch = net_arch
        # In the place of SB3's single stream
        n_actions = int(self.action_space.n)
        self.q_net: Any = DuelingMLP(self.features_dim, n_actions, net_arch, activation_fn, shared_gradient_scale)

    def acting_layers(self) -> list[th.Tensor]:
        # The value of a state is the same for all actions
        return self.q_net.advantage_layers()

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        is_ours = type(self).forward is QNetwork.forward and not has_hooks(self, self.q_net)
        if not (is_ours and self.q_net.is_plain) or is_recorded():
            return super()._predict(observation, deterministic)
        layers, activation_fn = self.acting_layers(), self.q_net.activation_fn
        with without_gradients():
            features = self.features_extractor(self.preprocess(observation))
            advantages = last_of_blocks(lambda block: forward_layers(block, layers, activation_fn), features)
        return advantages.argmax(dim=1) + int(self.action_space.start)


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
