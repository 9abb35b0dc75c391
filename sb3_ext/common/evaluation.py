"""Online networks on the two observations of a batch of transitions, in the fastest form that is exact for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.mlp import MLP
from sb3_ext.common.observations import map_observations


class Evaluation(Protocol):
    """
    What networks make of the observations and of the next observations.

    ``outputs``, one tensor (batch, ...) for each network, are what a loss is computed from; ``next_outputs``, of the same
    shapes, are constants for its target. Neither needs a graph: ``backward`` wants the gradients of the loss.
    """

    outputs: list[th.Tensor]
    next_outputs: list[th.Tensor]

    def backward(self, *gradients: th.Tensor) -> None:
        """
        Set the gradient of the networks' parameters.

        :param gradients: Of the loss with respect to each of ``outputs``
        """
        ...


def evaluate(
    extract_features: Callable[[PyTorchObs], th.Tensor],
    heads: Sequence[MLP],
    flat: FlatParameters,
    obs: PyTorchObs,
    next_obs: PyTorchObs,
) -> Evaluation:
    """
    :param extract_features: From a batch of observations to the features, (batch, features_dim)
    :param heads: The networks behind them
    :param flat: Parameters of features and heads
    :param obs: A batch of observations
    :param next_obs: The observations after them
    :return: The outputs of the heads. Valid until the parameters change.
    """
    parameters = [parameter for head in heads for parameter in head.weights_and_biases()]
    if all(head.is_plain for head in heads) and flat.consists_of(parameters):
        return PerceptronEvaluation(heads, flat, extract_features(map_observations(_cat, obs, next_obs)))
    return GraphEvaluation(extract_features, heads, flat, obs, next_obs)


def _cat(*batches: th.Tensor) -> th.Tensor:
    return th.cat(batches)


class GraphEvaluation:
    """By automatic differentiation, for any features; parameters as of ``evaluate``."""

    def __init__(
        self,
        extract_features: Callable[[PyTorchObs], th.Tensor],
        heads: Sequence[MLP],
        flat: FlatParameters,
        obs: PyTorchObs,
        next_obs: PyTorchObs,
    ) -> None:
        self.flat = flat
        features = extract_features(obs)
        self._graph: list[th.Tensor] = [head(features) for head in heads]
        self.outputs = [output.detach() for output in self._graph]
        with th.no_grad():
            next_features = extract_features(next_obs)
            self.next_outputs: list[th.Tensor] = [head(next_features) for head in heads]

    def backward(self, *gradients: th.Tensor) -> None:
        self.flat.backward(self._graph, gradients)


class PerceptronEvaluation:
    """
    By hand, from one pass over both batches, because small batches keep autograd busier than the processor.

    :param heads: Plain perceptrons
    :param flat: Their parameters, in this order
    :param features: Of the observations and then of the next observations, (2 * batch, features_dim), without a graph
    """

    def __init__(self, heads: Sequence[MLP], flat: FlatParameters, features: th.Tensor) -> None:
        self.heads, self.flat = heads, flat
        batch_size = len(features) // 2
        both = [head.activations(features) for head in heads]
        self.next_outputs = [activations[-1][batch_size:] for activations in both]
        self.activations = [[activation[:batch_size] for activation in activations] for activations in both]
        self.outputs = [activations[-1] for activations in self.activations]

    def backward(self, *gradients: th.Tensor) -> None:
        out = iter(self.flat.gradient_views())
        for head, activations, gradient in zip(self.heads, self.activations, gradients, strict=True):
            head.gradients(activations, gradient, out=list(islice(out, len(head.weights_and_biases()))))
