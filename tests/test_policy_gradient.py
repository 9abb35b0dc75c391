"""VPG, REINFORCE, NPG and TRPO: losses, targets, updates, and that they learn."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_ext import NPG, REINFORCE, TRPO, VPG
from sb3_ext.algos.npg.npg import Outcome
from sb3_ext.algos.reinforce.reinforce import returns_to_go
from sb3_ext.common import policy_gradient
from sb3_ext.common.actor_critic import split_parameters
from sb3_ext.common.fisher import kl_divergence, linearize

ALGORITHMS = [VPG, REINFORCE, NPG, TRPO]
each_algorithm = pytest.mark.parametrize("algo", ALGORITHMS, ids=lambda algo: algo.__name__)
each_critic_algorithm = pytest.mark.parametrize("algo", [VPG, NPG, TRPO], ids=lambda algo: algo.__name__)
each_natural_algorithm = pytest.mark.parametrize("algo", [NPG, TRPO], ids=lambda algo: algo.__name__)


class ScriptedEnv(gym.Env):
    """Rewards 1, 2, 3, ...; the first episode terminates after two steps, the second is truncated after three, and so on."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.n_episodes, self.n_steps, self.reward = -1, 0, 0.0

    def reset(self, *, seed=None, options=None):
        self.n_episodes, self.n_steps = self.n_episodes + 1, 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.n_episodes % 2, self.n_steps / 3, 0.5], np.float32)

    def step(self, action):
        self.n_steps, self.reward = self.n_steps + 1, self.reward + 1.0
        terminated = self.n_episodes % 2 == 0 and self.n_steps == 2
        truncated = self.n_episodes % 2 == 1 and self.n_steps == 3
        return self.observe(), self.reward, terminated, truncated, {}


@each_algorithm
def test_hooks_of_the_networks_are_called(algo):
    model = algo("MlpPolicy", make_vec_env("CartPole-v1", 2), n_steps=64, seed=0, device="cpu")
    policy, calls = model.policy, []

    def never_left(module, inputs, logits):
        return logits - th.tensor([1e8, 0.0])

    policy.action_net.register_forward_hook(never_left)
    policy.value_net.register_forward_hook(lambda *arguments: calls.append("value"))
    mask = th.zeros_like(policy.mlp_extractor.value_net[0].weight)
    policy.mlp_extractor.value_net[0].weight.register_hook(lambda gradient: gradient * mask)
    policy.mlp_extractor.policy_net[0].weight.register_hook(lambda gradient: gradient * mask)
    before = copy.deepcopy(policy.state_dict())
    model.learn(128)
    assert (model.rollout_buffer.actions == 1).all()
    assert model.rollout_buffer.log_probs.max() <= 0 and model.rollout_buffer.log_probs.min() > -1e-3
    assert algo is REINFORCE or calls
    for name in ("value_net", "policy_net"):
        assert th.equal(policy.state_dict()[f"mlp_extractor.{name}.0.weight"], before[f"mlp_extractor.{name}.0.weight"])


class FrozenAtFirst(ActorCriticPolicy):
    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.mlp_extractor.policy_net.requires_grad_(False)


@each_algorithm
def test_what_is_frozen_at_first_can_be_trained_later(algo):
    model = algo(FrozenAtFirst, "CartPole-v1", n_steps=64, seed=0, device="cpu")
    layer, output = model.policy.mlp_extractor.policy_net[0], model.policy.action_net
    before, output_before = layer.weight.clone(), output.weight.clone()
    assert not layer.weight.requires_grad
    model.learn(64)
    assert th.equal(layer.weight, before) and not th.equal(output.weight, output_before)
    layer.requires_grad_(True)
    model.learn(64)
    assert not th.equal(layer.weight, before)


@each_algorithm
def test_numbers_given_at_loading_are_checked(algo, tmp_path):
    algo("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], but got 2.0"):
        algo.load(tmp_path / "model", gamma=2.0)
    with pytest.raises(ValueError, match="n_steps must be at least 1, but got 0"):
        algo.load(tmp_path / "model", n_steps=0)


def collected(algo, env, **kwargs):
    """A model with one rollout that it has not been trained on."""
    model = algo("MlpPolicy", env, seed=0, device="cpu", **kwargs)
    model.set_logger(configure(format_strings=[]))
    _, callback = model._setup_learn(model.n_steps)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def parameters(model):
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def is_actor(name):
    """For SB3's own policies with separate networks."""
    return "value" not in name


