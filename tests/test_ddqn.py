"""Double and Dueling Double DQN against hand-computed numbers, float64 loops, and SB3's DQN."""

import copy
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algo_cases import Normalized
from gymnasium import spaces
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ext import DDQN, DuelingDDQN, OptionCritic, SACDiscrete
from sb3_ext.algos.ddqn import MlpPolicy
from sb3_ext.algos.dueling_ddqn.policies import DuelingMLP, DuelingQNetwork
from sb3_ext.common.evaluation import PerceptronEvaluation
from sb3_ext.common.mlp import layers_as_numpy

SMALL = {"learning_rate": 1e-3, "learning_starts": 32, "batch_size": 16, "buffer_size": 500, "target_update_interval": 20}


def cartpole(algo, **kwargs):
    return algo("MlpPolicy", make_vec_env("CartPole-v1", seed=0), **{"seed": 0, "device": "cpu", **SMALL, **kwargs})


def batch(n=6, n_actions=2, discounts=None):
    generator = th.Generator().manual_seed(0)
    return ReplayBufferSamples(
        th.randn(n, 4, generator=generator),
        th.randint(n_actions, (n, 1), generator=generator),
        th.randn(n, 4, generator=generator),
        th.tensor([[1.0]] + [[0.0]] * (n - 1)),
        th.randn(n, 1, generator=generator),
        discounts,
    )


def update(model, data):
    """:return: the loss of one update with a batch as the replay buffer gives it"""
    data = model.q_net.preprocess_batch(data)
    return model._update(data, model.q_net_target.q_values(data.next_observations))


@pytest.mark.parametrize(
    ("double_q", "expected"),
    [
        # The online network chooses action 1 in the first state and 0 in the second
        (True, [1.0 + 0.9 * 2.0, 2.0 + 0.9 * 4.0, 3.0]),
        # The target network chooses 0 and 1
        (False, [1.0 + 0.9 * 5.0, 2.0 + 0.9 * 7.0, 3.0]),
    ],
)
def test_target_by_hand(double_q, expected):
    model = cartpole(DDQN, gamma=0.9, double_q=double_q)
    next_q_values = th.tensor([[5.0, 2.0], [4.0, 7.0], [8.0, 9.0]])
    data = batch(3)._replace(rewards=th.tensor([[1.0], [2.0], [3.0]]), dones=th.tensor([[0.0], [0.0], [1.0]]))
    target = model._target(data, th.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), next_q_values)
    th.testing.assert_close(target, th.tensor(expected).unsqueeze(1))


def test_target_with_discounts_of_n_steps():
    next_q_values = th.tensor([[5.0, 2.0], [4.0, 7.0]])
    data = batch(2, discounts=th.tensor([[0.5], [0.25]]))._replace(rewards=th.zeros(2, 1), dones=th.zeros(2, 1))
    target = cartpole(DDQN)._target(data, th.tensor([[0.0, 1.0], [1.0, 0.0]]), next_q_values)
    th.testing.assert_close(target, th.tensor([[1.0], [1.0]]))


def test_dueling_aggregation_by_hand():
    # Hidden units (1, 2) of the value and 3 of the advantages: V = 10 + 2 * 20 + 1, A = (3 * 1 + 5, 3 * -2 + 4)
    net = DuelingMLP(3, 2, [3], nn.ReLU)
    with th.no_grad():
        net.trunk[0].weight.copy_(th.eye(3))
        net.trunk[0].bias.zero_()
        net.value_net.weight.copy_(th.tensor([[10.0, 20.0]]))
        net.value_net.bias.fill_(1.0)
        net.advantage_net.weight.copy_(th.tensor([[1.0], [-2.0]]))
        net.advantage_net.bias.copy_(th.tensor([5.0, 4.0]))
    features = th.tensor([[1.0, 2.0, 3.0]])
    expected = th.tensor([[51.0 + 8.0 - 3.0, 51.0 - 2.0 - 3.0]])
    th.testing.assert_close(net(features), expected)
    with th.no_grad():
        th.testing.assert_close(net(features), expected)
    # The loss is the value of the first action
    activations, out = net.activations(features), [th.empty_like(parameter) for parameter in net.weights_and_biases()]
    net.gradients(activations, th.tensor([[1.0, 0.0]]), out)
    *_, value_weight, value_bias, advantage_weight, advantage_bias = out
    th.testing.assert_close(value_weight, th.tensor([[1.0, 2.0]]))
    th.testing.assert_close(value_bias, th.tensor([1.0]))
    th.testing.assert_close(advantage_weight, th.tensor([[1.5], [-1.5]]))
    th.testing.assert_close(advantage_bias, th.tensor([0.5, -0.5]))


