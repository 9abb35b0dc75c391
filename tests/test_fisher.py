"""Fisher-vector products against the explicit matrix, and against each other."""

import copy
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from torch import nn

from sb3_ext.common import fisher
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


def make_policy(action_space, **kwargs):
    policy_kwargs = {"net_arch": [5], "ortho_init": False, **kwargs}
    policy = A2C("MlpPolicy", Spaces(action_space), policy_kwargs=policy_kwargs, seed=0, device="cpu").policy
    if hasattr(policy, "log_std"):
        policy.log_std.data = th.tensor([0.3, -0.4, 0.1])
    return policy


def flat_actor(policy):
    return FlatParameters(*split_parameters(policy)[0])


def explicit_fisher_matrix(policy, actor_parameters, observations):
    """``E[score score^T]``, averaged over the observations, in float64: by enumeration, for a Gaussian in closed form."""
    policy = copy.deepcopy(policy).double()
    params = [dict(policy.named_parameters())[name] for name in names_of(policy, actor_parameters)]
    size = sum(param.numel() for param in params)
    matrix = th.zeros(size, size, dtype=th.float64)

    def gradient(output):
        grads = th.autograd.grad(output, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        return th.cat([grad.flatten() for grad in grads])

    for obs in observations.double():
        # Not get_distribution, which casts observations to float32
        distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(obs.unsqueeze(0)))
        if isinstance(policy.action_space, spaces.Box):
            normal = distribution.distribution
            for mean, scale in zip(normal.loc[0], normal.scale[0], strict=True):
                mean_gradient, log_scale_gradient = gradient(mean), gradient(scale.log())
                matrix += th.outer(mean_gradient, mean_gradient) / scale.detach() ** 2
                matrix += 2 * th.outer(log_scale_gradient, log_scale_gradient)
            continue
        for action in all_actions(policy.action_space):
            log_prob = distribution.log_prob(action)[0]
            score = gradient(log_prob)
            matrix += log_prob.exp().detach() * th.outer(score, score)
    return matrix / len(observations)


def names_of(policy, actor_parameters):
    """The actor's parameters by name. Deep copies are not views of the original's, but have its order."""
    return [
        name for name, _ in policy.named_parameters() if not name.startswith(("value_net", "mlp_extractor.value_net", "vf_"))
    ]


def all_actions(space):
    if isinstance(space, spaces.Discrete):
        return [th.tensor([action]) for action in range(space.n)]
    sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else [2] * space.n
    return [th.tensor([action], dtype=th.float32) for action in itertools.product(*map(range, sizes))]


def all_linearizations(policy, flat, observations):
    linearizations = [linearize(policy, flat, observations)]
    for linearization in (GaussNewtonLinearization, DivergenceLinearization):
        linearizations.append(linearization(action_distribution(policy, observations), flat))
    return linearizations


def assert_all_agree(policy, observations, by_hand):
    flat = flat_actor(policy)
    vector = th.randn(flat.tensor.numel(), generator=th.Generator().manual_seed(1))
    actions = policy.get_distribution(observations).get_actions().detach()
    linearizations = all_linearizations(policy, flat, observations)
    assert isinstance(linearizations[0], PerceptronLinearization) == by_hand
    products = [linearization.fisher_product(vector) for linearization in linearizations]
    # A second product from the same graphs, and a gradient
    doubled = [linearization.fisher_product(2 * vector) for linearization in linearizations]
    gradients = [
        linearization.gradient((linearization.distribution.log_prob(actions) ** 2).mean()) for linearization in linearizations
    ]
    for results in (products, doubled, gradients):
        scale = results[-1].abs().max().item()
        assert scale > 0
        for result in results:
            th.testing.assert_close(result, results[-1], rtol=1e-5, atol=1e-5 * scale)


@each_action_space
@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU])
def test_products_equal_those_of_the_explicit_matrix(action_space, activation_fn):
    policy = make_policy(action_space, activation_fn=activation_fn)
    flat = flat_actor(policy)
    observations = th.randn(7, 3, generator=th.Generator().manual_seed(0))
    matrix = explicit_fisher_matrix(policy, flat, observations)
    for linearization in all_linearizations(policy, flat, observations):
        columns = [linearization.fisher_product(unit) for unit in th.eye(len(matrix))]
        th.testing.assert_close(th.stack(columns, 1).double(), matrix, rtol=1e-4, atol=1e-6)


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
    observations, _ = policy.obs_to_tensor(
        {key: np.stack([space[key].sample() for _ in range(5)]) for key in space.spaces}
    )
    assert_all_agree(policy, observations, by_hand=False)


@pytest.mark.parametrize("squash_output", [True, False])
def test_all_forms_agree_for_state_dependent_exploration(squash_output):
    policy_kwargs = {"net_arch": [8], "squash_output": squash_output}
    env = Spaces(ACTION_SPACES["Box"])
    policy = A2C("MlpPolicy", env, use_sde=True, policy_kwargs=policy_kwargs, seed=0, device="cpu").policy
    assert_all_agree(policy, th.randn(9, 3), by_hand=False)


def test_an_unknown_distribution_takes_second_derivatives(monkeypatch):
    policy = make_policy(ACTION_SPACES["Box"], activation_fn=nn.ELU)
    monkeypatch.setattr(fisher, "_METRICS", {})
    assert isinstance(linearize(policy, flat_actor(policy), th.randn(4, 3)), DivergenceLinearization)


def test_frozen_layers_are_left_to_automatic_differentiation():
    policy = make_policy(ACTION_SPACES["Discrete"])
    policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
    assert_all_agree(policy, th.randn(9, 3), by_hand=False)


def test_divergence_is_that_of_whole_actions_from_old_to_new():
    box, other = make_policy(ACTION_SPACES["Box"]), make_policy(ACTION_SPACES["Box"])
    observations = th.randn(5, 3)
    with th.no_grad():
        other.action_net.bias += th.tensor([0.1, -0.2, 0.3])
        other.log_std += 0.5
    old, new = box.get_distribution(observations), other.get_distribution(observations)
    shift, scale = th.tensor([0.1, -0.2, 0.3]), box.log_std.exp()
    ratio = (-2 * th.tensor(0.5)).exp()
    by_hand = (0.5 + 0.5 * ratio * (1 + (shift / scale) ** 2) - 0.5).sum()
    th.testing.assert_close(kl_divergence(old, new), by_hand.detach().expand(5), rtol=1e-4, atol=1e-6)


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
