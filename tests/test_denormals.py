import numpy as np
import pytest
import torch as th

from sb3_ext.common.denormals import flushes_denormals, without_denormals

# Smaller than any normal float
DENORMAL = 1e-40


@pytest.fixture(autouse=True)
def with_denormals():
    yield
    th.set_flush_denormal(False)


@without_denormals
def scaled(factor, *, denormal):
    """Documented."""
    return th.tensor([1e-30]) * factor, np.float32(denormal) * np.float32(1)


def test_denormals_are_zero_within_the_function_only():
    tensor, number = scaled(1e-10, denormal=DENORMAL)
    assert tensor.view(th.int32).item() == 0 and number.view(np.int32) == 0
    assert scaled.__doc__ == "Documented."
    assert not flushes_denormals()
    assert (th.tensor([1e-30]) * 1e-10).item() > 0


def test_the_setting_is_taken_back_after_an_error():
    @without_denormals
    def fails():
        assert flushes_denormals()
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fails()
    assert not flushes_denormals()


def test_the_users_own_setting_stays():
    th.set_flush_denormal(True)
    scaled(1.0, denormal=DENORMAL)
    assert flushes_denormals()


def test_adam_forgets_gradients_that_have_become_zero():
    """Its average of them ends in zero, and not in a number that is slow and stays for ever."""

    def average(step):
        param = th.nn.Parameter(th.zeros(1000))
        optimizer = th.optim.Adam([param], fused=True)
        param.grad = th.ones(1000)
        for _ in range(1200):
            step(optimizer)
            param.grad.zero_()
        return optimizer.state[param]["exp_avg"]

    plainly = average(lambda optimizer: optimizer.step())
    assert 0 < plainly.max() < 1e-38
    flushed = average(without_denormals(lambda optimizer: optimizer.step()))
    assert not flushed.numpy().view(np.int32).any()
