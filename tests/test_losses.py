import pytest
import torch as th
from torch.nn import functional as F

from sb3_ext.common.losses import clipped_surrogate_loss, huber_loss, standardized


def test_huber_loss_by_hand():
    q_values, actions, target = th.tensor([[1.0, 5.0], [2.0, 0.0]]), th.tensor([[1], [0]]), th.tensor([[2.0], [2.5]])
    loss, gradient = huber_loss(q_values, actions, target)
    # |5 - 2| - 0.5 = 2.5 with slope 1, and 0.5 * 0.5^2 = 0.125 with slope -0.5
    assert loss.item() == pytest.approx((2.5 + 0.125) / 2)
    th.testing.assert_close(gradient, th.tensor([[0.0, 1.0], [-0.5, 0.0]]) / 2)


def test_gradient_of_the_huber_loss_against_autograd():
    th.manual_seed(0)
    q_values, actions, target = (2 * th.randn(16, 8)).requires_grad_(), th.randint(8, (16, 1)), th.randn(16, 1)
    expected = F.smooth_l1_loss(q_values.gather(1, actions), target)
    loss, gradient = huber_loss(q_values, actions, target)
    th.testing.assert_close(loss, expected.detach())
    th.testing.assert_close(gradient, th.autograd.grad(expected, q_values)[0])


@pytest.mark.parametrize("value", [0.1, 100.1, 2.0])
def test_equal_advantages_become_zeros(value):
    # The mean of so many is not this number in float32
    assert not standardized(th.full((1000,), value)).any()
    th.testing.assert_close(standardized(th.tensor([1.0, 3.0])), th.tensor([-1.0, 1.0]) / 2**0.5)


def test_clipped_surrogate_loss_by_hand():
    # Ratios of 1.5 and 0.5, each with an advantage that asks for more of it and with one that asks for less
    log_probs = th.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = th.tensor([2.0, -2.0, 2.0, -2.0])
    loss = clipped_surrogate_loss(log_probs, th.zeros(4), advantages, 0.2)
    assert loss.item() == pytest.approx(-(1.2 * 2 - 1.5 * 2 + 0.5 * 2 - 0.8 * 2) / 4)
    # What has already moved beyond the range in the way that is asked for moves no further
    th.testing.assert_close(th.autograd.grad(loss, log_probs)[0], th.tensor([0.0, 0.75, -0.25, 0.0]))
