"""Networks on observations and next observations: by hand and by automatic differentiation, against float64."""

import copy

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ext.common.evaluation import GraphEvaluation, Heads, PerceptronEvaluation
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.mlp import MLP, mlp

FLATTEN = FlattenExtractor(spaces.Box(-1, 1, (3,)))


@pytest.fixture
def batches():
    th.manual_seed(0)
    return th.randn(2, 5, 3)


@pytest.fixture
def gradients():
    th.manual_seed(1)
    return th.randn(5, 2), th.randn(5, 4)


def make_heads(extract_features=FLATTEN, activation_fn=nn.ReLU, features=()):
    networks = [mlp(3, 2, [7, 6], activation_fn), mlp(3, 4, [5], activation_fn)]
    return Heads(extract_features, networks), FlatParameters(*features, *networks)


def expected_gradient(heads, obs, gradients, features=()):
    """Of the parameters of ``flat``, layer by layer in float64."""
    layers = [nn.Sequential(*copy.deepcopy(list(module))).double() for module in features]
    networks = [nn.Sequential(*copy.deepcopy(list(head))).double() for head in heads.heads]
    hidden = obs.double()
    for layer in layers:
        hidden = layer(hidden)
    parameters = [parameter for module in [*layers, *networks] for parameter in module.parameters()]
    loss = sum((network(hidden) * gradient.double()).sum() for network, gradient in zip(networks, gradients, strict=True))
    return th.cat([grad.reshape(-1) for grad in th.autograd.grad(loss, parameters)])


def check(heads, flat, batches, gradients, kind, features=()):
    evaluation = heads.evaluate(flat, *batches)
    assert isinstance(evaluation, kind)
    with th.no_grad():
        th.testing.assert_close(evaluation.outputs, heads(batches[0]))
        th.testing.assert_close(evaluation.next_outputs, heads(batches[1]))
        alone = heads.evaluate(flat, batches[0])
        th.testing.assert_close(alone.outputs, evaluation.outputs)
        assert [len(output) for output in alone.next_outputs] == [0, 0]
    expected = expected_gradient(heads, batches[0], gradients, features)
    for _ in range(2):  # the second time, the gradient's memory is there and holds a result
        for observations in (batches, batches[:1]):
            with th.no_grad():  # as in an update; a graph, if there is one, does not depend on it
                heads.evaluate(flat, *observations).backward(*gradients)
            th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_perceptrons(batches, gradients, activation_fn):
    heads, flat = make_heads(activation_fn=activation_fn)
    check(heads, flat, batches, gradients, PerceptronEvaluation)


def test_other_activation_functions(batches, gradients):
    heads, flat = make_heads(activation_fn=nn.ELU)
    check(heads, flat, batches, gradients, GraphEvaluation)


def test_features_that_learn(batches, gradients):
    features = MLP(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))
    heads, flat = make_heads(features, features=[features])
    check(heads, flat, batches, gradients, PerceptronEvaluation, [features])
    heads, flat = make_heads(features, features=[features], activation_fn=nn.ELU)
    check(heads, flat, batches, gradients, GraphEvaluation, [features])


class PartlyUsed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 5))

    def forward(self, inputs):
        return self[2](self[1](self[0](inputs)))


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.ELU])
@pytest.mark.parametrize("frozen", [[], [0], [0, 2], [0, 2, 3]])
def test_features_that_are_frozen_or_not_used(batches, gradients, activation_fn, frozen):
    features = PartlyUsed()
    heads, flat = make_heads(features, features=[features], activation_fn=activation_fn)
    expected = expected_gradient(heads, batches[0], gradients, [list(features)[:3]])
    unused = th.zeros(20).double()
    expected = th.cat([expected[:45], unused, expected[45:]])
    for index in frozen:
        features[index].requires_grad_(False)
        # Of 24, 21 and 20 parameters
        begin = {0: 0, 2: 24, 3: 45}[index]
        expected[begin : begin + sum(parameter.numel() for parameter in features[index].parameters())] = 0
    heads.evaluate(flat, *batches).backward(*gradients)
    th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_dict_observations(batches, gradients):
    def features(obs):
        return th.cat([obs["b"], obs["a"]], dim=1)

    heads, flat = make_heads(features)
    obs, next_obs = ({"a": batch[:, :1], "b": batch[:, 1:]} for batch in batches)
    evaluation = heads.evaluate(flat, obs, next_obs)
    assert isinstance(evaluation, PerceptronEvaluation)
    with th.no_grad():
        th.testing.assert_close(evaluation.next_outputs, heads(next_obs))
    evaluation.backward(*gradients)
    expected = expected_gradient(heads, features(obs), gradients)
    th.testing.assert_close(flat.tensor.grad.double(), expected, rtol=1e-4, atol=1e-5)
