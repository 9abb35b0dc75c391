import copy

import pytest
import torch as th
from torch import nn

from sb3_ext.common.flat_parameters import FlatParameters, FlatParametersMixin, backward


class Net(FlatParametersMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 3, (2, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
        self.flat = FlatParameters(self.layers)
        self.optimizer = th.optim.Adam([self.flat.tensor], lr=0.1)

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def net():
    th.manual_seed(0)
    return Net()


BATCH = th.linspace(-1, 1, 3 * 2 * 2 * 5).reshape(3, 2, 2, 5)


def assert_views(net):
    """Writing to the flat tensor is writing to the parameters, and the other way round."""
    for param in net.layers.parameters():
        assert param.data_ptr() >= net.flat.tensor.data_ptr()
        assert param.data_ptr() < net.flat.tensor.data_ptr() + net.flat.tensor.numel() * net.flat.tensor.element_size()
    net.flat.tensor.data.fill_(3.0)
    assert all((param == 3.0).all() for param in net.layers.parameters())


def test_updates_equal_those_of_separate_parameters(net):
    plain = copy.deepcopy(net.layers)
    plain_optimizer = th.optim.Adam(plain.parameters(), lr=0.1)
    for _ in range(5):
        net.flat.minimize(net(BATCH).square().mean(), net.optimizer)
        plain_optimizer.zero_grad()
        plain(BATCH).square().mean().backward()
        plain_optimizer.step()
    for name, value in plain.state_dict().items():
        th.testing.assert_close(net.layers.state_dict()[name], value)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("frozen", [[0], [3], [0, 3]])
def test_frozen_parameters_stay_as_they_are(net, frozen, max_grad_norm):
    plain = copy.deepcopy(net.layers)
    plain_optimizer = th.optim.Adam(plain.parameters(), lr=0.1, weight_decay=0.1)
    net.optimizer.param_groups[0]["weight_decay"] = 0.1
    for step in range(4):
        # By then there is momentum
        if step == 2:
            for index in frozen:
                plain[index].requires_grad_(False)
                net.layers[index].requires_grad_(False)
        net.flat.minimize(net(BATCH).square().mean(), net.optimizer, max_grad_norm)
        plain_optimizer.zero_grad()
        loss = plain(BATCH).square().mean()
        if loss.requires_grad:
            loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        plain_optimizer.step()
    for name, value in plain.state_dict().items():
        th.testing.assert_close(net.layers.state_dict()[name], value)


def test_polyak_update_by_hand(net):
    target = nn.Sequential(copy.deepcopy(net.layers[0]))
    expected = 0.9 * target[0].weight.detach() + 0.1 * (net.layers[0].weight.detach() + 1.0)
    flat_target = FlatParameters(target)
    net.flat.tensor.data.add_(1.0)
    flat_target.polyak_update(net.flat, 0.1)
    th.testing.assert_close(target[0].weight, expected)


def test_a_loss_reaches_only_these_parameters(net):
    other = nn.Linear(2, 1)
    net.flat.backward(other(net(BATCH)).sum())
    assert other.weight.grad is None
    assert net.flat.tensor.grad.abs().sum() > 0


def test_parameters_without_influence_get_a_gradient_of_zero(net):
    net.flat.backward(net.layers[3].bias.sum())
    assert net.flat.tensor.grad.sum() == 2.0


def test_several_get_their_gradients_in_one_pass(net):
    other = FlatParameters(head := nn.Linear(2, 1))
    expected = th.autograd.grad(head(net(BATCH)).sum(), [net.layers[0].weight, head.weight])
    backward(head(net(BATCH)).sum(), other, net.flat)
    for flat, gradient in zip((net.flat, other), expected, strict=True):
        th.testing.assert_close(flat.gradient_views()[0], gradient)


@pytest.mark.parametrize("change", ["load_state_dict", "to", "deepcopy"])
def test_stays_flat(net, change):
    expected = net(BATCH).detach()
    if change == "load_state_dict":
        source = Net()
        expected = source(BATCH).detach()
        net.load_state_dict(source.state_dict())
    elif change == "to":
        net.to(th.float64).to(th.float32)
    else:
        original, net = net, copy.deepcopy(net)
        original.flat.tensor.data.zero_()
    th.testing.assert_close(net(BATCH).detach(), expected)
    # The optimizer still owns the tensor behind the parameters
    before = net.layers[3].weight.clone()
    net.flat.minimize(net(BATCH).square().mean(), net.optimizer)
    assert not th.equal(before, net.layers[3].weight)
    assert_views(net)


def test_nothing_to_flatten_is_an_error():
    with pytest.raises(ValueError, match="one dtype and one device"):
        FlatParameters(nn.ReLU())


def test_consists_of_the_same_objects_in_the_same_order(net):
    params = list(net.layers.parameters())
    assert net.flat.consists_of(params)
    assert not net.flat.consists_of(params[::-1])
    assert not net.flat.consists_of(params[:-1])
    assert not net.flat.consists_of([param.clone() for param in params])
