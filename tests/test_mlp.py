import copy
import warnings

import pytest
import torch as th
from torch import nn

from sb3_ext.common import mlp as module
from sb3_ext.common.mlp import MLP, mlp, suits_numpy


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def each_path(request, monkeypatch):
    operator = getattr(th.ops.mkldnn, "_linear_pointwise", None)
    monkeypatch.setattr(module, "_onednn_linear", operator if request.param else None)
    monkeypatch.setattr(module, "_MIN_PRODUCT", 0)
    monkeypatch.setattr(module, "_MIN_WEIGHT_PRODUCT", 0)
    monkeypatch.setattr(module, "_MIN_WEIGHT_ROWS", 0)
    monkeypatch.setattr(module, "_MIN_INPUT_PRODUCT", 0)


def reference(net):
    """The same layers as a plain Sequential in float64."""
    return nn.Sequential(*copy.deepcopy(list(net))).double()


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("net_arch", [[], [7], [16, 5]])
def test_outputs_and_gradients_equal_those_of_the_layers(each_path, net_arch, activation_fn):
    th.manual_seed(0)
    net = mlp(3, 2, net_arch, activation_fn)
    inputs = th.randn(9, 3, requires_grad=True)
    inputs64 = inputs.detach().double().requires_grad_()
    plain = reference(net)

    with th.no_grad():
        th.testing.assert_close(net(inputs).double(), plain(inputs64), rtol=1e-5, atol=1e-6)
    outputs, expected = net(inputs), plain(inputs64)
    th.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-6)
    weighting = th.arange(18.0).view(9, 2) - 7
    gradients = th.autograd.grad((outputs * weighting).sum(), [inputs, *net.parameters()])
    expected_gradients = th.autograd.grad((expected * weighting).sum(), [inputs64, *plain.parameters()])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        th.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_many_rows_go_through_the_layers_block_by_block(each_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 4)
    net, inputs = mlp(3, 2, [16, 5]), th.randn(10, 3)
    blocks = []
    monkeypatch.setattr(net, "activations", lambda rows: blocks.append(len(rows)) or MLP.activations(net, rows))
    with th.no_grad():
        outputs = net(inputs)
    assert blocks == [4, 4, 2]
    th.testing.assert_close(outputs.double(), reference(net)(inputs.double()), rtol=1e-5, atol=1e-6)


def test_gradients_only_where_they_are_wanted(each_path):
    net, inputs = mlp(3, 1, [4, 4]), th.randn(5, 3, requires_grad=True)
    net.requires_grad_(False)
    plain = reference(net)
    expected = th.autograd.grad(plain(inputs.double()).sum(), inputs)[0]
    th.testing.assert_close(th.autograd.grad(net(inputs).sum(), inputs)[0], expected)
    net[2].weight.requires_grad_(True)
    (gradient,) = th.autograd.grad(net(inputs.detach()).sum(), net[2].weight)
    plain[2].weight.requires_grad_(True)
    (expected,) = th.autograd.grad(plain(inputs.detach().double()).sum(), plain[2].weight)
    th.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_fast_operator_is_used_where_it_is_the_fast_one():
    has_avx512 = th.backends.cpu.get_cpu_capability() == "AVX512"
    assert (module._onednn_linear is not None) == (has_avx512 and th.backends.mkldnn.is_available())


def test_layers_without_bias_and_others_in_between(each_path):
    net = MLP(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    inputs = th.randn(5, 3)
    th.testing.assert_close(net(inputs).double(), reference(net)(inputs.double()), rtol=1e-4, atol=1e-5)


def test_a_copy_has_layers_of_its_own(each_path):
    net = mlp(3, 2, [4])
    copied = copy.deepcopy(net)
    expected = net(th.ones(1, 3))
    with th.no_grad():
        copied[0].weight.zero_()
        copied[2].bias.fill_(5.0)
    th.testing.assert_close(net(th.ones(1, 3)), expected)
    assert not th.allclose(copied(th.ones(1, 3)), expected)


def test_other_types_take_the_plain_path():
    net = mlp(3, 2, [4]).double()
    assert net(th.ones(1, 3, dtype=th.float64)).dtype == th.float64


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("with_graph", [False, True])
def test_networks_can_be_exported(activation_fn, with_graph):
    net, inputs = mlp(3, 2, [7], activation_fn).eval(), th.randn(600, 3)
    with th.set_grad_enabled(with_graph), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = th.export.export(net, (inputs[:5],), dynamic_shapes=({0: th.export.Dim("batch")},)).module()
        traced = th.jit.trace(net, inputs[:5])
        for recorded in (exported, traced):
            th.testing.assert_close(recorded(inputs), net(inputs), rtol=1e-5, atol=1e-6)


def test_products_with_the_jacobian_block_by_block(each_path, monkeypatch):
    th.manual_seed(0)
    net, inputs, grad_output = mlp(3, 2, [16, 5], nn.Tanh), th.randn(10, 3), th.randn(10, 2)
    tangents = [th.randn_like(parameter) for parameter in net.weights_and_biases()]
    activations = net.activations(inputs)
    expected = net.gradients(activations, grad_output), net.tangent(activations, tangents)
    monkeypatch.setattr(module, "_GRADIENT_BLOCK_ROWS", 4)
    out = [th.empty_like(parameter) for parameter in net.weights_and_biases()]
    th.testing.assert_close((net.gradients(activations, grad_output, out=out), net.tangent(activations, tangents)), expected)
    th.testing.assert_close(out, expected[0])


def test_numpy_is_for_few_multiplications():
    weights = [th.zeros(2**9, 2**7), th.zeros(2**9, 2**7)]
    assert suits_numpy(1, weights) and suits_numpy(2, weights)
    assert not suits_numpy(0, weights) and not suits_numpy(3, weights)
    assert not suits_numpy(1, [weight.to("meta") for weight in weights])


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh, nn.SiLU])
def test_inputs_in_bfloat16(activation_fn):
    th.manual_seed(0)
    net, inputs = mlp(3, 2, [16, 5], activation_fn), th.randn(9, 3).bfloat16().requires_grad_()
    plain, inputs64 = reference(net), inputs.detach().double().requires_grad_()
    outputs, expected = net(inputs), plain(inputs64)
    gradients = th.autograd.grad(outputs.sum(), [inputs, *net.parameters()])
    expected_gradients = th.autograd.grad(expected.sum(), [inputs64, *plain.parameters()])
    assert [gradient.dtype for gradient in gradients] == [th.bfloat16, *6 * [th.float32]]
    for result, exact in zip([outputs, *gradients], [expected, *expected_gradients], strict=True):
        assert (result - exact).norm() < 0.02 * exact.norm()
