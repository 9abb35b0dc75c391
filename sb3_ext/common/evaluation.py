"""Online networks on the two observations of a batch of transitions, in the fastest form that is exact for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ext.common.flat_parameters import FlatParameters, differentiate


class Head(Protocol):
    """
    A network at the end of others, as :class:`~sb3_ext.common.mlp.MLP` is one.

    ``is_plain`` says whether ``activations``, ``gradients`` and ``backward`` can be used.
    """

    is_plain: bool

    def __call__(self, inputs: th.Tensor) -> th.Tensor: ...

    def weights_and_biases(self) -> list[th.Tensor]: ...

    def activations(self, inputs: th.Tensor) -> list[th.Tensor]: ...

    def gradients(self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor]) -> Any: ...

    def backward(self, activations: Sequence[th.Tensor], grad_output: th.Tensor, out: Sequence[th.Tensor]) -> th.Tensor: ...


@dataclass
class Heads:
    """
    Networks that share what lies in front of them: observations -> features -> each head.

    :param extract_features: From a batch of preprocessed observations to the features, (batch, features_dim)
    :param heads: The networks at the end
    """

    extract_features: Callable[[PyTorchObs], th.Tensor]
    heads: Sequence[Head]

    def __call__(self, obs: PyTorchObs) -> list[th.Tensor]:
        """
        :param obs: Batch of preprocessed observations
        :return: The outputs of the heads, (batch, output_dim) each
        """
        features = self.extract_features(obs)
        return [head(features) for head in self.heads]

    def evaluate(self, flat: FlatParameters, obs: PyTorchObs, next_obs: PyTorchObs | None = None) -> Evaluation:
        """
        :param flat: The parameters of features and heads, in this order
        :param obs: Batch of preprocessed observations
        :param next_obs: The observations after them (None: they are not needed)
        :return: The outputs for both. Valid until the parameters change.
        """
        parameters = [parameter for head in self.heads for parameter in head.weights_and_biases()]
        has_hooks = any(parameter._backward_hooks for parameter in parameters)
        if all(head.is_plain for head in self.heads) and flat.ends_with(parameters) and not has_hooks:
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
    By hand behind the features, with one pass through the heads for both batches, because small batches keep autograd busier
    than the processor, and because the gradients of large layers are then written where they belong.

    :param heads: Plain perceptrons
    :param flat: The parameters of the features, then those of the heads
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
        # One batch after the other, since extractors may take statistics of a batch
        with th.set_grad_enabled(bool(feature_parameters)):
            self._features = heads.extract_features(obs)
        hidden = self._features.detach()
        if next_obs is not None:
            with th.no_grad():
                hidden = th.cat([hidden, heads.extract_features(next_obs)])
        batch_size = len(hidden) if next_obs is None else len(hidden) // 2
        both = [head.activations(hidden) for head in heads.heads]
        self.next_outputs = [activations[-1][batch_size:] for activations in both]
        self._activations = [[activation[:batch_size] for activation in activations] for activations in both]
        self.outputs = [activations[-1] for activations in self._activations]

    def backward(self, *gradients: th.Tensor) -> None:
        out = iter(self._flat.gradient_views())
        features_out = list(islice(out, len(self._feature_parameters)))
        heads_out = [list(islice(out, len(head.weights_and_biases()))) for head in self._heads.heads]
        parts = zip(self._heads.heads, self._activations, gradients, heads_out, strict=True)
        if not features_out:
            for head, activations, gradient, head_out in parts:
                head.gradients(activations, gradient, head_out)
            return
        first, *others = [head.backward(activations, gradient, head_out) for head, activations, gradient, head_out in parts]
        gradient = sum(others, start=first)
        th._foreach_copy_(features_out, differentiate(self._features, self._feature_parameters, [gradient]))
