import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from sb3_ext import BCQ, DDQN, DuelingDDQN
from sb3_ext.common.conv_features import ConvFeatures, MinAtarFeatures, channels_last, normalized

SPACE = spaces.Box(0, 255, (4, 40, 40), np.uint8)


def test_the_linear_layer_is_left_out():
    features = ConvFeatures(SPACE)
    assert [type(layer) for layer in features.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))] == 3 * [nn.Conv2d]
    assert features.features_dim == features(th.rand(2, 4, 40, 40)).shape[1]


@pytest.mark.parametrize("algo", [BCQ, DDQN, DuelingDDQN])
@pytest.mark.parametrize("extractor", [ConvFeatures, NatureCNN])
def test_layout_in_memory_does_not_change_the_features(algo, extractor):
    policy_class = (algo.discrete_policy_aliases if algo is BCQ else algo.policy_aliases)["CnnPolicy"]
    policy = policy_class(SPACE, spaces.Discrete(3), lambda _: 1e-3, net_arch=[8], features_extractor_class=extractor)
    th.manual_seed(0)
    # As sampled: rows of a larger tensor
    obs = th.randint(0, 256, (5, 2 * 4 * 40 * 40), dtype=th.uint8)[:, : 4 * 40 * 40].unflatten(1, (4, 40, 40))
    net = policy.q_net
    images = []
    net.features_extractor.cnn.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    with th.no_grad():
        features = net.extract_features(obs, net.features_extractor)
        expected = BaseModel.extract_features(net, obs, net.features_extractor)
    assert images[0].is_contiguous(memory_format=th.channels_last)
    th.testing.assert_close(images[0], obs.float() / 255)
    th.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", [th.uint8, th.float32])
def test_images_of_both_layouts_and_types(channels, dtype):
    images = th.randint(0, 256, (3, channels, 6, 5)).to(dtype)
    for given in (images, images.contiguous(memory_format=th.channels_last)):
        kept = given.clone()
        laid_out = channels_last(given)
        assert laid_out.is_contiguous(memory_format=th.channels_last)
        assert laid_out.dtype == dtype and laid_out.equal(images)
        th.testing.assert_close(normalized(laid_out), images / 255)
        assert given.equal(kept)


def test_hooks_see_what_the_convolutions_return():
    features, images, seen = ConvFeatures(SPACE), th.rand(2, 4, 40, 40, requires_grad=True), []
    expected = features(images)
    features.cnn[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    features.cnn[0].register_full_backward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    features(images).sum().backward()
    th.testing.assert_close(features(images), expected, rtol=0, atol=0)
    output, gradient, *_ = seen
    assert output.min() < 0.0 and gradient.shape == output.shape and gradient.abs().sum() > 0.0


def test_gradients_with_respect_to_images():
    policy = DDQN.policy_aliases["CnnPolicy"](SPACE, spaces.Discrete(3), lambda _: 1e-3)
    images = th.rand(2, 4, 40, 40).mul_(255).requires_grad_()
    (gradient,) = th.autograd.grad(policy.q_net(images).sum(), images)
    expected = BaseModel.extract_features(policy.q_net, images, policy.q_net.features_extractor)
    (expected,) = th.autograd.grad(policy.q_net.q_net(expected).sum(), images)
    assert gradient.abs().max() > 0
    th.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_features_of_minatar():
    space = spaces.Box(0, 1, (10, 10, 4), bool)
    features = MinAtarFeatures(space)
    obs = th.rand(3, 10, 10, 4)
    expected = th.einsum("bhwcxy,ocxy->bohw", obs.unfold(1, 3, 1).unfold(2, 3, 1), features.cnn[0].weight)
    expected = (expected + features.cnn[0].bias[:, None, None]).relu().flatten(1)
    assert features.features_dim == expected.shape[1] == 1024
    th.testing.assert_close(features(obs), expected)
    with pytest.raises(ValueError, match="supports Box observation spaces"):
        MinAtarFeatures(spaces.Box(0, 1, (4,)))