@pytest.mark.parametrize("with_graph", [False, True])
def test_forward_is_the_combination_of_the_streams(with_graph):
    q_net, obs = cartpole(DuelingDDQN).q_net, th.randn(3, 4)
    net = q_net.q_net
    with th.set_grad_enabled(with_graph):
        hidden = net.trunk(obs).relu()
        advantages = net.advantage_net(hidden[:, 32:])
        expected = net.value_net(hidden[:, :32]) + advantages - advantages.mean(dim=1, keepdim=True)
        th.testing.assert_close(q_net(obs), expected)


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
@pytest.mark.parametrize("net_arch", [[7], [8, 7], [9, 8, 7]])
@pytest.mark.parametrize("max_grad_norm", [10.0, 0.01])
def test_update_against_float64(algo, net_arch, max_grad_norm):
    policy_kwargs = {"net_arch": net_arch, "optimizer_class": th.optim.SGD}
    model = cartpole(algo, policy_kwargs=policy_kwargs, learning_rate=0.1, max_grad_norm=max_grad_norm)
    model._logger = None
    online, target, data = copy.deepcopy(model.q_net).double(), copy.deepcopy(model.q_net_target).double(), batch()
    doubles = [tensor.double() for tensor in (data.observations, data.next_observations, data.rewards, data.dones)]
    obs, next_obs, rewards, dones = doubles

    def q_values(net, obs):
        # Layer by layer, without the fast path
        def run(module, inputs):
            for layer in module:
                inputs = layer(inputs)
            return inputs

        if algo is DDQN:
            return run(net.q_net, obs)
        net = net.q_net
        *shared, streams = net.trunk
        hidden = run(shared, obs)
        if hidden is not obs and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient / np.sqrt(2))
        # The value stream has the odd unit
        values, advantages = streams(hidden).relu().tensor_split([(net_arch[-1] + 1) // 2], dim=1)
        advantages = net.advantage_net(advantages)
        return net.value_net(values) + advantages - advantages.mean(1, keepdim=True)

    next_actions = q_values(online, next_obs).argmax(1, keepdim=True)
    targets = rewards + 0.99 * (1 - dones) * q_values(target, next_obs).gather(1, next_actions)
    loss = th.nn.functional.smooth_l1_loss(q_values(online, obs).gather(1, data.actions), targets.detach())
    parameters = list(online.parameters())
    gradients = th.autograd.grad(loss, parameters)
    norm = th.cat([gradient.reshape(-1) for gradient in gradients]).norm()
    scale = min(1.0, max_grad_norm / norm.item())
    assert (scale < 1.0) == (max_grad_norm < 1.0)

    th.testing.assert_close(update(model, data).double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for after, before, gradient in zip(model.q_net.parameters(), parameters, gradients, strict=True):
        th.testing.assert_close(after.double(), before - 0.1 * scale * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["", "q_net.0", "features_extractor"])
@pytest.mark.parametrize("features_extractor_class", [FlattenExtractor, Normalized])
def test_without_double_q_it_is_dqn(features_extractor_class, frozen):
    policy_kwargs = {"features_extractor_class": features_extractor_class}
    kwargs = {"train_freq": 64, "gradient_steps": 32, "policy_kwargs": policy_kwargs}
    ours, expected = cartpole(DDQN, double_q=False, **kwargs), cartpole(DQN, **kwargs)
    ours.policy.load_state_dict(expected.policy.state_dict())
    for model in (ours, expected):
        if frozen:
            model.q_net.get_submodule(frozen).requires_grad_(False)
        model.set_random_seed(1)
        model.learn(256)
    for name, value in expected.policy.state_dict().items():
        th.testing.assert_close(ours.policy.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_batches_are_those_that_are_sampled_one_by_one():
    model = cartpole(DDQN, n_steps=3, learning_starts=1000)
    model.learn(300)
    for parameter in model.q_net_target.parameters():
        parameter.data.normal_()
    # Many batches at a time, and the rest
    np.random.seed(0)
    batches = list(model._batches(400, 100))
    np.random.seed(0)
    assert len(batches) == 400
    for data, next_q_values in batches:
        expected = model.replay_buffer.sample(100)
        for ours, theirs in zip(data, expected, strict=True):
            th.testing.assert_close(ours, theirs, rtol=0, atol=0)
        th.testing.assert_close(next_q_values, model.q_net_target(expected.next_observations))


@pytest.mark.parametrize("net_arch", [[32, 15], [15]])
@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
def test_the_actions_of_largest_value_are_chosen_without_asking_for_values(algo, net_arch):
    policy = cartpole(algo, policy_kwargs={"net_arch": net_arch, "activation_fn": nn.Tanh}).policy
    for parameter in policy.q_net.parameters():
        parameter.data.normal_()
    obs = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    actions = policy.q_net(th.as_tensor(obs)).argmax(1).numpy()
    assert 500 < actions.sum() < 4500
    if algo is DuelingDDQN:
        policy.q_net.q_net.forward = None  # it is not asked
        np.testing.assert_array_equal(policy.predict(obs)[0], actions)
    policy.q_net.forward = None  # nor this, in numpy
    few = obs[:200].reshape(20, 10, 4)
    np.testing.assert_array_equal(np.concatenate([policy.predict(ten)[0] for ten in few]), actions[:200])
    np.testing.assert_array_equal(policy.predict(few[0].astype(np.float64))[0], actions[:10])


def test_advantages_are_those_of_their_stream():
    net = DuelingMLP(2, 2, [2], nn.ReLU)
    rows = [[1.0, -1.0], [2.0, 3.0]], [0.5, -4.0], [[7.0]], [9.0], [[2.0], [-3.0]], [0.0, 1.0]
    for parameter, row in zip(net.parameters(), rows, strict=True):
        parameter.data = th.tensor(row)
    # The second unit of the hidden layer: 2 * 1 + 3 * 2 - 4 = 4
    forward = layers_as_numpy(net.advantage_layers(), nn.ReLU)
    np.testing.assert_array_equal(forward(np.array([[1.0, 2.0]], np.float32)), [[8.0, -11.0]])


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.SiLU])
def test_actions_on_images_are_those_of_largest_value(activation_fn):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    env.action_space = spaces.Discrete(3, start=2)
    model = DuelingDDQN("CnnPolicy", env, buffer_size=10, seed=0, device="cpu", policy_kwargs={"activation_fn": activation_fn})
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 40, 40), dtype=np.uint8)
    # On average, all actions are as good
    with th.no_grad():
        model.q_net.q_net.advantage_net.bias -= model.q_net(th.as_tensor(images)).mean(dim=0)
    expected = model.q_net(th.as_tensor(images)).argmax(1).numpy() + 2
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(model.predict(images, deterministic=True)[0], expected)


