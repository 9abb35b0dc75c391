"""SAC-Discrete against hand-computed numbers, float64 computations, and the exact solution of a bandit."""

import copy
import math
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algo_cases import Normalized
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_ext import SACDiscrete
from sb3_ext.common.evaluation import PerceptronEvaluation

SMALL = {"learning_starts": 32, "batch_size": 16, "buffer_size": 500, "policy_kwargs": {"net_arch": [16, 8]}}


def cartpole(**kwargs):
    return SACDiscrete("MlpPolicy", make_vec_env("CartPole-v1", seed=0), **{"seed": 0, "device": "cpu", **SMALL, **kwargs})


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


def random_log_probs(n=5, n_actions=3):
    logits = th.randn(n, n_actions, generator=th.Generator().manual_seed(1), dtype=th.float64)
    return logits, logits.log_softmax(dim=1)


def test_target_by_hand():
    model = cartpole(gamma=0.9)
    # The smaller of the two values of each action counts
    for network, q_values in zip(model.policy.critic_target.networks, ([5.0, 2.0], [1.0, 4.0]), strict=True):
        network[-1].weight.data.zero_()
        network[-1].bias.data.copy_(th.tensor(q_values))
    data = batch(2)._replace(rewards=th.tensor([[3.0], [4.0]]), dones=th.tensor([[0.0], [1.0]]))
    probs = th.tensor([[0.25, 0.75], [0.5, 0.5]])
    value = 0.25 * (1.0 - 0.2 * math.log(0.25)) + 0.75 * (2.0 - 0.2 * math.log(0.75))
    target = model._target(data, probs.log(), th.tensor(0.2))
    th.testing.assert_close(target, th.tensor([[3.0 + 0.9 * value], [4.0]]))
    n_step_target = model._target(data._replace(discounts=th.tensor([[0.5], [0.5]])), probs.log(), th.tensor(0.2))
    th.testing.assert_close(n_step_target, th.tensor([[3.0 + 0.5 * value], [4.0]]))


def test_critic_loss_by_hand():
    q_values = [th.tensor([[1.0, 2.0], [3.0, 4.0]]), th.tensor([[0.0, 1.0], [2.0, 2.0]])]
    loss, gradients = SACDiscrete._critic_loss(q_values, th.tensor([[1], [0]]), th.tensor([[0.0], [1.0]]))
    # Errors 2 and 2 of the first critic, 1 and 1 of the second, means of their squares 4 and 1
    assert loss.item() == pytest.approx(0.5 * (4 + 1))
    th.testing.assert_close(gradients[0], th.tensor([[0.0, 1.0], [1.0, 0.0]]))
    th.testing.assert_close(gradients[1], th.tensor([[0.0, 0.5], [0.5, 0.0]]))


def test_actor_loss_by_hand():
    probs, q_values = th.tensor([[0.25, 0.75], [0.5, 0.5]]), th.tensor([[1.0, 2.0], [4.0, 0.0]])
    loss, _ = SACDiscrete._actor_loss(probs.log(), q_values, th.tensor(0.5))
    first = 0.25 * (0.5 * math.log(0.25) - 1.0) + 0.75 * (0.5 * math.log(0.75) - 2.0)
    second = 0.5 * math.log(0.5) - 2.0
    assert loss.item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_gradient_of_the_actor_loss_against_finite_differences(ent_coef):
    logits, log_probs = random_log_probs()
    q_values = 3 * th.randn(5, 3, generator=th.Generator().manual_seed(2), dtype=th.float64)

    def objective(logits):
        # Expectation of cost over the actions, one state and one action at a time
        total = 0.0
        for state in range(5):
            probs = np.exp(logits[state]) / np.exp(logits[state]).sum()
            total += sum(p * (ent_coef * math.log(p) - q) for p, q in zip(probs, q_values[state].tolist(), strict=True))
        return total / 5

    loss, gradient = SACDiscrete._actor_loss(log_probs, q_values, th.tensor(ent_coef))
    assert loss.item() == pytest.approx(objective(logits.numpy()))
    for index in np.ndindex(5, 3):
        shift = np.zeros((5, 3))
        shift[index] = 1e-6
        slope = (objective(logits.numpy() + shift) - objective(logits.numpy() - shift)) / 2e-6
        assert gradient[index].item() == pytest.approx(slope, abs=1e-8)