# --- Targets ---------------------------------------------------------------------------------------------------------


def test_returns_to_go_by_hand():
    rewards = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], np.float32)
    # First environment: episodes of two steps. Second: one that ends with the second step, one that the end cuts.
    starts = np.array([[1, 0], [0, 0], [1, 1], [0, 0]], np.float32)
    returns, is_complete = returns_to_go(rewards, starts, np.array([True, False]), 0.5)
    np.testing.assert_allclose(returns, [[2.0, 20.0], [2.0, 20.0], [5.0, 50.0], [4.0, 40.0]])
    np.testing.assert_array_equal(is_complete, [[True, True], [True, True], [True, False], [True, False]])


def test_generalized_advantages_by_hand():
    gamma, gae_lambda = 0.9, 0.8
    # Steps: 1, 2 (terminated), 3, 4, 5 (truncated), 6 (cut by the rollout's end)
    model = collected(VPG, ScriptedEnv(), n_steps=6, gamma=gamma, gae_lambda=gae_lambda)

    def value(episode, step):
        obs = th.tensor([[episode % 2, step / 3, 0.5]], dtype=th.float32)
        with th.no_grad():
            return model.policy.predict_values(obs).item()

    v = [value(0, 0), value(0, 1), value(1, 0), value(1, 1), value(1, 2), value(2, 0)]
    deltas = [
        1 + gamma * v[1] - v[0],
        2 - v[1],
        3 + gamma * v[3] - v[2],
        4 + gamma * v[4] - v[3],
        5 + gamma * value(1, 3) - v[4],
        6 + gamma * value(2, 1) - v[5],
    ]
    decay = gamma * gae_lambda
    expected = [
        deltas[0] + decay * deltas[1],
        deltas[1],
        deltas[2] + decay * deltas[3] + decay**2 * deltas[4],
        deltas[3] + decay * deltas[4],
        deltas[4],
        deltas[5],
    ]
    np.testing.assert_allclose(model.rollout_buffer.advantages.flatten(), expected, rtol=1e-5)
    np.testing.assert_allclose(model.rollout_buffer.returns.flatten(), np.add(expected, v), rtol=1e-5)


def test_no_value_leaks_into_the_returns_of_reinforce():
    model = collected(REINFORCE, ScriptedEnv(), n_steps=6, gamma=0.5, normalize_advantage=False)
    np.testing.assert_array_equal(model.rollout_buffer.rewards.flatten(), [1, 2, 3, 4, 5, 6])
    seen = []
    model._update_actor = lambda observations, actions, advantages: seen.append((observations, advantages))
    model.train()
    observations, advantages = seen[0]
    # The sixth step is left out: its episode does not end in the rollout
    np.testing.assert_allclose(advantages, [2.0, 2.0, 3 + 2 + 1.25, 4 + 2.5, 5.0])
    np.testing.assert_allclose(observations[:, 1], np.array([0, 1, 0, 1, 2]) / 3, rtol=1e-6)
    assert model.logger.name_to_value["train/complete_fraction"] == pytest.approx(5 / 6)


# --- Losses and updates ----------------------------------------------------------------------------------------------


class TwoStates(gym.Env):
    """Two states that alternate at random; the reward is a table of state and action."""

    observation_space = spaces.Discrete(2)
    action_space = spaces.Discrete(2)
    rewards = np.array([[1.0, -2.0], [0.5, 3.0]])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return self.state, {}

    def step(self, action):
        reward = self.rewards[self.state, action]
        self.state = int(self.np_random.integers(2))
        return self.state, reward, True, False, {}


def test_policy_gradient_of_a_two_state_problem():
    """In expectation over states and actions, the gradient is that of the mean reward, which is known."""
    model = VPG("MlpPolicy", TwoStates(), device="cpu", seed=0, policy_kwargs={"net_arch": []})
    weight = model.policy.action_net.weight
    weight.data = th.tensor([[0.3, -0.2], [-0.1, 0.4]])
    logits = weight.detach().double().T.requires_grad_() + 0.0  # (state, action)
    states, actions = th.tensor([0, 0, 1, 1]), th.tensor([0, 1, 0, 1])
    rewards = th.tensor(TwoStates.rewards)
    analytic_logits = weight.detach().double().T.clone().requires_grad_()
    mean_reward = (th.softmax(analytic_logits, 1) * rewards).sum() / 2
    (expected,) = th.autograd.grad(mean_reward, analytic_logits)

    distribution = model.policy.get_distribution(states)
    log_prob = distribution.log_prob(actions)
    # Each pair once, weighted by how often it occurs: a mean over four of weights that are four times the probability
    frequency = th.softmax(logits, 1).flatten().float().detach() / 2
    loss = model.policy_loss(log_prob, 4 * frequency * rewards.flatten().float())
    (gradient,) = th.autograd.grad(loss, weight)
    th.testing.assert_close(-gradient.T.double(), expected, rtol=1e-5, atol=1e-6)


