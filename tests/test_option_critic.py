"""Option-Critic against dynamic programming, finite differences, and its own rules of call and return."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algo_cases import Normalized
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.her import HerReplayBuffer

from sb3_ext import OptionCritic
from sb3_ext.algos.option_critic.option_critic import Transitions
from sb3_ext.algos.option_critic.statistics import WINDOW, OptionStatistics

GAMMA = 0.9
# A problem with three states, two actions and two options, all probabilities of which are known
NEXT_STATES = np.array([[1, 2], [2, 0], [0, 1]])
REWARDS = np.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.0]])
IS_TERMINAL = np.array([[False, False], [False, True], [False, False]])
# Of action 1, by state and option; quarters, so that a batch can hold actions as often as they are likely
PROBABILITIES = np.array([[0.25, 0.75], [0.5, 0.25], [0.75, 0.5]])
TERMINATIONS = np.array([[0.1, 0.6], [0.8, 0.3], [0.5, 0.2]])


class ThreeStates(gym.Env):
    observation_space = spaces.Box(0, 1, (3,))
    action_space = spaces.Discrete(2)

    def observe(self):
        return np.eye(1, 3, self.state, dtype=np.float32)[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(3))
        return self.observe(), {}

    def step(self, action):
        reward, terminated = REWARDS[self.state, action], IS_TERMINAL[self.state, action]
        self.state = NEXT_STATES[self.state, action]
        return self.observe(), float(reward), bool(terminated), False, {}


def tables(**kwargs):
    """A model whose networks are tables, with the probabilities above."""
    settings = {
        "n_options": 2,
        "gamma": GAMMA,
        "policy_kwargs": {"net_arch": [], "head_bias": False},
        "termination_regularization": 0.0,
        "ent_coef": 0.0,
        "seed": 0,
        "device": "cpu",
    }
    model = OptionCritic("MlpPolicy", gym.wrappers.TimeLimit(ThreeStates(), 20), **{**settings, **kwargs})
    logits = np.log(PROBABILITIES / (1 - PROBABILITIES))
    # (option, action, state); the logit of action 0 is 0
    model.policy.actor[0].weight.data.view(2, 2, 3)[:, 1] = th.as_tensor(logits.T, dtype=th.float32)
    model.policy.actor[0].weight.data.view(2, 2, 3)[:, 0] = 0.0
    odds = np.log(TERMINATIONS / (1 - TERMINATIONS))
    model.policy.termination_net[0].weight.data.copy_(th.as_tensor(odds.T, dtype=th.float32))
    return model


def exact_values():
    """By iterating equations 1 to 3 of the paper: values of options, (state, option), and of actions, (..., action)."""
    values = np.zeros((3, 2))
    for _ in range(500):
        arrival = (1 - TERMINATIONS) * values + TERMINATIONS * values.max(axis=1, keepdims=True)
        of_actions = REWARDS[:, None] + GAMMA * ~IS_TERMINAL[:, None] * arrival[NEXT_STATES].transpose(0, 2, 1)
        values = (1 - PROBABILITIES) * of_actions[..., 0] + PROBABILITIES * of_actions[..., 1]
    return values, of_actions


def exact_tables(**kwargs):
    """As ``tables``, with the exact values in the critic and its target."""
    model = tables(**kwargs)
    values, _ = exact_values()
    for critic in (model.policy.critic, model.policy.critic_target):
        critic.values[0].weight.data.copy_(th.as_tensor(values.T, dtype=th.float32))
    return model


def target_of(model, rollout):
    _, *evaluated = model._evaluate_next(rollout.next_observations)
    return model._target(rollout.options, rollout.rewards, rollout.dones, *evaluated)


def losses_of(model, rollout):
    """Of policies and terminations."""
    hidden = model.policy.critic.hidden(rollout.observations)
    actor_loss, *_ = model._actor_loss(rollout, hidden, model._advantages(rollout, hidden, target_of(model, rollout)))
    return actor_loss, model._termination_loss(rollout, model.policy.critic.hidden(rollout.next_observations))


def all_transitions():
    """Each state and option four times, with the actions as often as they are likely."""
    rows = [
        (state, option, int(count < 4 * PROBABILITIES[state, option]))
        for state in range(3)
        for option in range(2)
        for count in range(4)
    ]
    states, options, actions = np.array(rows).T
    return Transitions(
        th.eye(3)[states],
        th.as_tensor(options)[:, None],
        th.as_tensor(actions)[:, None],
        th.as_tensor(REWARDS[states, actions], dtype=th.float32)[:, None],
        th.eye(3)[NEXT_STATES[states, actions]],
        *[th.as_tensor(IS_TERMINAL[states, actions], dtype=th.float32)[:, None]] * 2,
    ), rows


def test_values_of_options_are_learned():
    model = tables(
        learning_rate=lambda progress: 0.05 * progress,
        actor_learning_rate=0.0,
        termination_learning_rate=0.0,
        batch_size=256,
        train_freq=8,
        target_update_interval=8,
        exploration_final_eps=1.0,
        policy_kwargs={"net_arch": [], "head_bias": False},
    ).learn(6000)
    expected, _ = exact_values()
    with th.no_grad():
        # Of 6000 transitions; the mean of a Huber loss would be wrong by more than 2
        np.testing.assert_allclose(model.policy.critic(th.eye(3)).numpy(), expected, atol=0.4)
        # What was not to be learned has not changed
        np.testing.assert_allclose(model.policy.terminations(th.eye(3)).numpy(), TERMINATIONS, rtol=1e-5)


def test_target_is_the_value_of_state_option_and_action():
    model, (rollout, rows) = exact_tables(), all_transitions()
    _, of_actions = exact_values()
    target = target_of(model, rollout)
    np.testing.assert_allclose(target.squeeze(1).numpy(), [of_actions[row] for row in rows], rtol=1e-4)


def test_loss_of_the_values_by_hand():
    model = exact_tables()
    values, _ = exact_values()
    options, targets = th.tensor([[1], [0]]), th.tensor([[values[0, 1] + 1.0], [values[2, 0] - 3.0]])
    loss = model._critic_loss(th.eye(3)[[0, 2]], options, targets)
    assert loss.item() == pytest.approx((0.5 * 1.0 + 0.5 * 9.0) / 2, rel=1e-4)


def test_intra_option_gradient():
    model, (rollout, _) = exact_tables(), all_transitions()
    loss, _ = losses_of(model, rollout)
    (gradient,) = th.autograd.grad(loss, model.policy.actor[0].weight)
    _, of_actions = exact_values()

    def objective(weights):
        # Expectation over the options' actions, as a mean over states and options
        logits = weights.reshape(2, 2, 3).transpose(2, 0, 1)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        return (probabilities * of_actions).sum(axis=-1).mean()

    assert_gradient(-gradient, objective, model.policy.actor[0].weight)


@pytest.mark.parametrize(("progress", "weight"), [(1.0, 0.4), (0.25, 0.1), (0.0, 0.0)])
def test_the_entropy_bonus_can_fall(progress, weight):
    model, (rollout, rows) = exact_tables(ent_coef=LinearSchedule(0.4, 0.0, 1.0)), all_transitions()
    without, _ = losses_of(exact_tables(), rollout)
    model._current_progress_remaining = progress
    loss, _ = losses_of(model, rollout)
    probabilities = np.array([PROBABILITIES[state, option] for state, option, _ in rows])
    entropies = -probabilities * np.log(probabilities) - (1 - probabilities) * np.log(1 - probabilities)
    assert (without - loss).item() == pytest.approx(weight * entropies.mean(), rel=1e-4, abs=1e-6)


def test_standardized_advantages():
    model, (rollout, rows) = exact_tables(normalize_advantage=True), all_transitions()
    loss, _ = losses_of(model, rollout)
    values, of_actions = exact_values()
    advantages = np.array([of_actions[row] - values[row[:2]] for row in rows])
    probabilities = np.array([PROBABILITIES[row[:2]] if row[2] else 1 - PROBABILITIES[row[:2]] for row in rows])
    weights = (advantages - advantages.mean()) / advantages.std(ddof=1)
    assert loss.item() == pytest.approx(-(np.log(probabilities) * weights).mean(), rel=1e-3)
    # A single transition has no deviation
    single = Transitions(*[column[:1] for column in rollout])
    assert losses_of(model, single)[0].item() == losses_of(exact_tables(), single)[0].item() != 0.0


def test_several_steps_on_a_rollout_against_finite_differences():
    settings = {"net_arch": [], "head_bias": False, "optimizer_class": th.optim.SGD}
    model = exact_tables(
        n_epochs=3, clip_range=LinearSchedule(0.2, 0.0, 1.0), ent_coef=0.01, learning_rate=2.0, policy_kwargs=settings
    )
    model._current_progress_remaining = 0.5
    rollout, rows = all_transitions()
    values, of_actions = exact_values()
    states, options, actions = np.array(rows).T
    advantages = np.array([of_actions[row] - values[row[:2]] for row in rows])

    def objective(weights, old=None):
        logits = weights.reshape(2, 2, 3).transpose(2, 0, 1)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1)[states, options].mean()
        log_probs = log_probs[states, options, actions]
        gain = log_probs * advantages
        if old is not None:
            ratio = np.exp(log_probs - old)
            gain = np.minimum(ratio * advantages, ratio.clip(0.9, 1.1) * advantages)
        return gain.mean() + 0.01 * entropy, log_probs

    weights = model.policy.actor[0].weight.detach().double().numpy().ravel()
    model._update_all(rollout._replace(actions=rollout.options), rollout)
    _, old = objective(weights)
    for epoch in range(3):
        compared_with, gradient = (None if epoch == 0 else old), np.zeros_like(weights)
        for index, unit in enumerate(1e-6 * np.eye(len(weights))):
            above, below = objective(weights + unit, compared_with)[0], objective(weights - unit, compared_with)[0]
            gradient[index] = (above - below) / 2e-6
        weights = weights + 2.0 * gradient
    np.testing.assert_allclose(model.policy.actor[0].weight.detach().numpy().ravel(), weights, atol=1e-4)


def test_advantages_look_ahead_until_the_episode_ends():
    envs = make_vec_env(lambda: gym.wrappers.TimeLimit(ThreeStates(), 4), n_envs=2, seed=0)
    model = OptionCritic(
        "MlpPolicy", envs, gamma=GAMMA, gae_lambda=0.8, train_freq=20, learning_starts=100, seed=0, device="cpu"
    )
    rollout = model.learn(40)._latest_rollout()
    target_values, hidden = target_of(model, rollout), model.policy.critic.hidden(rollout.observations)
    advantages = model._advantages(rollout, hidden, target_values).numpy()
    values = model.policy.critic.values(hidden).gather(1, rollout.options)
    deltas = (target_values - values).detach().double().numpy().reshape(20, 2)
    ends = rollout.ends.numpy().reshape(20, 2) == 1
    # Some episodes end at the time limit, and others in a terminal state
    assert ends.sum() > rollout.dones.sum() > 0
    for env in range(2):
        for step in range(20):
            expected, weight = 0.0, 1.0
            for later in range(step, 20):
                expected += weight * deltas[later, env]
                weight *= GAMMA * 0.8
                if ends[later, env]:
                    break
            assert advantages[2 * step + env] == pytest.approx(expected, abs=1e-5)
    model.gae_lambda = 0.0
    np.testing.assert_allclose(model._advantages(rollout, hidden, target_values).numpy(), deltas.ravel(), atol=1e-6)


def test_termination_gradient_is_that_of_arriving():
    model, (rollout, rows) = exact_tables(), all_transitions()
    _, loss = losses_of(model, rollout)
    (gradient,) = th.autograd.grad(loss, model.policy.termination_net[0].weight)
    values, _ = exact_values()

    def objective(weights):
        # Mean value of arriving in the next states with the options in force
        terminations = 1 / (1 + np.exp(-weights.T))
        arrival = (1 - terminations) * values + terminations * values.max(axis=1, keepdims=True)
        return np.mean(
            [arrival[NEXT_STATES[state, action], option] * (not IS_TERMINAL[state, action]) for state, option, action in rows]
        )

    assert_gradient(-gradient, objective, model.policy.termination_net[0].weight)


def assert_gradient(gradient, objective, weight):
    weights, slopes = weight.detach().double().numpy(), np.zeros(weight.shape)
    for index in np.ndindex(*weights.shape):
        shift = np.zeros_like(weights)
        shift[index] = 1e-5
        slopes[index] = (objective(weights + shift) - objective(weights - shift)) / 2e-5
    np.testing.assert_allclose(gradient.numpy(), slopes, atol=1e-5)
    assert np.abs(slopes).max() > 1e-3


def test_deliberation_cost_makes_options_longer():
    rollout, _ = all_transitions()
    gradients = []
    for cost in (0.0, 0.5):
        model = exact_tables(termination_regularization=cost)
        gradients.append(th.autograd.grad(losses_of(model, rollout)[1], model.policy.termination_net[0].weight)[0])
    # Of the loss: larger means that termination becomes less likely
    assert (gradients[1] >= gradients[0]).all() and (gradients[1] > gradients[0]).any()


@pytest.mark.parametrize("detach_heads", [True, False])
def test_shared_layers_learn_from_the_heads_only_if_asked(detach_heads):
    model = OptionCritic(
        "MlpPolicy",
        gym.wrappers.TimeLimit(ThreeStates(), 20),
        detach_heads=detach_heads,
        policy_kwargs={"net_arch": [8], "optimizer_class": th.optim.SGD},
        learning_rate=0.1,
        max_grad_norm=None,
        seed=0,
        device="cpu",
    )
    rollout, _ = all_transitions()
    # Layers that see different things in the present state and in the next one
    for head in (model.policy.actor, model.policy.termination_net, model.policy.critic.values):
        head[0].weight.data.normal_()
    before = [parameter.clone() for parameter in model.policy.critic.parameters()]
    heads = [*model.policy.actor.parameters(), *model.policy.termination_net.parameters()]
    heads_before, heads_gradients = [head.clone() for head in heads], th.autograd.grad(sum(losses_of(model, rollout)), heads)
    critic_loss = model._critic_loss(rollout.observations, rollout.options, target_of(model, rollout))
    loss = critic_loss if detach_heads else critic_loss + sum(losses_of(model, rollout))
    gradients = th.autograd.grad(loss, list(model.policy.critic.parameters()))
    # The replay buffer has options in the place of actions
    model._update_all(rollout._replace(actions=rollout.options), rollout)
    for parameter, old, gradient in zip(model.policy.critic.parameters(), before, gradients, strict=True):
        th.testing.assert_close(parameter.detach(), old - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    for parameter, old, gradient in zip(heads, heads_before, heads_gradients, strict=True):
        th.testing.assert_close(parameter.detach(), old - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_target_network_gives_the_target():
    """With a frozen target network the values are those of one step; the network itself would give 1 / (1 - 0.9) = 10."""

    class Constant(Lasts):
        def step(self, action):
            return *super().step(action)[:2], False, self.time == self.length, {}

    model = OptionCritic(
        "MlpPolicy",
        Constant(50),
        n_options=2,
        learning_rate=lambda progress: 0.05 * progress,
        gamma=0.9,
        tau=0.0,
        policy_kwargs={"net_arch": []},
        seed=0,
        device="cpu",
    )
    model.policy.critic_target.values[0].bias.data.copy_(th.tensor([2.0, 3.0]))
    model.learn(2000)
    with th.no_grad():
        obs = th.zeros(1, 1)
        ends = model.policy.terminations(model.policy.critic.hidden(obs))
        expected = 1 + 0.9 * ((1 - ends) * th.tensor([[2.0, 3.0]]) + ends * 3.0)
        th.testing.assert_close(model.policy.critic(obs), expected, rtol=0.02, atol=0.02)


def test_the_target_network_follows_the_steps_of_all_environments():
    policy_kwargs = {"net_arch": [], "features_extractor_class": Normalized}
    env = make_vec_env("CartPole-v1", n_envs=3)
    model = OptionCritic("MlpPolicy", env, tau=0.5, target_update_interval=12, policy_kwargs=policy_kwargs, device="cpu")
    model.set_logger(configure(None, []))
    critic, target = model.policy.critic, model.policy.critic_target
    for network, value in ((critic, 4.0), (target, 2.0)):
        network.values[-1].bias.data.fill_(value)
        network.features_extractor.norm.running_mean.fill_(value)
    followed = []
    # Each call is a step of all three
    for _ in range(8):
        model._on_step()
        followed.append((target.values[-1].bias[0].item(), target.features_extractor.norm.running_mean[0].item()))
    # Statistics are not averaged
    assert followed == [(2.0, 2.0)] * 3 + [(3.0, 4.0)] * 4 + [(3.5, 4.0)]


def test_gradients_are_clipped_in_every_part():
    policy_kwargs = {"net_arch": [8], "optimizer_class": th.optim.SGD}
    model = cartpole(
        policy_kwargs=policy_kwargs, learning_rate=1.0, max_grad_norm=1e-4, train_freq=8, gradient_steps=3, learning_starts=0
    )
    flat = {name: getattr(model.policy, f"flat_{name}").tensor for name in ("critic", "actor", "termination")}
    before = {name: tensor.clone() for name, tensor in flat.items()}
    model.learn(8)
    # The values have three steps, with gradients of about the same direction, the others one
    distances = {name: (tensor - before[name]).norm().item() for name, tensor in flat.items()}
    assert distances["actor"] == pytest.approx(1e-4, rel=0.01)
    assert distances["termination"] == pytest.approx(1e-4, rel=0.01)
    assert 1e-4 < distances["critic"] < 3.03e-4


class Lasts(gym.Env):
    """Episodes of a fixed length."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(1, np.float32), 1.0, self.time == self.length, False, {}