def test_entropy_and_its_coefficient_by_hand():
    log_probs = th.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    entropy = SACDiscrete._entropy(log_probs)
    expected = (-0.25 * math.log(0.25) - 0.75 * math.log(0.75) + math.log(2)) / 2
    assert entropy.item() == pytest.approx(expected)
    model = cartpole(target_entropy_ratio=0.5)
    loss, gradient = model._ent_coef_loss(th.tensor([-2.0]), entropy)
    # More entropy than wanted: the coefficient has to fall
    assert gradient.item() == pytest.approx(expected - 0.5 * math.log(2)) and gradient > 0
    assert loss.item() == pytest.approx(-2.0 * gradient.item())


@pytest.mark.parametrize(("ent_coef", "value"), [("auto", 1.0), ("auto_0.3", 0.3), (0.2, 0.2)])
def test_entropy_coefficients_begin_as_asked(ent_coef, value):
    assert cartpole(ent_coef=ent_coef)._update(batch())["ent_coef"].item() == pytest.approx(value)


def test_target_critics_have_the_statistics_of_the_critics():
    policy_kwargs = {"net_arch": [4], "features_extractor_class": Normalized}
    model = cartpole(policy_kwargs=policy_kwargs, tau=0.1, target_update_interval=2)
    critic, target = model.critic.features_extractor.norm, model.critic_target.features_extractor.norm
    model._update(batch())
    assert not th.equal(critic.running_mean, target.running_mean)
    model._update(batch())
    assert critic.running_mean.abs().sum() > 0.01
    th.testing.assert_close(critic.running_mean, target.running_mean, rtol=0, atol=0)
    th.testing.assert_close(critic.running_var, target.running_var, rtol=0, atol=0)


@pytest.mark.parametrize("n_actions", [2, 18])
def test_rare_actions_stay_finite(n_actions):
    log_probs = th.full((1, n_actions), 0.0)
    log_probs[0, 0] = 500.0
    log_probs = log_probs.log_softmax(dim=1)
    loss, gradient = SACDiscrete._actor_loss(log_probs, th.zeros(1, n_actions), th.tensor(1.0))
    assert th.isfinite(loss) and th.isfinite(gradient).all() and th.isfinite(SACDiscrete._entropy(log_probs))


