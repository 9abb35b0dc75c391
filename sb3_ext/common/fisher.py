"""Products with the Fisher information matrix of a policy, without forming it.

The Fisher matrix of a policy, averaged over n samples, is ``F = 1/n J^T M J``: J is the Jacobian of the parameters of the
action distribution with respect to those of the policy, M the Fisher matrix of the distribution itself, which has a closed
form. Source: Martens 2014, "New Insights and Perspectives on the Natural Gradient Method", section 9
(https://arxiv.org/abs/1412.1193).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import distributions as td

from sb3_ext.common.actor_critic import action_distribution, actor_network
from sb3_ext.common.flat_parameters import FlatParameters, differentiate
from sb3_ext.common.mlp import MLP


def kl_divergence(old: Distribution, new: Distribution) -> th.Tensor:
    """
    KL(old || new) of whole actions.

    :param old: For a batch of observations
    :param new: The same kind of distribution, for the same observations
    :return: Summed over the dimensions of an action, in nats, (batch,)
    """
    batch = _parts(old)[0].batch_shape[0]
    divergences = [
        td.kl_divergence(old_part, new_part).reshape(batch, -1).sum(1)
        for old_part, new_part in zip(_parts(old), _parts(new), strict=True)
    ]
    return th.stack(divergences).sum(0)


class Linearization(Protocol):
    """
    A policy near its present parameters, for a batch of observations.

    ``distribution`` is the policy's action distribution, from which a loss can be computed.
    """

    distribution: Distribution

    def gradient(self, loss: th.Tensor) -> th.Tensor:
        """
        :param loss: Scalar computed from ``distribution``
        :return: Its gradient with respect to the actor's parameters, (n_parameters,)
        """
        ...

    def fisher_product(self, vector: th.Tensor) -> th.Tensor:
        """
        :param vector: (n_parameters,)
        :return: Its product with the Fisher matrix, averaged over the batch, (n_parameters,)
        """
        ...


def linearize(policy: ActorCriticPolicy, actor_parameters: FlatParameters, observations: PyTorchObs) -> Linearization:
    """
    :param policy: Any actor-critic policy, without dropout or the like at this time
    :param actor_parameters: Those on which its action distribution depends
    :param observations: A batch
    :return: The policy near its present parameters, in the fastest form that is exact for it. Valid until they change.
    """
    network = actor_network(policy)
    if network is not None and isinstance(observations, th.Tensor):
        expected = [*([policy.log_std] if hasattr(policy, "log_std") else []), *network.weights_and_biases()]
        has_all = actor_parameters.consists_of(expected) and all(param.requires_grad for param in expected)
        if type(policy.action_dist) in _PERCEPTRON_DISTRIBUTIONS and has_all:
            return PerceptronLinearization(policy, network, actor_parameters, observations)
    distribution = action_distribution(policy, observations)
    if all(type(part) in _METRICS for part in _parts(distribution)):
        return GaussNewtonLinearization(distribution, actor_parameters)
    with th.no_grad():
        constant = action_distribution(policy, observations)
    return DivergenceLinearization(constant, distribution, actor_parameters)


class PerceptronLinearization:
    """
    The products with J and its transpose by hand, from activations that are computed once.

    :param policy: With a perceptron as actor, and a standard deviation, if any, that does not depend on the state
    :param network: The perceptron
    :param actor_parameters: The standard deviation's, if any, and those of the perceptron, in this order
    :param observations: Vectors
    """

    def __init__(
        self, policy: ActorCriticPolicy, network: MLP, actor_parameters: FlatParameters, observations: th.Tensor
    ) -> None:
        self.network, self.flat = network, actor_parameters
        self.activations = network.activations(observations.float().flatten(1))
        # Losses are differentiated by autograd down to the output of the network, and by hand from there
        self.output = self.activations[-1].requires_grad_()
        # What the distribution is computed from
        self.arguments = [self.output]
        if isinstance(policy.action_dist, DiagGaussianDistribution):
            assert isinstance(policy.log_std, th.Tensor)
            self.arguments.append(policy.log_std)
        self.distribution = copy.copy(policy.action_dist).proba_distribution(*self.arguments)
        self.metrics = [_METRICS[type(part)](part) for part in _parts(self.distribution)]
        self.widths = [metric.width for metric in self.metrics]

    def gradient(self, loss: th.Tensor) -> th.Tensor:
        grads = th.autograd.grad(loss, self.arguments, retain_graph=True, allow_unused=True, materialize_grads=True)
        grad_output, *grad_log_std = grads
        return self.flat.flatten([*grad_log_std, *self.network.gradients(self.activations, grad_output)])

    def fisher_product(self, vector: th.Tensor) -> th.Tensor:
        tangents = self.flat.unflatten(vector)
        n_log_std = len(self.arguments) - 1
        # The standard deviation is the same for all samples, and a unit of its logarithm has the information 2
        log_std_images = [2 * tangent for tangent in tangents[:n_log_std]]
        tangent = self.network.tangent(self.activations, tangents[n_log_std:])
        parts = zip(self.metrics, tangent.split(self.widths, 1), strict=True)
        image = th.cat([metric.multiply([part])[0] for metric, part in parts], 1).div_(len(tangent))
        return self.flat.flatten([*log_std_images, *self.network.gradients(self.activations, image)])


class GaussNewtonLinearization:
    """
    The products with J and its transpose by automatic differentiation, on graphs that are made once.

    :param distribution: With a graph that leads to the parameters
    :param actor_parameters: Those parameters
    """

    def __init__(self, distribution: Distribution, actor_parameters: FlatParameters) -> None:
        self.distribution, self.flat = distribution, actor_parameters
        self.metrics = [_METRICS[type(part)](part) for part in _parts(distribution)]
        self.outputs = [output for metric in self.metrics for output in metric.parameters if output.requires_grad]
        # J^T u is linear in u, so that its derivative with respect to u in a direction is the product with J
        self.cotangents = [th.zeros_like(output, requires_grad=True) for output in self.outputs]
        self.pullback = differentiate(self.outputs, self.flat.params, self.cotangents, retain_graph=True, create_graph=True)

    def gradient(self, loss: th.Tensor) -> th.Tensor:
        return self.flat.flatten(differentiate(loss, self.flat.params, retain_graph=True))

    def fisher_product(self, vector: th.Tensor) -> th.Tensor:
        # A parameter that is frozen, or whose pullback does not depend on the cotangents, has no part in the product
        pairs = zip(self.pullback, self.flat.unflatten(vector), strict=True)
        pullback, tangents = zip(*[(pulled, tangent) for pulled, tangent in pairs if pulled.requires_grad], strict=True)
        pushed = differentiate(pullback, self.cotangents, tangents, retain_graph=True)
        by_output = dict(zip(map(id, self.outputs), pushed, strict=True))
        images = []
        for metric in self.metrics:
            images += [
                image
                for output, image in zip(
                    metric.parameters,
                    metric.multiply([by_output.get(id(output), th.zeros_like(output)) for output in metric.parameters]),
                    strict=True,
                )
                if output.requires_grad
            ]
        n_samples = self.outputs[0].shape[0]
        return self.flat.flatten(differentiate(self.outputs, self.flat.params, images, retain_graph=True)) / n_samples


class DivergenceLinearization:
    """
    Second derivatives of the KL divergence from the present distribution: for any distribution that has one.

    :param constant: The present distribution, without a graph
    :param distribution: The same, with a graph that leads to the parameters
    :param actor_parameters: Those parameters
    """

    def __init__(self, constant: Distribution, distribution: Distribution, actor_parameters: FlatParameters) -> None:
        self.distribution, self.flat = distribution, actor_parameters
        divergence = kl_divergence(constant, distribution).mean()
        self.divergence_gradient = self.flat.flatten(
            differentiate(divergence, self.flat.params, retain_graph=True, create_graph=True)
        )

    def gradient(self, loss: th.Tensor) -> th.Tensor:
        return self.flat.flatten(differentiate(loss, self.flat.params, retain_graph=True))

    def fisher_product(self, vector: th.Tensor) -> th.Tensor:
        return self.gradient(self.divergence_gradient.dot(vector))


class _NormalMetric:
    """Mean and standard deviation: ``diag(1 / sigma^2, 2 / sigma^2)``."""

    def __init__(self, distribution: td.Normal) -> None:
        self.parameters = [distribution.loc, distribution.scale]
        precision = distribution.scale.detach() ** -2
        self.diagonal = [precision, 2 * precision]
        self.width = distribution.loc.shape[1]

    def multiply(self, tangents: Sequence[th.Tensor]) -> list[th.Tensor]:
        # The tangent of the mean can be the only one
        return [element * tangent for element, tangent in zip(self.diagonal, tangents, strict=False)]


class _CategoricalMetric:
    """Logits: ``diag(p) - p p^T``."""

    def __init__(self, distribution: td.Categorical) -> None:
        self.parameters = [distribution.logits]
        self.probs = distribution.probs.detach()
        self.width = self.probs.shape[1]

    def multiply(self, tangents: Sequence[th.Tensor]) -> list[th.Tensor]:
        image = self.probs * tangents[0]
        return [image.addcmul(self.probs, image.sum(-1, keepdim=True), value=-1)]


class _BernoulliMetric:
    """Logits: ``diag(p (1 - p))``."""

    def __init__(self, distribution: td.Bernoulli) -> None:
        self.parameters = [distribution.logits]
        self.variance = distribution.variance.detach()
        self.width = self.variance.shape[1]

    def multiply(self, tangents: Sequence[th.Tensor]) -> list[th.Tensor]:
        return [self.variance * tangents[0]]


_METRICS: dict[type, type] = {
    td.Normal: _NormalMetric,
    td.Categorical: _CategoricalMetric,
    td.Bernoulli: _BernoulliMetric,
}

_PERCEPTRON_DISTRIBUTIONS = (
    DiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
)


def _parts(distribution: Distribution) -> list[td.Distribution]:
    """The torch distributions that an SB3 distribution is the product of."""
    inner = distribution.distribution
    return list(inner) if isinstance(inner, (list, tuple)) else [inner]