@pytest.mark.parametrize("ends", [False, True])
def test_options_belong_to_environments(ends):
    lengths = (2, 3, 5)
    env = DummyVecEnv([lambda length=length: Lasts(length) for length in lengths])
    model = OptionCritic("MlpPolicy", env, n_options=50, exploration_final_eps=1.0, train_freq=30, seed=0, device="cpu")
    model.policy.termination_net[0].weight.data.zero_()
    model.policy.termination_net[0].bias.data.fill_(20.0 if ends else -20.0)
    steps, decide = [], model.policy.decide

    def recorded(*args):
        steps.append(decide(*args))
        return steps[-1]

    model.policy.decide = recorded
    model.learn(3 * 30)
    options = np.array([step.options for step in steps])
    for column, length in enumerate(lengths):
        runs = options[:, column].reshape(-1, length)
        if ends:
            # Chosen at every step, out of 50
            assert all(len(set(run)) > 1 or length < 4 for run in runs) and len(set(options[:, column])) > 12
        else:
            assert all(len(set(run)) == 1 for run in runs)
            assert len({run[0] for run in runs}) > 3
    # The replay buffer holds them in the place of actions
    np.testing.assert_array_equal(model.replay_buffer.actions[:30, :, 0], options[:30])


def cartpole(**kwargs):
    settings = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [16]}}
    return OptionCritic("MlpPolicy", make_vec_env("CartPole-v1", seed=0), **{**settings, **kwargs})