def test_a_network_that_values_actions_otherwise_acts_by_these_values():
    class Reversed(DuelingQNetwork):
        def forward(self, obs):
            return -super().forward(obs)

    policy = cartpole(DuelingDDQN).policy
    obs = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    expected = policy.q_net(th.as_tensor(obs)).argmin(1).numpy()
    policy.q_net.__class__ = Reversed
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)
    np.testing.assert_array_equal(policy.predict(obs[:5], deterministic=True)[0], expected[:5])


def test_policies_act_outside_of_no_grad_and_with_hooks():
    policy = cartpole(DuelingDDQN, policy_kwargs={"activation_fn": nn.Tanh}).policy
    obs = th.randn(200, 4)
    expected = policy.q_net(obs).argmax(dim=1)
    th.testing.assert_close(policy(obs), expected)
    asked = []
    for module in (policy.q_net, policy.q_net.q_net):
        with module.register_forward_hook(lambda module, *_: asked.append(module)):
            th.testing.assert_close(policy(obs), expected)
    assert asked == [policy.q_net, policy.q_net.q_net]


def test_what_is_not_acted_on_in_numpy():
    assert cartpole(DDQN).policy._acts_in_numpy(np.zeros((3, 4)))
    assert not cartpole(DDQN).policy._acts_in_numpy(np.zeros(4))
    assert not cartpole(DDQN).policy._acts_in_numpy(np.zeros((0, 4)))
    assert not cartpole(DDQN).policy._acts_in_numpy(np.zeros((1000, 4)))
    assert not cartpole(DDQN, policy_kwargs={"activation_fn": nn.ELU}).policy._acts_in_numpy(np.zeros((3, 4)))
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    image = np.zeros((1, 1, 40, 40), np.uint8)
    assert not DDQN("MlpPolicy", env, buffer_size=10, device="cpu").policy._acts_in_numpy(image)

    class Sampling(MlpPolicy):
        def _predict(self, observation, deterministic=True):
            return th.ones(len(observation), dtype=th.long)

    model = DDQN(Sampling, "CartPole-v1", buffer_size=10, device="cpu")
    assert model.predict(np.zeros((2, 4), np.float32), deterministic=True)[0].tolist() == [1, 1]


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
def test_vectors_and_images_take_the_fast_path(algo):
    model = cartpole(algo)
    assert isinstance(model.q_net.heads.evaluate(model.policy.flat, th.randn(2, 4), th.randn(2, 4)), PerceptronEvaluation)
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    model = algo("CnnPolicy", env, buffer_size=10, seed=0, device="cpu")
    obs = model.q_net.preprocess(th.randint(0, 256, (2, 1, 40, 40), dtype=th.uint8))
    assert isinstance(model.q_net.heads.evaluate(model.policy.flat, obs, obs), PerceptronEvaluation)


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh])
def test_dueling_networks_can_be_exported(activation_fn):
    net = DuelingMLP(4, 3, [8, 6], activation_fn).eval()
    obs = th.randn(50, 4)
    with th.no_grad():
        exported = th.export.export(net, (obs,)).module()
        th.testing.assert_close(exported(obs), net(obs), rtol=1e-5, atol=1e-6)
    th.testing.assert_close(exported(obs), net(obs), rtol=1e-5, atol=1e-6)


