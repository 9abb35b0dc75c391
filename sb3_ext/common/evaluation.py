"""Online networks on the two observations of a batch of transitions, in the fastest form that is exact for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.mlp import ACTIVATIONS, MLP
from sb3_ext.common.observations import map_observations


@dataclass
class Heads:
    """
    Networks that share what lies in front of them: observations -> features -> each head. With a trunk behind the features,
    which ends in an activation function, each head sees its own part of the trunk's outputs.

    :param extract_features: From a batch of preprocessed observations to the features, (batch, features_dim)
    :param heads: The networks at the end
    :param trunk: Without its last activation function; it has as many outputs as the heads have inputs together (None: there
        is none, and each head sees all features)
    :param activation_fn: Behind the trunk
    """

    extract_features: Callable[[PyTorchObs], th.Tensor]
    heads: Sequence[MLP]
    trunk: MLP | None = None
    activation_fn: type[nn.Module] = nn.ReLU

    def __call__(self, obs: PyTorchObs) -> list[th.Tensor]:
        """
        :param obs: Batch of preprocessed observations
        :return: The outputs of the heads, (batch, output_dim) each
        """
        hidden = self.extract_features(obs)
        if self.trunk is not None:
            hidden = self.trunk(hidden)
            is_constant = self.activation_fn in ACTIVATIONS and not hidden.requires_grad
            hidden = ACTIVATIONS[self.activation_fn].in_place(hidden) if is_constant else self.activation_fn()(hidden)
        return [head(inputs) for head, inputs in zip(self.heads, self.inputs_of(hidden), strict=True)]

    def inputs_of(self, hidden: th.Tensor) -> Sequence[th.Tensor]:
        """
        :param hidden: What comes out of the trunk, or the features if there is none, (batch, hidden_dim)
        :return: What each head sees, (batch, input_dim)
        """
        if self.trunk is None:
            return [hidden] * len(self.heads)
        return hidden.split([head.weights_and_biases()[0].shape[1] for head in self.heads], dim=1)

    def evaluate(self, flat: FlatParameters, obs: PyTorchObs, next_obs: PyTorchObs | None = None) -> Evaluation:
        """
        :param flat: The parameters of features, trunk and heads, in this order
        :param obs: Batch of preprocessed observations
        :param next_obs: The observations after them (None: they are not needed)
        :return: The outputs for both. Valid until the parameters change.
        """
        networks = [*([] if self.trunk is None else [self.trunk]), *self.heads]
        parameters = [parameter for network in networks for parameter in network.weights_and_biases()]
        is_known = self.activation_fn in ACTIVATIONS and all(network.is_plain for network in networks)
        if is_known and flat.ends_with(parameters):
            return PerceptronEvaluation(self, flat, flat.params[: len(flat.params) - len(parameters)], obs, next_obs)
        return GraphEvaluation(self, flat, obs, next_obs)


class Evaluation(Protocol):
    """
    What heads make of the observations and of the next observations.

    ``outputs``, one tensor (batch, ...) for each head, are what a loss is computed from; ``next_outputs``, of the same
    shapes (of no rows, if there are no next observations), are constants for its target. Neither needs a graph: ``backward``
    wants the gradients of the loss.
    """

    outputs: list[th.Tensor]
    next_outputs: list[th.Tensor]

    def backward(self, *gradients: th.Tensor) -> None:
        """
        Set the gradient of the networks' parameters.

        :param gradients: Of the loss with respect to each of ``outputs``
        """
        ...


class GraphEvaluation:
    """
    By automatic differentiation, for any networks.

    :param heads: Any
    :param flat: Their parameters
    :param obs: Batch of preprocessed observations
    :param next_obs: The observations after them
    """

    def __init__(self, heads: Heads, flat: FlatParameters, obs: PyTorchObs, next_obs: PyTorchObs | None) -> None:
        self._flat = flat
        with th.enable_grad():
            self._graph: list[th.Tensor] = heads(obs)
        self.outputs = [output.detach() for output in self._graph]
        with th.no_grad():
            self.next_outputs = [output[:0] for output in self.outputs] if next_obs is None else heads(next_obs)

    def backward(self, *gradients: th.Tensor) -> None:
        self._flat.backward(self._graph, gradients)


class PerceptronEvaluation:
    """
    By hand behind the features, from one pass over both batches, because small batches keep autograd busier than the
    processor, and because the gradients of large layers are then written where they belong.

    :param heads: Plain perceptrons
    :param flat: The parameters of the features, then those of trunk and heads
    :param feature_parameters: The former
    :param obs: Batch of preprocessed observations
    :param next_obs: The observations after them
    """

    def __init__(
        self,
        heads: Heads,
        flat: FlatParameters,
        feature_parameters: Sequence[th.Tensor],
        obs: PyTorchObs,
        next_obs: PyTorchObs | None,
    ) -> None:
        self._heads, self._flat, self._feature_parameters = heads, flat, feature_parameters
        if feature_parameters:
            with th.enable_grad():
                self._features = heads.extract_features(obs)
            hidden = self._features.detach()
            if next_obs is not None:
                with th.no_grad():
                    hidden = th.cat([hidden, heads.extract_features(next_obs)])
        else:
            both_obs = [obs] if next_obs is None else [obs, next_obs]
            hidden = heads.extract_features(map_observations(lambda *batches: th.cat(batches), *both_obs))
        batch_size = len(hidden) if next_obs is None else len(hidden) // 2
        if heads.trunk is not None:
            trunk = heads.trunk.activations(hidden)
            hidden = ACTIVATIONS[heads.activation_fn].in_place(trunk[-1])
            self._trunk = [activation[:batch_size] for activation in trunk]
        both = [head.activations(inputs) for head, inputs in zip(heads.heads, heads.inputs_of(hidden), strict=True)]
        self.next_outputs = [activations[-1][batch_size:] for activations in both]
        self._activations = [[activation[:batch_size] for activation in activations] for activations in both]
        self.outputs = [activations[-1] for activations in self._activations]

    def backward(self, *gradients: th.Tensor) -> None:
        heads, out = self._heads, iter(self._flat.gradient_views())
        features_out = list(islice(out, len(self._feature_parameters)))
        trunk_out = [] if heads.trunk is None else list(islice(out, len(heads.trunk.weights_and_biases())))
        heads_out = [list(islice(out, len(head.weights_and_biases()))) for head in heads.heads]
        parts = zip(heads.heads, self._activations, gradients, heads_out, strict=True)
        if heads.trunk is None and not features_out:
            for head, activations, gradient, head_out in parts:
                head.gradients(activations, gradient, out=head_out)
            return
        hidden_gradients = [head.backward(activations, gradient, head_out) for head, activations, gradient, head_out in parts]
        if heads.trunk is None:
            gradient = sum(hidden_gradients[1:], start=hidden_gradients[0])
        else:
            gradient = ACTIVATIONS[heads.activation_fn].derivative(th.cat(hidden_gradients, dim=1), self._trunk[-1])
            if not features_out:
                heads.trunk.gradients(self._trunk, gradient, out=trunk_out)
                return
            gradient = heads.trunk.backward(self._trunk, gradient, trunk_out)
        th._foreach_copy_(features_out, th.autograd.grad(self._features, self._feature_parameters, gradient))
