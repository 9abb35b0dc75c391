import copy

import pytest
import torch as th
from torch import nn

from sb3_ext.common import adam as module
from sb3_ext.common.adam import SingleTensorAdam
from sb3_ext.common.flat_parameters import FlatParameters


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fused": True},
        {"fused": True, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"fused": True, "amsgrad": True},
        {"foreach": True},
        {"fused": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_steps_and_state_equal_those_of_torch(kwargs):
    th.manual_seed(0)
    param = th.nn.Parameter(th.randn(50))
    expected_param = copy.deepcopy(param)
    ours, expected = SingleTensorAdam([param], lr=0.1, **kwargs), th.optim.Adam([expected_param], lr=0.1, **kwargs)
    for step in range(6):
        param.grad = th.randn(50)
        expected_param.grad = param.grad.clone()
        for optimizer in (ours, expected):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    th.testing.assert_close(param, expected_param, rtol=0, atol=0)
    th.testing.assert_close(ours.state_dict()["state"], expected.state_dict()["state"], rtol=0, atol=0)
    # A state saved by either continues in the other
    reloaded = SingleTensorAdam([param], lr=0.1, **kwargs)
    reloaded.load_state_dict(copy.deepcopy(expected.state_dict()))
    for optimizer in (reloaded, expected):
        optimizer.step()
    th.testing.assert_close(param, expected_param, rtol=0, atol=0)


def test_the_fused_step_is_there():
    # Where this fails, everything still works, but at the speed of torch's own step
    assert module._fused_adam is not None


def test_closures_are_called():
    param = th.nn.Parameter(th.ones(3))
    optimizer = SingleTensorAdam([param], lr=0.1, fused=True)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert [round(float(optimizer.step(closure)), 3) for _ in range(3)] == [3.0, 2.43, 1.922]


@pytest.mark.parametrize(
    ("optimizer_kwargs", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, False), ({"eps": 1e-5}, True)]
)
def test_adam_is_fused_unless_another_implementation_is_named(optimizer_kwargs, fused):
    optimizer = FlatParameters(nn.Linear(2, 1)).make_optimizer(th.optim.Adam, 0.1, optimizer_kwargs)
    assert optimizer.param_groups[0]["fused"] == fused