def test_batches_of_buffers_that_order_their_samples_are_sampled_one_by_one():
    env = BitFlippingEnv(n_bits=4, continuous=False)
    her = {"n_sampled_goal": 4, "goal_selection_strategy": "future"}
    buffer = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": her}
    model = DDQN("MultiInputPolicy", env, **SMALL, **buffer, seed=0, device="cpu").learn(100)
    asked = []
    sample = model.replay_buffer.sample
    model.replay_buffer.sample = lambda n, env=None: asked.append(n) or sample(n, env=env)
    # Its batches begin with what was really experienced
    for batch, _ in model._batches(4, 20):
        (reached,) = (batch.rewards[:4] == 0).sum(dim=0)
        assert reached < 4
    assert asked == [20] * 4


def test_observations_are_normalized_without_those_after_them():
    class Normalizing(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.norm = nn.BatchNorm1d(self.features_dim, affine=False)

        def forward(self, observations):
            return self.norm(super().forward(observations))

    model = cartpole(DDQN, policy_kwargs={"features_extractor_class": Normalizing})
    model.policy.set_training_mode(True)
    obs, next_obs = th.randn(8, 4), th.randn(8, 4) + 3
    evaluation = model.q_net.heads.evaluate(model.policy.flat, obs, next_obs)
    assert isinstance(evaluation, PerceptronEvaluation)
    th.testing.assert_close(evaluation.outputs[0], model.q_net(obs))


def test_optimizers_that_look_at_shapes_are_refused():
    with pytest.raises(ValueError, match="Adafactor looks at the shape"):
        cartpole(DDQN, policy_kwargs={"optimizer_class": th.optim.Adafactor})


def test_streams_of_images_are_as_in_the_paper():
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, discrete=True)
    q_net = DuelingDDQN("CnnPolicy", env, buffer_size=10, device="cpu").q_net
    shapes = {name: tuple(parameter.shape) for name, parameter in q_net.named_parameters() if "cnn" not in name}
    assert shapes == {
        # 512 units for each stream
        "q_net.trunk.0.weight": (1024, 3136),
        "q_net.trunk.0.bias": (1024,),
        "q_net.value_net.weight": (1, 512),
        "q_net.value_net.bias": (1,),
        "q_net.advantage_net.weight": (env.action_space.n, 512),
        "q_net.advantage_net.bias": (env.action_space.n,),
    }