def test_losses_by_hand():
    model = VPG("MlpPolicy", "CartPole-v1", device="cpu")
    log_prob, advantages = th.tensor([-1.0, -2.0], requires_grad=True), th.tensor([3.0, -1.0], requires_grad=True)
    loss = model.policy_loss(log_prob, advantages)
    assert loss.item() == pytest.approx(-(-3.0 + 2.0) / 2)
    # Advantages are constants
    assert th.autograd.grad(loss, [log_prob, advantages], allow_unused=True)[1] is None

    model = NPG("MlpPolicy", "CartPole-v1", device="cpu")
    obs, actions = th.zeros(2, 4), th.tensor([0, 1])
    distribution = model.policy.get_distribution(obs)
    with th.no_grad():
        probability = distribution.distribution.probs[0]
    old_log_prob = th.log(th.tensor([0.25, 0.8]))
    objective = model.policy_objective(distribution, actions, old_log_prob, th.tensor([2.0, -1.0]))
    expected = (2.0 * probability[0] / 0.25 - probability[1] / 0.8) / 2
    assert objective.item() == pytest.approx(expected.item(), rel=1e-5)

    values = model.policy.predict_values(obs).detach().flatten()
    assert model.critic_loss(obs, values + th.tensor([1.0, 3.0])).item() == pytest.approx(5.0)


def test_advantages_are_standardized_and_equal_ones_vanish():
    model = VPG("MlpPolicy", "CartPole-v1", device="cpu")
    standardized = model._normalized(th.tensor([1.0, 2.0, 6.0]))
    assert standardized.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert standardized.std().item() == pytest.approx(1.0)
    assert (model._normalized(th.full((5,), 3.0)) == 0).all()
    plain = VPG("MlpPolicy", "CartPole-v1", device="cpu", normalize_advantage=False)
    assert plain._normalized(th.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_an_update_of_vpg_equals_a_slow_one_in_float64():
    kwargs = {"n_steps": 32, "n_critic_updates": 3, "learning_rate": 1e-2, "critic_learning_rate": 3e-2, "ent_coef": 0.1}
    model = collected(VPG, "Pendulum-v1", **kwargs)
    policy = copy.deepcopy(model.policy).double()
    rollout = model._rollout()
    obs, actions = rollout.observations.double(), rollout.actions.double()
    advantages = rollout.advantages.double()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    actor = [param for name, param in policy.named_parameters() if is_actor(name)]
    critic = [param for name, param in policy.named_parameters() if not is_actor(name)]

    actor_optimizer = th.optim.Adam(actor, lr=1e-2, eps=1e-5)
    critic_optimizer = th.optim.Adam(critic, lr=3e-2, eps=1e-5)
    normal = th.distributions.Normal(policy.action_net(policy.mlp_extractor.forward_actor(obs)), policy.log_std.exp())
    actor_optimizer.zero_grad()
    (-(normal.log_prob(actions).sum(1) * advantages).mean() - 0.1 * normal.entropy().sum(1).mean()).backward()
    actor_optimizer.step()
    for _ in range(3):
        critic_optimizer.zero_grad()
        values = policy.value_net(policy.mlp_extractor.forward_critic(obs)).flatten()
        (values - rollout.returns.double()).square().mean().backward()
        critic_optimizer.step()

    model.train()
    for name, expected in policy.state_dict().items():
        th.testing.assert_close(model.policy.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("batch_size", [None, 16])
@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU])
def test_critic_by_hand_equals_critic_by_autograd(monkeypatch, batch_size, activation_fn):
    kwargs = {
        "n_steps": 40,
        "n_critic_updates": 3,
        "batch_size": batch_size,
        "policy_kwargs": {"activation_fn": activation_fn},
    }
    by_hand, by_autograd = (collected(NPG, "CartPole-v1", **kwargs) for _ in range(2))
    th.manual_seed(1)
    by_hand.train()
    monkeypatch.setattr(policy_gradient, "critic_network", lambda policy: None)
    th.manual_seed(1)
    by_autograd.train()
    expected = parameters(by_autograd)
    for name, value in parameters(by_hand).items():
        th.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert by_hand.logger.name_to_value["train/value_loss"] == pytest.approx(
        by_autograd.logger.name_to_value["train/value_loss"], rel=1e-4
    )