@pytest.mark.parametrize("ent_coef", [0.1, "auto_0.5"])
@pytest.mark.parametrize("net_arch", [[7], {"pi": [9, 8], "qf": [6]}])
def test_update_against_float64(ent_coef, net_arch):
    policy_kwargs = {"net_arch": net_arch, "optimizer_class": th.optim.SGD, "n_critics": 3}
    model = cartpole(policy_kwargs=policy_kwargs, learning_rate=0.1, ent_coef=ent_coef, tau=0.2)
    before = copy.deepcopy(model.policy).double()
    data = batch()
    obs, next_obs, rewards, dones = (
        tensor.double() for tensor in (data.observations, data.next_observations, data.rewards, data.dones)
    )

    def run(network, inputs):
        # Layer by layer, without the fast path
        for layer in network:
            inputs = layer(inputs)
        return inputs

    def probs_of(obs):
        return run(before.actor.networks[0], obs).softmax(dim=1)

    def values_of(critic, obs):
        return th.stack([run(network, obs) for network in critic.networks])

    value = float(ent_coef) if isinstance(ent_coef, float) else 0.5
    next_probs = probs_of(next_obs)
    next_values = (next_probs * (values_of(before.critic_target, next_obs).amin(0) - value * next_probs.log())).sum(1)
    target = (rewards[:, 0] + 0.99 * (1 - dones[:, 0]) * next_values).detach()
    taken = values_of(before.critic, obs)[:, th.arange(6), data.actions[:, 0]]
    critic_loss = 0.5 * ((taken - target) ** 2).mean(dim=1).sum()
    with th.no_grad():
        gradients = th.autograd.grad(critic_loss, list(before.critic.parameters()))
        for parameter, gradient in zip(before.critic.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
        for old, new in zip(before.critic_target.parameters(), before.critic.parameters(), strict=True):
            old += 0.2 * (new - old)
    # The actor sees the critics after their step
    probs = probs_of(obs)
    actor_loss = (probs * (value * probs.log() - values_of(before.critic, obs).amin(0).detach())).sum(1).mean()
    entropy = -(probs * probs.log()).sum(1).mean().item()
    with th.no_grad():
        for parameter, gradient in zip(
            before.actor.parameters(), th.autograd.grad(actor_loss, list(before.actor.parameters())), strict=True
        ):
            parameter -= 0.1 * gradient

    log = model._update(data)
    th.testing.assert_close(log["critic_loss"].double(), critic_loss.detach(), rtol=1e-5, atol=1e-6)
    th.testing.assert_close(log["actor_loss"].double(), actor_loss.detach(), rtol=1e-5, atol=1e-6)
    assert log["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert log["q_value"].item() == pytest.approx(values_of(before.critic, obs).amin(0).mean().item(), rel=1e-5)
    for name, expected in before.state_dict().items():
        th.testing.assert_close(model.policy.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-5)
    if ent_coef == "auto_0.5":
        # Adam's first step has the size of the learning rate
        direction = np.sign(0.5 * math.log(2) - entropy)
        assert model.log_ent_coef.item() == pytest.approx(math.log(0.5) + 0.1 * direction, rel=1e-4)


class Bandit(gym.Env):
    """One state, four actions, one step."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(4)
    rewards = (1.0, 0.6, 0.2, 0.0)

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), self.rewards[action], True, False, {}


def exact_bandit_solution(target_entropy):
    """The coefficient at which softmax(rewards / coefficient) has the target entropy, by bisection."""
    low, high = 1e-3, 100.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        probs = np.exp((np.array(Bandit.rewards) - 1) / middle)
        probs /= probs.sum()
        entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum()
        low, high = (middle, high) if entropy < target_entropy else (low, middle)
    return middle, probs


def learn_bandit(algo=SACDiscrete):
    model = algo(
        "MlpPolicy",
        Bandit(),
        learning_rate=3e-3,
        buffer_size=400,
        learning_starts=400,
        batch_size=32,
        train_freq=400,
        gradient_steps=3000,
        ent_coef="auto_0.5",
        target_entropy_ratio=0.6,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        device="cpu",
    )
    # The learning starts with the second rollout
    return model.learn(800)


def probabilities(model):
    with th.no_grad():
        return model.policy.actor(th.ones(1, 1)).softmax(dim=1).numpy()[0]


def test_bandit_has_the_exact_solution():
    """Fails with the sign of the coefficient's loss reversed, and with the bug of the next test."""
    coefficient, probs = exact_bandit_solution(0.6 * math.log(4))
    model = learn_bandit()
    np.testing.assert_allclose(probabilities(model), probs, atol=0.02)
    assert model.log_ent_coef.exp().item() == pytest.approx(coefficient, rel=0.05)


def test_log_probabilities_must_be_weighted():
    class Unweighted(SACDiscrete):
        """A known bug: log-probabilities averaged over the actions as if all were equally likely."""

        def _ent_coef_loss(self, log_ent_coef, entropy):
            with th.no_grad():
                unweighted = -self.policy.actor(th.ones(1, 1)).log_softmax(dim=1).mean()
            return super()._ent_coef_loss(log_ent_coef, unweighted)

    _, probs = exact_bandit_solution(0.6 * math.log(4))
    assert np.abs(probabilities(learn_bandit(Unweighted)) - probs).max() > 0.1


class Constant(Bandit):
    """The same state again and again, a reward of 1 for any action."""

    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}


def test_target_critics_give_the_target():
    """With frozen target critics the values are those of one step; the critics themselves would give 1 / (1 - 0.9) = 10."""
    model = SACDiscrete(
        "MlpPolicy",
        gym.wrappers.TimeLimit(Constant(), 50),
        learning_rate=3e-3,
        buffer_size=200,
        learning_starts=200,
        batch_size=32,
        train_freq=200,
        gradient_steps=1500,
        tau=0.0,
        gamma=0.9,
        ent_coef=0.0,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        device="cpu",
    ).learn(400)
    with th.no_grad():
        probs = model.policy.actor(th.ones(1, 1)).softmax(dim=1)
        frozen = SACDiscrete._min_q_values(model.policy.critic_target(th.ones(1, 1)))
        for q_values in model.policy.critic(th.ones(1, 1)):
            th.testing.assert_close(q_values, (1 + 0.9 * (probs * frozen).sum()).expand(1, 4), rtol=0.02, atol=0.02)


def test_hard_target_updates():
    model = cartpole(tau=1.0, target_update_interval=3)
    flat, flat_target = model.policy.flat_critic, model.policy.flat_critic_target
    for n_updates in range(1, 7):
        model._update(batch())
        assert th.equal(flat.tensor, flat_target.tensor) == (n_updates % 3 == 0)


def test_vectors_and_images_take_the_fast_path():
    model = cartpole()
    obs = th.randn(2, 4)
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    image_model = SACDiscrete("CnnPolicy", env, buffer_size=10, seed=0, device="cpu")
    images = image_model.policy.critic.preprocess(th.randint(0, 256, (2, 1, 40, 40), dtype=th.uint8))
    for policy, inputs in ((model.policy, obs), (image_model.policy, images)):
        for network, flat in ((policy.actor, policy.flat_actor), (policy.critic, policy.flat_critic)):
            assert isinstance(network.heads.evaluate(flat, inputs), PerceptronEvaluation)


def test_actions_that_do_not_start_at_zero():
    class Shifted(Bandit):
        action_space = spaces.Discrete(4, start=3)
        seen: set = set()  # noqa: RUF012

        def step(self, action):
            self.seen.add(int(action))
            return super().step(action - 3)

    model = SACDiscrete("MlpPolicy", Shifted(), learning_rate=3e-3, learning_starts=50, seed=0, device="cpu").learn(300)
    assert Shifted.seen == {3, 4, 5, 6}
    assert model.predict(np.ones(1, np.float32), deterministic=True)[0] == 3


def test_n_step_returns(tmp_path: Path):
    model = cartpole(n_steps=3).learn(100)
    assert model.replay_buffer.sample(8).discounts.min() == pytest.approx(0.99**3)
    model.save(tmp_path / "agent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = SACDiscrete.load(tmp_path / "agent", env=model.get_env(), device="cpu")
    assert loaded.learn(100).replay_buffer.sample(8).discounts.min() == pytest.approx(0.99**3)


def test_learns_cartpole():
    model = cartpole(
        learning_rate=3e-3,
        batch_size=64,
        buffer_size=10_000,
        learning_starts=500,
        train_freq=8,
        gradient_steps=4,
        tau=0.02,
        target_entropy_ratio=0.3,
        policy_kwargs={"net_arch": [64, 64]},
    ).learn(6000)
    env = make_vec_env("CartPole-v1", seed=100)
    assert evaluate_policy(model, env, n_eval_episodes=10)[0] > 250


@pytest.mark.parametrize(
    ("name", "value"), [("tau", 1.5), ("gamma", -0.1), ("batch_size", 0), ("n_steps", 0), ("target_entropy_ratio", 1.1)]
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* but got {value}"):
        cartpole(**{name: value})


@pytest.mark.parametrize("ent_coef", ["automatic", "auto_x", "auto_0", "auto_-1", -0.5])
def test_bad_entropy_coefficients_are_named(ent_coef):
    with pytest.raises(ValueError, match="ent_coef must be"):
        cartpole(ent_coef=ent_coef)


def test_bad_target_entropy_is_named():
    with pytest.raises(ValueError, match="target_entropy must be"):
        cartpole(target_entropy="max")
    # SB3's SAC has minus the number of action dimensions
    for value in (-2.0, 0.7):
        with pytest.raises(ValueError, match=rf"target_entropy must be in \[0, 0.69.*but got {value}"):
            cartpole(target_entropy=value)


def test_unbounded_actions_are_refused():
    class Unbounded(gym.Env):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-np.inf, np.inf, (1,))

    with pytest.raises(ValueError, match="supports Discrete action spaces, but got Box"):
        SACDiscrete("MlpPolicy", Unbounded())


def test_networks_have_the_names_of_sb3(tmp_path):
    model = cartpole()
    model.save(tmp_path / "model")
    for each in (model, SACDiscrete.load(tmp_path / "model", device="cpu")):
        networks = each.policy
        assert (each.actor, each.critic, each.critic_target) == (networks.actor, networks.critic, networks.critic_target)


def test_divergence_is_a_value_error():
    model = cartpole()
    model.policy.flat_critic.tensor.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        model.learn(64)