# With SiLU by automatic differentiation
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_gradient_into_the_shared_layers_is_rescaled(policy, activation_fn):
    images = policy == "CnnPolicy"
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True) if images else gym.make("CartPole-v1")
    th.manual_seed(0)
    obs = th.randint(0, 256, (4, 1, 36, 36), dtype=th.uint8) if images else th.randn(4, 4)
    zeros = th.zeros(4, 1)
    steps = {}
    for rescale in (True, False):
        policy_kwargs = {
            "net_arch": [9, 8],
            "activation_fn": activation_fn,
            "optimizer_class": th.optim.SGD,
            "rescale_shared_gradient": rescale,
        }
        model = DuelingDDQN(policy, env, learning_rate=0.1, buffer_size=20, policy_kwargs=policy_kwargs, seed=0, device="cpu")
        assert model.policy._get_constructor_parameters()["rescale_shared_gradient"] is rescale
        before = copy.deepcopy(model.q_net.state_dict())
        update(model, ReplayBufferSamples(obs, zeros.long(), obs, zeros, zeros + 1.0))
        steps[rescale] = {name: value - before[name] for name, value in model.q_net.state_dict().items()}
    for name, step in steps[False].items():
        assert step.abs().max() > 0
        is_shared = "cnn" in name or name.startswith("q_net.trunk.0")
        th.testing.assert_close(steps[True][name], step * (0.5**0.5 if is_shared else 1.0), rtol=1e-3, atol=1e-6)