@each_critic_algorithm
def test_critic_loss_of_a_subclass_is_used(algo):
    class Indifferent(algo):
        def critic_loss(self, observations, returns):
            return 0.0 * super().critic_loss(observations, returns)

    model = collected(Indifferent, "CartPole-v1", n_steps=64)
    before = parameters(model)
    model.train()
    assert th.equal(model.policy.value_net.weight, before["value_net.weight"])
    assert not th.equal(model.policy.action_net.weight, before["action_net.weight"])


def test_minibatches_are_a_partition_of_the_rollout():
    model = NPG("MlpPolicy", "CartPole-v1", device="cpu", batch_size=4)
    returns = th.arange(10.0)
    for observations in (returns.unsqueeze(1), {"a": returns.unsqueeze(1)}):
        batches = list(model._minibatches(observations, returns))
        assert [len(batch_returns) for _, batch_returns in batches] == [4, 4, 2]
        for obs, batch_returns in batches:
            th.testing.assert_close((obs["a"] if isinstance(obs, dict) else obs).flatten(), batch_returns)
        assert sorted(th.cat([batch_returns for _, batch_returns in batches]).tolist()) == returns.tolist()


# --- Trust region ----------------------------------------------------------------------------------------------------


@each_natural_algorithm
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_policy_moves_as_far_as_allowed(algo, env):
    # A short step, for which the second-order model holds
    model = collected(algo, env, n_steps=256, target_kl=1e-4, cg_damping=1e-4)
    rollout = model._rollout()
    old = copy.deepcopy(model.policy)
    model.train()
    with th.no_grad():
        kl = kl_divergence(old.get_distribution(rollout.observations), model.policy.get_distribution(rollout.observations))
    logged = model.logger.name_to_value["train/kl_divergence_loss"]
    assert kl.mean().item() == pytest.approx(logged, rel=1e-2)
    if algo is TRPO:
        assert 0.5e-4 < logged <= 1e-4
    else:
        assert logged == pytest.approx(1e-4, rel=0.3)
    assert model.logger.name_to_value["train/policy_objective"] > 0
    assert model.logger.name_to_value["train/is_step_taken"] == 1.0


@each_natural_algorithm
def test_the_trust_region_can_shrink(algo):
    model = collected(algo, "CartPole-v1", n_steps=256, cg_damping=1e-4, target_kl=LinearSchedule(4e-4, 0.0, 1.0))
    model._current_progress_remaining = 0.25
    model.train()
    assert 0.5e-4 < model.logger.name_to_value["train/kl_divergence_loss"] < 1.3e-4
    # At the end there is nowhere left to go
    before = model.actor_parameters.tensor.detach().clone()
    model._current_progress_remaining = 0.0
    model.train()
    assert th.equal(model.actor_parameters.tensor, before)


@each_natural_algorithm
def test_subsampling_changes_the_metric_only(algo):
    model = collected(algo, "CartPole-v1", n_steps=256, sub_sampling_factor=4)
    model.train()
    assert 0.0 < model.logger.name_to_value["train/kl_divergence_loss"] < 0.03


def test_subsamples_are_of_all_environments(monkeypatch):
    model = collected(NPG, make_vec_env("CartPole-v1", n_envs=4), n_steps=64, sub_sampling_factor=4)
    linearized = []

    def linearize_and_keep(policy, parameters, observations):
        linearized.append(observations)
        return linearize(policy, parameters, observations)

    monkeypatch.setattr("sb3_ext.algos.npg.npg.linearize", linearize_and_keep)
    model.train()
    everything, some = linearized
    rows = [int((everything == row).all(dim=1).nonzero()[0]) for row in some]
    assert len(rows) == 64 and {row % 4 for row in rows} == {0, 1, 2, 3}


