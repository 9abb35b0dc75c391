"""Networks on observations and next observations: the fast form against float64 and against automatic differentiation."""

import copy

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ext.common.evaluation import GraphEvaluation, PerceptronEvaluation, evaluate
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.mlp import MLP, mlp

EXTRACTOR = FlattenExtractor(spaces.Box(-1, 1, (3,)))


@pytest.fixture
def batches():
    th.manual_seed(0)
    return th.randn(2, 5, 3)


@pytest.fixture
def gradients():
    return th.randn(5, 2, generator=th.Generator().manual_seed(1)), th.randn(5, 4, generator=th.Generator().manual_seed(2))


def expected_gradient(heads, obs, gradients):
    """In float64, parameter after parameter."""
    heads = [nn.Sequential(*copy.deepcopy(list(head))).double() for head in heads]
    loss = sum((head(obs.double()) * gradient.double()).sum() for head, gradient in zip(heads, gradients, strict=True))
    parameters = [parameter for head in heads for parameter in head.parameters()]
    return th.cat([gradient.reshape(-1) for gradient in th.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_perceptrons_by_hand(batches, gradients, activation_fn):
    heads = [mlp(3, 2, [7, 6], activation_fn), mlp(3, 4, [5], activation_fn)]
    flat = FlatParameters(*heads)
    evaluation = evaluate(EXTRACTOR, heads, flat, *batches)
    assert isinstance(evaluation, PerceptronEvaluation)
    for head, output, next_output in zip(heads, evaluation.outputs, evaluation.next_outputs, strict=True):
        th.testing.assert_close(output, head(batches[0]).detach())
        th.testing.assert_close(next_output, head(batches[1]).detach())
    expected = expected_gradient(heads, batches[0], gradients)
    for _ in range(2):  # the second time, the gradient's memory is there and holds the first result
        evaluation.backward(*gradients)
        th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_heads_that_are_no_plain_perceptrons(batches, gradients):
    heads = [MLP(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2)), mlp(3, 4, [5])]
    flat = FlatParameters(*heads)
    evaluation = evaluate(EXTRACTOR, heads, flat, *batches)
    assert isinstance(evaluation, GraphEvaluation)
    th.testing.assert_close(evaluation.next_outputs[0], heads[0](batches[1]).detach())
    evaluation.backward(*gradients)
    expected = expected_gradient(heads, batches[0], gradients)
    th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_features_that_learn(batches, gradients):
    features, heads = nn.Sequential(nn.Linear(3, 6), nn.ReLU()), [mlp(6, 2, [5]), mlp(6, 4, [5])]
    flat = FlatParameters(features, *heads)
    evaluation = evaluate(features, heads, flat, *batches)
    assert isinstance(evaluation, GraphEvaluation)
    evaluation.backward(*gradients)
    outputs = [head(features(batches[0])) for head in heads]
    expected = th.autograd.grad(outputs, list(flat.params), gradients)
    th.testing.assert_close(flat.tensor.grad, th.cat([gradient.reshape(-1) for gradient in expected]))
    assert flat.gradient_views()[0].abs().sum() > 0


def test_dict_observations(batches, gradients):
    heads = [mlp(3, 2, [7]), mlp(3, 4, [5])]
    flat = FlatParameters(*heads)
    obs, next_obs = ({"a": batch[:, :1], "b": batch[:, 1:]} for batch in batches)

    def features(obs):
        return th.cat([obs["b"], obs["a"]], dim=1)

    evaluation = evaluate(features, heads, flat, obs, next_obs)
    assert isinstance(evaluation, PerceptronEvaluation)
    th.testing.assert_close(evaluation.next_outputs[1], heads[1](features(next_obs)).detach())
    evaluation.backward(*gradients)
    expected = expected_gradient(heads, features(obs), gradients)
    th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)