class NoisyChoiceEnv(gym.Env):
    """
    Sutton and Barto's example of maximization bias, without the way back: one step, many actions, each of which pays noise
    with a mean of -0.1. The first state leads there for free.
    """

    observation_space = spaces.Box(0, 1, (2,))
    action_space = spaces.Discrete(8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.is_first = True
        return np.array([1.0, 0.0], np.float32), {}

    def step(self, action):
        if self.is_first:
            self.is_first = False
            return np.array([0.0, 1.0], np.float32), 0.0, False, False, {}
        return np.array([0.0, 0.0], np.float32), -0.1 + self.np_random.normal(), True, False, {}


def value_of_the_first_state(**kwargs):
    model = DDQN(
        "MlpPolicy",
        NoisyChoiceEnv(),
        learning_rate=1e-2,
        buffer_size=60,
        learning_starts=60,
        train_freq=2,
        target_update_interval=200,
        exploration_final_eps=1.0,
        gamma=1.0,
        policy_kwargs={"net_arch": [32]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    values = []
    for _ in range(10):
        model.learn(300, reset_num_timesteps=False)
        values.append(model.q_net(th.tensor([[1.0, 0.0]])).mean().item())
    return np.mean(values[3:])


def test_double_q_learning_overestimates_less():
    # The truth is -0.1. An argmax of the target network in both terms is plain DQN.
    assert value_of_the_first_state(double_q=False) > 0.1
    assert value_of_the_first_state() < 0.0


class Constant(gym.Env):
    """The same state again and again, a reward of 1 for one of four actions. Actions are counted from 3."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(4, start=3)

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert 3 <= action < 7
        return np.ones(1, np.float32), 1.0 if action == 5 else 0.0, False, False, {}


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
def test_target_network_gives_the_target(algo):
    """With a frozen target network the values are those of one step; the network itself would give 1 / (1 - 0.9) = 10."""
    model = algo(
        "MlpPolicy",
        gym.wrappers.TimeLimit(Constant(), 50),
        learning_rate=3e-3,
        buffer_size=200,
        learning_starts=200,
        train_freq=200,
        gradient_steps=1500,
        target_update_interval=1_000_000,
        exploration_final_eps=1.0,
        gamma=0.9,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        device="cpu",
    ).learn(400)
    obs = np.ones(1, np.float32)
    assert model.predict(obs, deterministic=True)[0] == 5
    with th.no_grad():
        next_value = model.q_net_target(th.as_tensor(obs[None]))[0, 2]
        expected = th.tensor([[0.0, 0.0, 1.0, 0.0]]) + 0.9 * next_value
        th.testing.assert_close(model.q_net(th.as_tensor(obs[None])), expected, rtol=0.02, atol=0.02)


def test_time_limits_are_bootstrapped():
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 5), seed=0)
    model = DDQN("MlpPolicy", env, **{**SMALL, "learning_starts": 1000}, seed=0, device="cpu").learn(60)
    buffer: ReplayBuffer = model.replay_buffer
    assert buffer.dones[:60].sum() > 5 and buffer.timeouts[:60].sum() > 5
    assert model.replay_buffer.sample(500).dones.sum() == 0


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
def test_n_step_returns(algo, tmp_path: Path):
    model = cartpole(algo, n_steps=3).learn(100)
    assert model.replay_buffer.sample(8).discounts.min() == pytest.approx(0.99**3)
    model.save(tmp_path / "agent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = algo.load(tmp_path / "agent", env=model.get_env(), device="cpu")
    assert loaded.learn(100).replay_buffer.sample(8).discounts.min() == pytest.approx(0.99**3)


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN])
def test_learns_cartpole(algo):
    settings = {
        "learning_rate": 2e-3,
        "batch_size": 64,
        "buffer_size": 10_000,
        "learning_starts": 500,
        "train_freq": 16,
        "gradient_steps": 8,
        "target_update_interval": 100,
        "exploration_fraction": 0.4,
        "policy_kwargs": {"net_arch": [64, 64]},
    }
    model = cartpole(algo, **settings).learn(8000)
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    env.seed(100)
    lengths, obs, length = [], env.reset(), 0
    while len(lengths) < 5:
        obs, _, dones, _ = env.step(model.predict(obs, deterministic=True)[0])
        length += 1
        if dones[0]:
            lengths.append(length)
            length = 0
    assert np.mean(lengths) > 120


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 1.5), ("gamma", -0.1), ("batch_size", 0), ("n_steps", 0), ("exploration_final_eps", 2.0)]
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* but got {value}"):
        cartpole(DDQN, **{name: value})


def test_numbers_given_at_loading_are_checked(tmp_path):
    cartpole(DDQN).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tau must be .* but got 5"):
        DDQN.load(tmp_path / "model", tau=5)


@pytest.mark.parametrize("algo", [DDQN, SACDiscrete, OptionCritic])
def test_what_an_environment_asserts_is_shown(algo):
    def make_env():
        raise AssertionError("no ROM found")

    gym.register("WithoutROM-v0", entry_point=make_env)
    try:
        with pytest.raises(AssertionError, match="no ROM found"):
            algo("MlpPolicy", "WithoutROM-v0")
    finally:
        del gym.registry["WithoutROM-v0"]


@pytest.mark.parametrize("net_arch", [[], [64, 1]])
def test_streams_need_units(net_arch):
    with pytest.raises(ValueError, match="net_arch"):
        cartpole(DuelingDDQN, policy_kwargs={"net_arch": net_arch})


def test_divergence_is_a_value_error():
    model = cartpole(DDQN)
    model.policy.flat.tensor.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        model.learn(64)