@each_natural_algorithm
def test_a_new_policy_that_is_not_finite_is_rejected(algo):
    model = collected(algo, "CartPole-v1", n_steps=64, target_kl=1e30, policy_kwargs={"activation_fn": nn.ReLU})
    before = parameters(model)
    model.policy.set_training_mode(False)
    model._update_actor(model._rollout())
    assert model.logger.name_to_value["train/is_step_taken"] == 0.0
    assert all(th.equal(value, before[name]) for name, value in parameters(model).items())


@each_algorithm
@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ELU])
def test_what_is_frozen_after_construction_stays(algo, activation_fn):
    model = algo("MlpPolicy", "Pendulum-v1", n_steps=256, policy_kwargs={"activation_fn": activation_fn}, seed=0, device="cpu")
    frozen = ("log_std", "mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.2.bias")
    for name in frozen:
        model.policy.get_parameter(name).requires_grad_(False)
    before = parameters(model)
    model.learn(512)
    changed = {name for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert "action_net.weight" in changed and not changed & set(frozen)


@each_algorithm
def test_a_callback_may_read_the_rollout(algo):
    class Reads(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            assert len(list(self.model.rollout_buffer.get(32))) == 4

    models = []
    for callback in (None, Reads()):
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
        models.append(algo("MlpPolicy", env, n_steps=64, seed=0, device="cpu").learn(128, callback))
    # Reading draws random numbers, with which the critic's batches differ
    expected, actual = (parameters(model) for model in models)
    th.testing.assert_close(actual["action_net.weight"], expected["action_net.weight"])


def test_line_search_takes_the_first_step_that_fits():
    model = TRPO("MlpPolicy", "CartPole-v1", device="cpu", target_kl=0.3, line_search_shrinking_factor=0.5)
    tried = []

    def move(step):
        tried.append(step.item())
        return Outcome(kl=step.item() ** 2, objective=step.item() if step.item() < 0.4 else -1.0)

    outcome = model._take_step(th.tensor([1.0]), move, Outcome(0.0, 0.0))
    # 1.0 is too far, 0.5 near enough but no better
    assert tried == [1.0, 0.5, 0.25]
    assert outcome == Outcome(0.0625, 0.25)
    assert model._take_step(th.tensor([1.0]), lambda step: Outcome(float("nan"), 1.0), Outcome(0.0, 0.0)) is None
    assert model._take_step(th.tensor([1.0]), lambda step: Outcome(0.1, 0.0), Outcome(0.0, 0.0)) is None


@each_natural_algorithm
def test_a_rejected_step_restores_the_actor_exactly(algo):
    class Rejecting(algo):
        def _take_step(self, step, move, stay):
            move(step)
            moved.update(parameters(self))

    moved = {}
    model = collected(Rejecting, "CartPole-v1", n_steps=64)
    before = parameters(model)
    model.train()
    assert not th.equal(moved["action_net.weight"], before["action_net.weight"])
    assert all(th.equal(value, before[name]) for name, value in parameters(model).items() if is_actor(name))
    assert not th.equal(model.policy.value_net.weight, before["value_net.weight"])
    assert model.logger.name_to_value["train/is_step_taken"] == 0.0
    assert model.logger.name_to_value["train/kl_divergence_loss"] == 0.0


@each_algorithm
def test_equal_advantages_move_nothing(algo):
    model = collected(algo, ScriptedEnv(), n_steps=64)
    model.rollout_buffer.advantages[:] = 2.0
    model.rollout_buffer.rewards[:] = 0.0
    before = parameters(model)
    model.train()
    assert all(th.equal(value, before[name]) for name, value in parameters(model).items() if is_actor(name))
    assert all(th.isfinite(value).all() for value in parameters(model).values())


@each_natural_algorithm
def test_not_a_number_moves_nothing(algo):
    model = collected(algo, "CartPole-v1", n_steps=64)
    model.rollout_buffer.advantages[3] = np.nan
    before = parameters(model)
    model.train()
    assert all(th.equal(value, before[name]) for name, value in parameters(model).items() if is_actor(name))
    assert model.logger.name_to_value["train/is_step_taken"] == 0.0


@each_critic_algorithm
def test_divergence_is_an_error_that_says_what_to_do(algo):
    model = collected(algo, "CartPole-v1", n_steps=64)
    model.rollout_buffer.returns[:] = np.inf
    with pytest.raises(ValueError, match=r"Training diverged.*[Ll]earning rate|Training diverged.*smaller"):
        model.train()


# --- Actor and critic ------------------------------------------------------------------------------------------------


class MisleadingNames(ActorCriticPolicy):
    """An actor that is called value, and a critic that is not."""

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.value_of_actions, self.judge = nn.Linear(self.features_dim, 8), nn.Linear(self.features_dim, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

    def get_distribution(self, obs):
        latent = th.tanh(self.value_of_actions(self.extract_features(obs, self.pi_features_extractor)))
        return self._get_action_dist_from_latent(latent.repeat(1, 8))

    def predict_values(self, obs):
        return self.judge(self.extract_features(obs, self.vf_features_extractor))

    def evaluate_actions(self, obs, actions):
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def forward(self, obs, deterministic=False):
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


def test_parameters_are_told_apart_by_what_they_do():
    model = VPG(MisleadingNames, "CartPole-v1", device="cpu")
    actor, critic = split_parameters(model.policy)
    names = {id(param): name for name, param in model.policy.named_parameters()}
    assert {names[id(param)].split(".")[0] for param in actor} == {"value_of_actions", "action_net"}
    assert {names[id(param)].split(".")[0] for param in critic} == {"judge"}


@each_algorithm
def test_custom_policies_learn(algo):
    model = algo(MisleadingNames, "CartPole-v1", n_steps=64, seed=0, device="cpu")
    before = parameters(model)
    model.learn(128)
    after = parameters(model)
    assert not th.equal(after["value_of_actions.weight"], before["value_of_actions.weight"])
    assert th.equal(after["judge.weight"], before["judge.weight"]) == (algo is REINFORCE)


@each_critic_algorithm
@pytest.mark.parametrize("share", [True, False])
def test_critic_leaves_what_it_shares_with_the_actor(algo, share):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1)
    kwargs = {"share_features_extractor": share}
    model = algo("CnnPolicy", env, n_steps=8, batch_size=4, policy_kwargs=kwargs, seed=0, device="cpu")
    model.learn(8)
    before = parameters(model)
    rollout = model._rollout()
    model._update_critic(rollout.observations, rollout.returns + 1.0)
    changed = {name for name, value in parameters(model).items() if not th.equal(value, before[name])}
    assert "value_net.weight" in changed
    assert any(name.startswith("vf_features_extractor") for name in changed) != share
    assert not any(name.startswith(("features_extractor", "pi_features_extractor", "action_net")) for name in changed)


@each_algorithm
def test_reinforce_alone_has_no_critic(algo):
    model = algo("MlpPolicy", "CartPole-v1", n_steps=128, seed=0, device="cpu")
    before = parameters(model)
    model.learn(256)
    assert th.equal(model.policy.value_net.weight, before["value_net.weight"]) == (algo is REINFORCE)


@each_algorithm
def test_training_goes_on_when_the_policy_gets_new_memory(algo):
    model = algo("MlpPolicy", "CartPole-v1", n_steps=64, seed=0, device="cpu").learn(64)
    model.policy._apply(th.clone)
    before = parameters(model)
    model.learn(128)
    assert not th.equal(model.policy.action_net.weight, before["action_net.weight"])


# --- REINFORCE -------------------------------------------------------------------------------------------------------


def test_running_baseline_follows_the_returns_and_is_saved(tmp_path):
    model = collected(REINFORCE, ScriptedEnv(), n_steps=5, gamma=0.5, running_baseline=True, normalize_advantage=False)
    first = np.mean([2.0, 2.0, 6.25, 6.5, 5.0])
    model.train()
    assert model.baseline == pytest.approx(first)
    model.rollout_buffer.rewards[:] = 1.0
    model.train()
    assert model.baseline == pytest.approx(0.9 * first + 0.1 * np.mean([1.5, 1.0, 1.75, 1.5, 1.0]))
    model.save(tmp_path / "model")
    assert REINFORCE.load(tmp_path / "model").baseline == model.baseline
    with pytest.raises(ValueError, match="normalize_advantage"):
        REINFORCE("MlpPolicy", ScriptedEnv(), running_baseline=True)


def test_without_a_whole_episode_there_is_no_update():
    model = collected(REINFORCE, "Pendulum-v1", n_steps=50)
    before = parameters(model)
    with pytest.warns(UserWarning, match="no episode ended within n_steps=50"):
        model.train()
    assert all(th.equal(value, before[name]) for name, value in parameters(model).items())


# --- Spaces and arguments --------------------------------------------------------------------------------------------


@each_algorithm
@pytest.mark.parametrize("make_env", [IdentityEnvMultiDiscrete, IdentityEnvMultiBinary])
def test_actions_of_several_parts(algo, make_env):
    model = algo("MlpPolicy", make_env(dim=3, ep_length=10), n_steps=32, seed=0, device="cpu")
    before = parameters(model)
    model.learn(64)
    assert not th.equal(model.policy.action_net.weight, before["action_net.weight"])
    assert model.action_space.contains(model.predict(model.observation_space.sample())[0])


@each_algorithm
def test_state_dependent_exploration(algo):
    model = algo("MlpPolicy", IdentityEnvBox(ep_length=10), n_steps=32, use_sde=True, sde_sample_freq=4, seed=0, device="cpu")
    before = parameters(model)
    model.learn(64)
    assert not th.equal(model.policy.log_std, before["log_std"])
    with pytest.raises(ValueError, match="continuous actions"):
        algo("MlpPolicy", "CartPole-v1", use_sde=True)


@each_algorithm
def test_observations_without_practical_bounds(algo):
    limit = np.finfo(np.float32).max

    class Unbounded(ScriptedEnv):
        observation_space = spaces.Dict(
            {"wide": spaces.Box(-limit, limit, (64,)), "far": spaces.Box(-1e300, 1e300, (2,), np.float64)}
        )

        def observe(self):
            return {"wide": np.ones(64, np.float32), "far": np.ones(2)}

    model = algo("MultiInputPolicy", Unbounded(), n_steps=32, seed=0, device="cpu").learn(32)
    assert model._n_updates == 1


@each_algorithm
def test_discrete_actions_must_start_at_zero(algo):
    class StartsAtThree(ScriptedEnv):
        action_space = spaces.Discrete(2, start=3)

    with pytest.raises(ValueError, match=r"start at 0, but got Discrete\(2, start=3\)"):
        algo("MlpPolicy", StartsAtThree())


@pytest.mark.parametrize(
    ("algo", "kwargs"),
    [
        (VPG, {"n_steps": 0}),
        (VPG, {"gamma": 1.1}),
        (VPG, {"gae_lambda": -0.1}),
        (VPG, {"batch_size": 0}),
        (VPG, {"n_critic_updates": -1}),
        (VPG, {"ent_coef": -1.0}),
        (VPG, {"ent_coef": LinearSchedule(0.1, 0.0, 1.0)}),
        (VPG, {"critic_learning_rate": -1.0}),
        (VPG, {"max_grad_norm": -1.0}),
        (VPG, {"n_steps": 1}),
        (NPG, {"cg_max_steps": 0}),
        (NPG, {"cg_damping": -0.1}),
        (NPG, {"cg_damping": "1e-3"}),
        (NPG, {"target_kl": 0.0}),
        (NPG, {"target_kl": float("nan")}),
        (NPG, {"sub_sampling_factor": 0}),
        (TRPO, {"line_search_shrinking_factor": 1.0}),
        (TRPO, {"line_search_shrinking_factor": "0.8"}),
        (TRPO, {"line_search_max_iter": 0}),
    ],
    ids=str,
)
def test_numbers_out_of_range(algo, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        algo("MlpPolicy", "CartPole-v1", **kwargs)


# --- Learning --------------------------------------------------------------------------------------------------------

# Mean return of 20 episodes after 20,000 steps. Reached: 500, 150, 496, 500. With the sign of the step reversed: 9, 9, 9, and
# 133 for TRPO, whose line search then rejects all steps.
LEARNING = [
    (VPG, {"n_steps": 64, "learning_rate": 5e-3, "critic_learning_rate": 5e-3, "n_critic_updates": 10}, 200),
    (REINFORCE, {"n_steps": 128, "learning_rate": 1e-2}, 120),
    (NPG, {"n_steps": 128, "cg_damping": 1e-3}, 200),
    (TRPO, {"n_steps": 128, "cg_damping": 1e-3}, 200),
]


@pytest.mark.parametrize(("algo", "kwargs", "threshold"), LEARNING, ids=lambda value: getattr(value, "__name__", ""))
def test_learns_cartpole(algo, kwargs, threshold):
    model = algo("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8, seed=3), seed=3, device="cpu", **kwargs)
    model.learn(20_000)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", seed=1003), n_eval_episodes=20)
    assert mean > threshold
