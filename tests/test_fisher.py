"""Fisher-vector products against the explicit matrix, and against each other."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import distributions as td
from torch import nn

from sb3_ext.common.actor_critic import action_distribution, split_parameters
from sb3_ext.common.fisher import (
    DivergenceLinearization,
    GaussNewtonLinearization,
    PerceptronLinearization,
    kl_divergence,
    linearize,
)
from sb3_ext.common.flat_parameters import FlatParameters

ACTION_SPACES = {
    "Box": spaces.Box(-1.0, 1.0, (3,)),
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
}
each_action_space = pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)


class Spaces(gym.Env):
    def __init__(self, action_space):
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (3,)), action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}


def make_policy(action_space, policy_class="MlpPolicy", use_sde=False, **kwargs):
    policy_kwargs = {"net_arch": [5], "ortho_init": False, **kwargs}
    model = A2C(policy_class, Spaces(action_space), use_sde=use_sde, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    if hasattr(model.policy, "log_std"):
        model.policy.log_std.data += th.tensor([0.3, -0.4, 0.1])
    return model.policy


def flat_actor(policy):
    return FlatParameters(*split_parameters(policy)[0])


def explicit_fisher_matrix(policy, observations):
    """``E[score score^T]``, averaged over the observations, in float64: by enumeration, for a Gaussian in closed form."""
    twin = type(policy)(**policy._get_constructor_parameters())
    twin.load_state_dict(policy.state_dict())
    params = split_parameters(twin)[0]
    twin.double()
    size = sum(param.numel() for param in params)
    matrix = th.zeros(size, size, dtype=th.float64)

    def gradient(output):
        grads = th.autograd.grad(output, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        return th.cat([grad.flatten() for grad in grads])

    for obs in observations.double():
        # Not get_distribution, which casts observations to float32
        distribution = twin._get_action_dist_from_latent(twin.mlp_extractor.forward_actor(obs.unsqueeze(0)))
        if isinstance(twin.action_space, spaces.Box):
            normal = distribution.distribution
            for mean, scale in zip(normal.loc[0], normal.scale[0], strict=True):
                mean_gradient, log_scale_gradient = gradient(mean), gradient(scale.log())
                matrix += th.outer(mean_gradient, mean_gradient) / scale.detach() ** 2
                matrix += 2 * th.outer(log_scale_gradient, log_scale_gradient)
            continue
        for action in all_actions(twin.action_space):
            log_prob = distribution.log_prob(action)[0]
            score = gradient(log_prob)
            matrix += log_prob.exp().detach() * th.outer(score, score)
    return matrix / len(observations)


def all_actions(space):
    if isinstance(space, spaces.Discrete):
        return [th.tensor([action]) for action in range(space.n)]
    sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else [2] * space.n
    return [th.tensor([action], dtype=th.float32) for action in itertools.product(*map(range, sizes))]


def all_linearizations(policy, flat, observations):
    with th.no_grad():
        constant = action_distribution(policy, observations)
    return [
        linearize(policy, flat, observations),
        GaussNewtonLinearization(action_distribution(policy, observations), flat),
        DivergenceLinearization(constant, action_distribution(policy, observations), flat),
    ]


def columns(linearization, size):
    return th.stack([linearization.fisher_product(unit) for unit in th.eye(size)], 1)


def some_loss(distribution, actions):
    # There is no entropy where actions are squashed
    entropy = distribution.entropy()
    return (distribution.log_prob(actions) ** 2).mean() - (0.0 if entropy is None else entropy.mean())


def assert_all_agree(policy, observations, by_hand):
    flat = flat_actor(policy)
    vector = th.randn(flat.tensor.numel(), generator=th.Generator().manual_seed(1))
    actions = policy.get_distribution(observations).get_actions().detach()
    linearizations = all_linearizations(policy, flat, observations)
    assert isinstance(linearizations[0], PerceptronLinearization) == by_hand
    products = [linearization.fisher_product(vector) for linearization in linearizations]
    # A second product from the same graphs, and a gradient
    doubled = [linearization.fisher_product(2 * vector) for linearization in linearizations]
    gradients = [linearization.gradient(some_loss(linearization.distribution, actions)) for linearization in linearizations]
    for results in (products, doubled, gradients):
        scale = results[-1].abs().max().item()
        assert scale > 0
        for result in results:
            th.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-5 * scale)


@each_action_space
@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("net_arch", [[], [5], [5, 4]])
def test_products_equal_those_of_the_explicit_matrix(action_space, activation_fn, net_arch):
    policy = make_policy(action_space, activation_fn=activation_fn, net_arch=net_arch)
    assert_all_equal_the_explicit_matrix(policy)


@pytest.mark.parametrize("squash_output", [True, False])
def test_products_equal_those_of_the_explicit_matrix_with_state_dependent_exploration(squash_output):
    policy = make_policy(ACTION_SPACES["Box"], use_sde=True, squash_output=squash_output)
    assert_all_equal_the_explicit_matrix(policy)


def assert_all_equal_the_explicit_matrix(policy):
    flat = flat_actor(policy)
    observations = th.randn(7, 3, generator=th.Generator().manual_seed(0))
    matrix = explicit_fisher_matrix(policy, observations)
    for linearization in all_linearizations(policy, flat, observations):
        product = columns(linearization, len(matrix)).double()
        th.testing.assert_close(product, matrix, rtol=1e-4, atol=1e-6)


class BetaDistribution(DiagGaussianDistribution):
    """One that is not known, and made of another one inside."""

    def proba_distribution(self, mean_actions, log_std):
        concentration = nn.functional.softplus(mean_actions)
        self.distribution = td.Beta(concentration, concentration + log_std.exp())
        return self


class BetaPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule):
        self.action_dist = BetaDistribution(self.action_dist.action_dim)
        super()._build(lr_schedule)


def test_products_for_an_unknown_distribution():
    policy = make_policy(spaces.Box(0.0, 1.0, (3,)), BetaPolicy)
    flat, observations = flat_actor(policy), th.randn(6, 3, generator=th.Generator().manual_seed(0))
    linearization = linearize(policy, flat, observations)
    assert isinstance(linearization, DivergenceLinearization)
    beta = linearization.distribution.distribution
    first, second = beta.concentration1, beta.concentration0
    matrix = th.zeros(flat.tensor.numel(), flat.tensor.numel())
    for sample, dimension in np.ndindex(first.shape):
        jacobian = th.stack([linearization.gradient(part[sample, dimension]) for part in (first, second)])
        a, b = first[sample, dimension].detach(), second[sample, dimension].detach()
        # Second derivatives of the logarithm of the beta function
        information = th.diag(th.polygamma(1, th.stack([a, b]))) - th.polygamma(1, a + b)
        matrix += jacobian.T @ information @ jacobian / len(first)
    th.testing.assert_close(columns(linearization, len(matrix)), matrix, rtol=1e-4, atol=1e-5)


@each_action_space
def test_all_forms_agree_for_a_perceptron(action_space):
    assert_all_agree(make_policy(action_space, net_arch=[16, 8]), th.randn(50, 3), by_hand=True)


@each_action_space
def test_all_forms_agree_for_another_network(action_space):
    policy = make_policy(action_space, net_arch=[16, 8], activation_fn=nn.ELU)
    assert_all_agree(policy, th.randn(50, 3), by_hand=False)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("discrete", [True, False])
def test_all_forms_agree_for_images(share, discrete):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=discrete)
    policy_kwargs = {"share_features_extractor": share, "features_extractor_kwargs": {"features_dim": 8}}
    policy = A2C("CnnPolicy", env, policy_kwargs=policy_kwargs, seed=0, device="cpu").policy
    observations = th.randint(0, 256, (6, 1, 40, 40), dtype=th.uint8)
    assert_all_agree(policy, observations, by_hand=False)


def test_all_forms_agree_for_dict_observations():
    env = SimpleMultiObsEnv(random_start=False)
    policy = A2C("MultiInputPolicy", env, policy_kwargs={"net_arch": [8]}, seed=0, device="cpu").policy
    space = policy.observation_space
    space.seed(0)
    observations, _ = policy.obs_to_tensor({key: np.stack([space[key].sample() for _ in range(5)]) for key in space.spaces})
    assert_all_agree(policy, observations, by_hand=False)


@pytest.mark.parametrize("squash_output", [True, False])
def test_all_forms_agree_for_state_dependent_exploration(squash_output):
    policy = make_policy(ACTION_SPACES["Box"], use_sde=True, net_arch=[8], squash_output=squash_output)
    assert_all_agree(policy, th.randn(9, 3), by_hand=False)


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ELU])
@each_action_space
def test_distribution_is_not_the_one_that_the_policy_goes_on_using(action_space, activation_fn):
    policy = make_policy(action_space, activation_fn=activation_fn)
    observations, others = th.randn(4, 3), th.randn(4, 3)
    expected = policy.get_distribution(observations)
    actions = expected.mode()
    log_prob = expected.log_prob(actions)
    linearization = linearize(policy, flat_actor(policy), observations)
    policy.get_distribution(others)
    th.testing.assert_close(linearization.distribution.log_prob(actions), log_prob)


def test_frozen_layers_are_left_to_automatic_differentiation():
    policy = make_policy(ACTION_SPACES["Discrete"])
    policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
    assert_all_agree(policy, th.randn(9, 3), by_hand=False)


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_sde": True}, {"use_sde": True, "squash_output": True}], ids=["diagonal", "gSDE", "squashed gSDE"]
)
def test_divergence_is_that_of_whole_actions_from_old_to_new(kwargs):
    first, second = make_policy(ACTION_SPACES["Box"], **kwargs), make_policy(ACTION_SPACES["Box"], **kwargs)
    observations = th.randn(5, 3)
    with th.no_grad():
        second.action_net.bias += th.tensor([0.1, -0.2, 0.3])
        second.log_std += 0.5
        old, new = first.get_distribution(observations), second.get_distribution(observations)
    old_mean, old_std, new_mean, new_std = (
        tensor.double().numpy() for part in (old, new) for tensor in (part.distribution.loc, part.distribution.scale)
    )
    by_hand = np.log(new_std / old_std) + (old_std**2 + (old_mean - new_mean) ** 2) / (2 * new_std**2) - 0.5
    np.testing.assert_allclose(kl_divergence(old, new), by_hand.sum(1), rtol=1e-4)


def test_divergence_of_given_numbers():
    old, new = DiagGaussianDistribution(2), DiagGaussianDistribution(2)
    old.proba_distribution(th.tensor([[0.0, 1.0]]), th.tensor([0.0, 0.0]))
    new.proba_distribution(th.tensor([[1.0, 1.0]]), th.tensor([0.0, math.log(2.0)]))
    # 1/2 for the means of the first dimension, log 2 + 1/8 - 1/2 for the standard deviations of the second
    assert kl_divergence(old, new).tolist() == pytest.approx([0.5 + math.log(2.0) - 0.375])


@pytest.mark.parametrize("name", ["Discrete", "MultiDiscrete", "MultiBinary"])
def test_divergence_of_discrete_actions_by_enumeration(name):
    first, second = make_policy(ACTION_SPACES[name]), make_policy(ACTION_SPACES[name])
    with th.no_grad():
        second.action_net.bias += th.linspace(-1, 1, len(second.action_net.bias))
        observations = th.randn(5, 3)
        old, new = first.get_distribution(observations), second.get_distribution(observations)
        expected = 0.0
        for action in all_actions(ACTION_SPACES[name]):
            actions = action.repeat(5, *[1] * (action.dim() - 1))
            log_prob = old.log_prob(actions)
            expected += log_prob.exp() * (log_prob - new.log_prob(actions))
        th.testing.assert_close(kl_divergence(old, new), expected, rtol=1e-4, atol=1e-6)