@pytest.mark.parametrize(
    "policy_kwargs",
    [{"net_arch": []}, {"net_arch": [8, 7]}, {"activation_fn": th.nn.Tanh}, {"net_arch": [], "head_arch": [8, 7]}],
)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_networks_in_numpy(policy_kwargs, env):
    model = OptionCritic("MlpPolicy", env, n_options=3, buffer_size=10, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    for parameter in model.policy.parameters():
        parameter.data.copy_(th.randn_like(parameter))
    obs = np.random.default_rng(0).normal(size=(5, *model.observation_space.shape)).astype(np.float32)
    in_numpy = model.policy.outputs_in_numpy(len(obs))
    for expected, actual in zip(model.policy.outputs(th.as_tensor(obs)), in_numpy(obs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert model.policy.outputs_in_numpy(100_000) is None
    other = OptionCritic("MlpPolicy", env, buffer_size=10, policy_kwargs={"activation_fn": th.nn.ELU}, device="cpu")
    assert other.policy.outputs_in_numpy(1) is None


def test_images_are_not_computed_in_numpy():
    # Which knows nothing of the division by 255
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)
    model = OptionCritic("MlpPolicy", env, buffer_size=10, policy_kwargs={"net_arch": [4]}, device="cpu")
    assert model.policy.outputs_in_numpy(1) is None
    assert cartpole().policy.outputs_in_numpy(1) is not None


def test_separate_networks_stay_apart_and_are_saved(tmp_path):
    model = cartpole(policy_kwargs={"net_arch": [], "head_arch": [8, 7]}, detach_heads=False, learning_starts=10)
    model.learn(100)
    # Updates of the values leave actions and terminations as they are
    before = model.policy.outputs(th.ones(1, 4))
    model._update_values(model.replay_buffer.sample(8))
    after = model.policy.outputs(th.ones(1, 4))
    np.testing.assert_array_equal(after.actions, before.actions)
    np.testing.assert_array_equal(after.terminations, before.terminations)
    assert (after.values != before.values).all()

    model.save(tmp_path / "model")
    loaded = OptionCritic.load(tmp_path / "model", device="cpu")
    assert loaded.policy.head_arch == [8, 7]
    for expected, actual in zip(after, loaded.policy.outputs(th.ones(1, 4)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_draws_have_the_distribution_of_the_option():
    model = tables(policy_kwargs={"net_arch": [], "head_bias": False, "temperature": 0.5})
    states, n = np.eye(3, dtype=np.float32), 20_000
    outputs = model.policy.outputs(th.as_tensor(states))
    np.random.seed(0)
    for state in range(3):
        of_state = type(outputs)(*(array[[state] * n] for array in outputs))
        for option in range(2):
            options = np.full(n, option)
            step = model.policy.decide(of_state, options, np.zeros(n, bool), deterministic=False)
            assert 1 - (~step.is_chosen).mean() == pytest.approx(TERMINATIONS[state, option], abs=0.02)
            drawn = model.policy._draw(of_state.actions[:, option], options, deterministic=False)
            odds = (PROBABILITIES[state, option] / (1 - PROBABILITIES[state, option])) ** 2
            assert drawn.mean() == pytest.approx(odds / (1 + odds), abs=0.02)
            # And so has the loss
            log_probs, entropies = model.policy.evaluate_options(
                th.as_tensor(states[[state]]), th.as_tensor([option]), th.as_tensor([[1]])
            )
            distribution = model.policy.distribution(th.as_tensor(states[[state]]), th.as_tensor([option]))
            assert log_probs.exp().item() == pytest.approx(odds / (1 + odds), rel=1e-4)
            assert entropies.item() == pytest.approx(distribution.entropy().item(), rel=1e-4)


def test_draws_of_continuous_actions():
    model = OptionCritic("MlpPolicy", "Pendulum-v1", n_options=2, buffer_size=10, seed=0, device="cpu")
    model.policy.log_std.data.copy_(th.tensor([[-1.0], [0.5]]))
    means, options = np.full((20_000, 1), 0.7, np.float32), np.arange(20_000) % 2
    np.random.seed(0)
    drawn = model.policy._draw(means, options, deterministic=False)
    for option, std in enumerate(np.exp([-1.0, 0.5])):
        assert drawn[options == option].mean() == pytest.approx(0.7, abs=0.05)
        assert drawn[options == option].std() == pytest.approx(std, rel=0.05)
    np.testing.assert_array_equal(model.policy._draw(means, options, deterministic=True), means)


def test_predict_carries_the_option():
    model = cartpole(n_options=3)
    obs = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    model.policy.termination_net[0].bias.data.fill_(-20.0)
    _, chosen = model.predict(obs, deterministic=True)
    with th.no_grad():
        best = model.policy.critic(th.as_tensor(obs)).argmax(1).numpy()
    np.testing.assert_array_equal(chosen[0], best)
    others = ((best + 1) % 3, np.ones(4))
    # It goes on,
    _, state = model.predict(obs, others, np.zeros(4, bool), deterministic=True)
    np.testing.assert_array_equal(state[0], others[0])
    _, state = model.predict(obs, others, deterministic=True)
    np.testing.assert_array_equal(state[0], others[0])
    # is chosen anew where an episode starts,
    _, state = model.predict(obs, others, np.array([True, False, False, True]), deterministic=True)
    np.testing.assert_array_equal(state[0], np.where([True, False, False, True], best, others[0]))
    # and ends where it ends
    model.policy.termination_net[0].bias.data.fill_(20.0)
    _, state = model.predict(obs, others, np.zeros(4, bool), deterministic=True)
    np.testing.assert_array_equal(state[0], best)


def test_deterministic_options_end_at_the_median_of_their_duration():
    model = cartpole(n_options=2, policy_kwargs={"net_arch": []})
    policy, obs = model.policy, np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], np.float32)
    with th.no_grad():
        for head in (policy.critic.values[0], policy.termination_net[0]):
            head.weight.zero_()
        # Options end with probability 1/4 in one state and 3/5 in the other
        odds = np.log([1 / 3, 3 / 2])
        policy.termination_net[0].weight[:, 0] = (odds[0] - odds[1]) / 2
        policy.termination_net[0].bias[:] = odds.mean()
        policy.critic.values[0].bias[:] = th.tensor([0.0, 1.0])
    # Option 0 is in force, and option 1 would be chosen: 3/4 and 9/16 are above 1/2, 27/64 is below; 2/5 is below at once
    state, options, survivals = (np.zeros(2, np.int64), np.ones(2)), [], []
    for _ in range(4):
        _, state = model.predict(obs, state, np.zeros(2, bool), deterministic=True)
        options.append(state[0])
        survivals.append(state[1])
    np.testing.assert_array_equal(np.transpose(options), [[0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(np.transpose(survivals), [[3 / 4, 9 / 16, 1, 3 / 4], [1, 1, 1, 1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("state", "episode_start", "message"),
    [
        ((np.zeros(3, int), np.ones(3)), None, "For 4 observations"),
        ((np.zeros(4, int), np.ones(4)), np.zeros(3, bool), "For 4 observations"),
        ((np.zeros(4, int),), None, "two arrays"),
        (np.zeros(4, int), None, "two arrays"),
        ((np.full(4, 9), np.ones(4)), None, "integers from 0 to 2"),
        ((np.zeros(4), np.ones(4)), None, "integers from 0 to 2"),
    ],
)
def test_bad_states_are_named(state, episode_start, message):
    with pytest.raises(ValueError, match=message):
        cartpole(n_options=3).predict(np.zeros((4, 4), np.float32), state, episode_start)


def test_saved_model_acts_the_same_through_an_episode(tmp_path):
    model = cartpole().learn(300)
    model.save(tmp_path / "model")
    # With the arguments as they were given
    loaded = OptionCritic.load(tmp_path / "model", device="cpu", policy_kwargs={"net_arch": [16]})
    env = make_vec_env("CartPole-v1", n_envs=3, seed=3)
    obs, states, starts = env.reset(), [None, None], np.ones(3, bool)
    for _ in range(40):
        actions = []
        for index, agent in enumerate((model, loaded)):
            action, states[index] = agent.predict(obs, states[index], starts, deterministic=True)
            actions.append(action)
        np.testing.assert_array_equal(*actions)
        np.testing.assert_array_equal(states[0][0], states[1][0])
        obs, _, starts, _ = env.step(actions[0])


class Phases(gym.Env):
    """Ten steps; the first five want action 0, the others action 1."""

    observation_space = spaces.Box(0, 1, (2,))
    action_space = spaces.Discrete(2)

    def observe(self):
        return np.eye(1, 2, int(self.time >= 5), dtype=np.float32)[0]

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == int(self.time >= 5))
        self.time += 1
        return self.observe(), reward, self.time == 10, False, {}


def test_options_learn_when_to_end():
    """Each option knows one action only. With the sign of the termination loss reversed, the wrong one goes on."""
    model = OptionCritic(
        "MlpPolicy",
        Phases(),
        n_options=2,
        learning_rate=0.02,
        actor_learning_rate=0.0,
        termination_learning_rate=0.05,
        target_update_interval=50,
        exploration_final_eps=0.3,
        policy_kwargs={"net_arch": [], "head_bias": False},
        seed=0,
        device="cpu",
    )
    model.policy.actor[0].weight.data.copy_(th.tensor([[20.0, 20.0], [0.0, 0.0], [0.0, 0.0], [20.0, 20.0]]))
    model.learn(4000)
    assert evaluate_policy(model, make_vec_env(Phases, seed=1), 5)[0] == 10
    with th.no_grad():
        terminations = model.policy.terminations(th.eye(2))
    # Each option ends in the other's phase, and not in its own
    assert (terminations.diagonal() < 0.2).all() and (terminations.flip(1).diagonal() > 0.8).all()


class Target(gym.Env):
    """One step; the action should be 0.6 in the first dimension and 3 in the second."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        error = (action - [0.6, 3.0]) / [1.0, 2.0]
        return np.ones(1, np.float32), -float(np.square(error).sum()), True, False, {}


def test_means_of_continuous_actions_are_learned():
    """With actions that carry a gradient, the means would not move."""
    model = OptionCritic(
        "MlpPolicy",
        Target(),
        n_options=2,
        learning_rate=5e-3,
        train_freq=16,
        policy_kwargs={"net_arch": [8], "log_std_init": -1.0},
        seed=0,
        device="cpu",
    ).learn(8000)
    action, _ = model.predict(np.ones(1, np.float32), deterministic=True)
    np.testing.assert_allclose(action, [0.6, 3.0], atol=0.3)


def test_time_limits_are_bootstrapped():
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 5), seed=0)
    model = OptionCritic("MlpPolicy", env, learning_starts=1000, train_freq=60, seed=0, device="cpu").learn(60)
    rollout = model._latest_rollout()
    dones = rollout.dones
    assert model.replay_buffer.dones[:60].sum() > 5 and dones.sum() == 0
    # The observation after the last step is that of the episode that ended, not of the next one
    last = [index for index in range(59) if model.replay_buffer.dones[index, 0]]
    for index in last:
        assert not np.array_equal(rollout.next_observations[index], rollout.observations[index + 1])
        np.testing.assert_array_equal(rollout.next_observations[index], model.replay_buffer.next_observations[index, 0])


def test_learns_cartpole():
    model = cartpole(
        n_options=2,
        learning_rate=2e-3,
        train_freq=4,
        gradient_steps=2,
        target_update_interval=200,
        policy_kwargs={"net_arch": [64, 64]},
    ).learn(15_000)
    assert evaluate_policy(model, make_vec_env("CartPole-v1", seed=100), 10)[0] > 120


def test_statistics_by_hand():
    statistics = OptionStatistics(n_options=2, n_envs=2, n_episodes=10)
    yes, no = np.array([True, True]), np.array([False, False])
    statistics.add(np.array([0, 1]), yes, np.array([0.5, 0.5]), yes)
    statistics.add(np.array([0, 1]), no, np.array([0.2, 0.4]), no)
    # The first option ends after two steps and becomes the other one
    statistics.add(np.array([1, 1]), np.array([True, False]), np.array([0.6, 0.4]), no)
    # Both episodes end
    statistics.add(np.array([0, 0]), yes, np.array([0.9, 0.9]), yes)
    summary = statistics.summary()
    assert summary["duration"] == pytest.approx((2 + 1 + 3) / 3)
    assert summary["switches_per_episode"] == pytest.approx((1 + 0) / 2)
    assert summary["termination_probability"] == pytest.approx((0.2 + 0.4 + 0.6 + 0.4) / 4)
    assert summary["usage_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize(("always_chosen", "message"), [(False, "one option"), (True, "nearly every step")])
def test_collapsed_options_are_reported(always_chosen, message):
    statistics = OptionStatistics(n_options=2, n_envs=1, n_episodes=10)
    no = np.array([False])
    for step in range(WINDOW):
        assert statistics.collapse() is None
        option = np.array([step % 2 if always_chosen else 0])
        statistics.add(option, np.array([always_chosen]), np.array([0.5]), no)
    assert message in statistics.collapse()
    model = cartpole(n_options=2, learning_starts=0)
    model._setup_learn(10)
    model._statistics = statistics
    with pytest.warns(UserWarning, match="have collapsed"):
        model.num_timesteps = 5000
        model.dump_logs()
    # At random actions nothing has been learned that could collapse
    model.learning_starts = 5000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.dump_logs()


def test_healthy_options_are_not_reported():
    statistics = OptionStatistics(n_options=2, n_envs=1, n_episodes=10)
    for step in range(WINDOW):
        statistics.add(np.array([step // 4 % 2]), np.array([step % 4 == 0]), np.array([0.25]), np.array([False]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert statistics.collapse() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_options", 0),
        ("gamma", 1.5),
        ("gae_lambda", -0.5),
        ("termination_regularization", -1.0),
        ("ent_coef", -0.1),
        ("ent_coef", "auto"),
        ("exploration_final_eps", 2.0),
        ("tau", -0.1),
        ("actor_learning_rate", -1e-3),
        ("termination_learning_rate", "1e-3"),
    ],
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* but got {value!r}"):
        cartpole(**{name: value})


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be"):
        cartpole(policy_kwargs={"temperature": 0.0})


def test_unbounded_actions_are_refused():
    class Unbounded(Lasts):
        action_space = spaces.Box(-np.inf, np.inf, (1,))

    with pytest.raises(ValueError, match="finite bounds"):
        OptionCritic("MlpPolicy", Unbounded(3))


@pytest.mark.parametrize(
    ("replay_buffer_class", "message"),
    [(NStepReplayBuffer, "with n_steps=1, .* but got n_steps=3"), (HerReplayBuffer, "does not support HerReplayBuffer")],
)
def test_replay_buffers_that_do_not_fit_are_refused(replay_buffer_class, message):
    with pytest.raises(ValueError, match=message):
        cartpole(replay_buffer_class=replay_buffer_class)


def test_dict_observations_with_classes():
    class Classes(gym.Env):
        observation_space = spaces.Dict({"class": spaces.Discrete(3), "vector": spaces.Box(-1, 1, (2,))})
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return {"class": 1, "vector": np.zeros(2, np.float32)}, {}

        def step(self, action):
            return {"class": 2, "vector": np.ones(2, np.float32)}, 1.0, bool(self.np_random.random() < 0.3), False, {}

    model = OptionCritic("MultiInputPolicy", make_vec_env(Classes, 2), learning_starts=8, train_freq=4, seed=0, device="cpu")
    assert model.learn(16)._n_updates == 1


def test_the_option_in_force_goes_on_after_loading(tmp_path):
    model = OptionCritic("MlpPolicy", make_vec_env("CartPole-v1", 3), learning_starts=100, seed=0, device="cpu").learn(30)
    model._options = np.array([1, 0, 3])
    model.save(tmp_path / "model")
    loaded = OptionCritic.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 3), force_reset=False, device="cpu")
    np.testing.assert_array_equal(loaded._options, [1, 0, 3])
    assert len(OptionCritic.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2), device="cpu")._options) == 2


def test_statistics_begin_anew_with_the_steps():
    model = cartpole(learning_starts=1000).learn(40)
    assert len(model.learn(8, reset_num_timesteps=False)._statistics._used) == 48
    assert len(model.learn(8)._statistics._used) == 8


def test_values_are_trained_from_a_loaded_replay_buffer(tmp_path):
    model = cartpole(learning_starts=20).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OptionCritic.load(tmp_path / "model", device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(configure(None, []))
    before = copy.deepcopy(loaded.policy.state_dict())
    loaded.train(3, batch_size=16)
    changed = {name.split(".")[0] for name, value in loaded.policy.state_dict().items() if not th.equal(value, before[name])}
    assert changed == {"critic"}


def test_number_of_options_has_one_place():
    with pytest.raises(ValueError, match="Give n_options to OptionCritic"):
        OptionCritic("MlpPolicy", "CartPole-v1", n_options=4, policy_kwargs={"n_options": 8})


def test_divergence_is_a_value_error():
    model = cartpole()
    model.policy.critic.values[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        model.learn(200)
