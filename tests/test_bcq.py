"""BCQ's losses, targets and constraint against hand-computed numbers and float64 computations of their own."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from algo_cases import random_replay_buffer
from conftest import PROJECT
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.nn import functional as F

from sb3_ext import BCQ
from sb3_ext.offline import DatasetError

LOW, HIGH = np.array([-3.0, 0.5], np.float32), np.array([1.0, 0.75], np.float32)


class MatchEnv(gym.Env):
    """
    One-step-lookahead task with a right action in each state: the state is one-hot, drawn anew at each step, and the
    reward is 1 for the action of the state's number, 0 for the next number, and -1 for all others.
    """

    n_states, n_actions = 4, 8

    def __init__(self):
        self.observation_space = spaces.Box(0, 1, (self.n_states,))
        self.action_space = spaces.Discrete(self.n_actions, start=5)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return self._next_state(), {}

    def step(self, action):
        difference = action - 5 - self.state
        reward = {0: 1.0, 1: 0.0}.get(int(difference), -1.0)
        self.step_count += 1
        return self._next_state(), reward, False, self.step_count == 20, {}

    def _next_state(self):
        self.state = self.np_random.integers(self.n_states)
        return np.eye(self.n_states, dtype=np.float32)[self.state]


class OffsetEnv(gym.Env):
    """
    The reward is 1 for the action ``state / 2`` and falls by 5 for each unit of distance from it, to -1 at the least. Data
    with distances 0 and 0.2 suggest that the reward goes on rising below.
    """

    def __init__(self):
        self.observation_space = spaces.Box(-1, 1, (1,))
        self.action_space = spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return self._next_state(), {}

    def step(self, action):
        reward = max(-1.0, 1.0 - 5.0 * abs(action.item() - self.state.item() / 2))
        self.step_count += 1
        return self._next_state(), reward, False, self.step_count == 20, {}

    def _next_state(self):
        self.state = self.np_random.uniform(-1, 1, (1,)).astype(np.float32)
        return self.state


class BoxEnv(gym.Env):
    """Two action dimensions with bounds of their own, neither symmetric nor equal."""

    def __init__(self):
        self.observation_space = spaces.Box(-1, 1, (3,))
        self.action_space = spaces.Box(LOW, HIGH)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float(action.sum()), False, False, {}


def continuous_bcq(**kwargs):
    env = make_vec_env(BoxEnv)
    kwargs = {"policy_kwargs": {"net_arch": [5, 4], "vae_net_arch": [6]}, "seed": 3, "device": "cpu", **kwargs}
    return BCQ("MlpPolicy", env, random_replay_buffer(env), **kwargs)


def discrete_bcq(**kwargs):
    env = make_vec_env(MatchEnv)
    return BCQ("MlpPolicy", env, random_replay_buffer(env), **{"seed": 3, "device": "cpu", **kwargs})


def batch_of(model, n=6, dones=None):
    batch = model.transitions.sample(n, model.batch_generator)
    return batch if dones is None else batch._replace(dones=th.tensor(dones).reshape(-1, 1))


def forward64(network, inputs):
    """A plain ReLU network in float64."""
    layers = [layer for layer in network if isinstance(layer, th.nn.Linear)]
    for index, layer in enumerate(layers):
        inputs = layer.weight.detach().double().numpy() @ inputs + layer.bias.detach().double().numpy()
        if index < len(layers) - 1:
            inputs = np.maximum(inputs, 0.0)
    return inputs


def noise_ahead(model, n_rows):
    """The noise that the model will draw next."""
    generator = th.Generator()
    generator.set_state(model.generator.get_state())
    return th.randn(n_rows, model.policy.latent_dim, generator=generator).double().numpy()


# ---- Box actions ----


def test_actions_are_scaled_by_dimension():
    policy = continuous_bcq().policy
    actions = th.tensor(np.stack([LOW, HIGH, (LOW + HIGH) / 2]))
    th.testing.assert_close(policy.scale_actions(actions), th.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))


def test_vae_loss_in_float64():
    model = continuous_bcq(kl_weight=0.7)
    batch = batch_of(model)
    actions = model.policy.scale_actions(batch.actions)
    noise = noise_ahead(model, 6)
    squared_error, kl = [], []
    for obs, action, epsilon in zip(batch.observations.double().numpy(), actions.double().numpy(), noise, strict=True):
        encoded = forward64(model.policy.vae.encoder, np.concatenate([obs, action]))
        mean, log_std = encoded[:4], np.clip(encoded[4:], -4, 15)
        latent = mean + np.exp(log_std) * epsilon
        decoded = np.tanh(forward64(model.policy.vae.decoder, np.concatenate([obs, latent])))
        squared_error.append((decoded - action) ** 2)
        # KL(N(mean, std) || N(0, 1)) of each latent dimension
        kl.append(0.5 * (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std))
    expected = np.mean(squared_error) + 0.7 * np.mean(kl)
    assert model._vae_loss(batch.observations, actions).item() == pytest.approx(expected, rel=1e-5)


def test_continuous_target_against_a_plain_loop():
    model = continuous_bcq(n_target_candidates=3, gamma=0.9, min_q_weight=0.6, latent_clip=0.4, perturbation_scale=0.3)
    model.learn(20)  # so that online and target networks differ
    policy = model.policy
    batch = batch_of(model, 4, dones=[0.0, 1.0, 0.0, 0.0])
    noise = noise_ahead(model, 12).clip(-0.4, 0.4).reshape(4, 3, -1)
    expected = []
    for row in range(4):
        next_obs = batch.next_observations[row].double().numpy()
        values = []
        for latent in noise[row]:
            action = np.tanh(forward64(policy.vae.decoder, np.concatenate([next_obs, latent])))
            move = np.tanh(forward64(policy.perturbation_target.net, np.concatenate([next_obs, action])))
            action = np.clip(action + 0.3 * move, -1, 1)
            both = [forward64(q, np.concatenate([next_obs, action]))[0] for q in policy.critic_target.q_networks]
            values.append(0.6 * min(both) + 0.4 * max(both))
        expected.append(batch.rewards[row].item() + 0.9 * (1 - batch.dones[row].item()) * max(values))
    assert not th.equal(policy.perturbation.net[0].weight, policy.perturbation_target.net[0].weight)
    np.testing.assert_allclose(model._continuous_target(batch).numpy(), expected, rtol=1e-5)


def test_target_reads_the_target_networks_only():
    model = continuous_bcq()
    batch = batch_of(model)
    state = model.generator.get_state()
    before = model._continuous_target(batch)
    model.policy.flat_critic.tensor.data.add_(1.0)
    model.policy.flat_perturbation.tensor.data.add_(1.0)
    model.generator.set_state(state)
    assert th.equal(model._continuous_target(batch), before)
    model.policy.flat_perturbation_target.tensor.data.add_(1.0)
    model.generator.set_state(state)
    assert not th.equal(model._continuous_target(batch), before)


def test_critic_loss_in_float64():
    model = continuous_bcq()
    batch = batch_of(model)
    actions, target = model.policy.scale_actions(batch.actions), th.arange(6.0)
    expected = 0.0
    for q_network in model.policy.critic.q_networks:
        inputs = th.cat([batch.observations, actions], dim=1).double().numpy()
        expected += np.mean([(forward64(q_network, row)[0] - y) ** 2 for row, y in zip(inputs, range(6), strict=True)])
    assert model._critic_loss(batch.observations, actions, target).item() == pytest.approx(expected, rel=1e-5)


def test_perturbation_loss_in_float64_and_its_gradient():
    model = continuous_bcq(perturbation_scale=0.2)
    policy, obs = model.policy, batch_of(model).observations
    noise = noise_ahead(model, 6).clip(-0.5, 0.5)
    values = []
    for row, latent in zip(obs.double().numpy(), noise, strict=True):
        action = np.tanh(forward64(policy.vae.decoder, np.concatenate([row, latent])))
        action = np.clip(action + 0.2 * np.tanh(forward64(policy.perturbation.net, np.concatenate([row, action]))), -1, 1)
        values.append(forward64(policy.critic.q_networks[0], np.concatenate([row, action]))[0])
    loss = model._perturbation_loss(obs)
    assert loss.item() == pytest.approx(-np.mean(values), rel=1e-5)
    vae_gradients = th.autograd.grad(loss, policy.flat_vae.params, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in vae_gradients)
    policy.flat_perturbation.backward(loss)
    assert policy.flat_perturbation.tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_stay_within_the_perturbation_of_what_the_data_make_likely(deterministic):
    model = continuous_bcq(perturbation_scale=0.05, n_acting_candidates=7).learn(20)
    policy = model.policy
    obs = th.rand(11, 3)
    th.manual_seed(0)
    actions = policy.scale_actions(th.as_tensor(model.predict(obs.numpy(), deterministic=deterministic)[0]))
    th.manual_seed(0)
    latents = policy.acting_latents.repeat(11, 1) if deterministic else policy.clip_latents(th.randn(77, 4))
    assert latents.abs().max() <= 0.5
    candidates = policy.vae.decode(obs.repeat_interleave(7, dim=0), latents).view(11, 7, 2)
    distance = (candidates - actions[:, None]).abs().amax(dim=2).amin(dim=1)
    assert (distance <= 0.05 + 1e-6).all()
    assert distance.max() > 0


def test_acting_takes_the_candidate_with_the_highest_value():
    model = continuous_bcq(n_acting_candidates=9).learn(20)
    policy, obs = model.policy, th.rand(5, 3)
    candidates = policy.candidate_actions(obs, policy.acting_latents.repeat(5, 1), policy.perturbation, 9).view(5, 9, 2)
    expected = []
    for row, row_candidates in zip(obs, candidates, strict=True):
        inputs = [np.concatenate([row.numpy(), c]).astype(np.float64) for c in row_candidates.detach().numpy()]
        expected.append(row_candidates[np.argmax([forward64(policy.critic.q_networks[0], x)[0] for x in inputs])])
    actions, _ = model.predict(obs.numpy(), deterministic=True)
    th.testing.assert_close(policy.scale_actions(th.as_tensor(actions)), th.stack(expected).detach())


# ---- Discrete actions ----


def test_constrained_argmax_by_hand():
    policy = discrete_bcq(action_threshold=0.3).policy
    # Probabilities relative to the most likely action: 1, 0.5, 0.31, 0.29
    logits = th.tensor([1.0, 0.5, 0.31, 0.29]).log().repeat(4, 1)
    q_values = th.tensor(
        [
            [0.0, 1.0, 2.0, 3.0],  # the best is too unlikely
            [0.0, 1.0, -2.0, 30.0],
            [-7.0, -8.0, -9.0, math.inf],
            [5.0, 1.0, 2.0, 3.0],
        ]
    )
    assert policy.constrained_argmax(q_values, logits).squeeze(1).tolist() == [2, 1, 0, 0]
    policy.action_threshold = 0.0
    assert policy.constrained_argmax(q_values, logits).squeeze(1).tolist() == [3, 3, 3, 0]
    policy.action_threshold = 1.0
    assert policy.constrained_argmax(q_values, logits).squeeze(1).tolist() == [0, 0, 0, 0]


def test_imitation_loss_by_hand():
    model = discrete_bcq(logit_penalty=0.1)
    actions, logits = th.tensor([[1], [0]]), th.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    likelihoods = [0.75, 0.8]
    penalty = 0.1 * (math.log(3.0) ** 2 + math.log(4.0) ** 2) / 4
    loss, gradient = model._imitation_loss(logits, actions)
    assert loss.item() == pytest.approx(-np.mean(np.log(likelihoods)) + penalty)
    # Probability minus one for the action taken, mean over 2 rows; 2 * 0.1 * logit, mean over 4 logits
    expected = th.tensor([[0.25, -0.25], [-0.2, 0.2]]) / 2 + 0.05 * logits
    th.testing.assert_close(gradient, expected)


def test_gradient_of_the_imitation_loss_against_autograd():
    model = discrete_bcq(logit_penalty=0.3)
    th.manual_seed(0)
    actions, logits = th.randint(8, (16, 1)), (2 * th.randn(16, 8)).requires_grad_()
    expected = F.cross_entropy(logits, actions.squeeze(1)) + 0.3 * logits.square().mean()
    loss, gradient = model._imitation_loss(logits, actions)
    th.testing.assert_close(loss, expected.detach())
    th.testing.assert_close(gradient, th.autograd.grad(expected, logits)[0])


def test_discrete_target_against_a_plain_loop():
    model = discrete_bcq(gamma=0.9, action_threshold=0.9, tau=0.01).learn(30)
    policy = model.policy
    batch = batch_of(model, 8, dones=[1.0] + 7 * [0.0])
    expected = []
    for row in range(8):
        next_obs = batch.next_observations[row].double().numpy()
        logits, q_values = forward64(policy.imitation_net, next_obs), forward64(policy.q_net.q_net, next_obs)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        allowed = [a for a in range(8) if probabilities[a] >= 0.9 * probabilities.max()]
        best = max(allowed, key=lambda a: q_values[a])
        value = forward64(policy.q_net_target.q_net, next_obs)[best]
        expected.append([batch.rewards[row].item() + 0.9 * (1 - batch.dones[row].item()) * value])
    np.testing.assert_allclose(model._discrete_target(batch, *policy(batch.next_observations)).numpy(), expected, rtol=1e-4)


def test_discrete_actions_are_allowed_ones():
    model = discrete_bcq().learn(50)
    obs = np.random.default_rng(0).random((200, 4), dtype=np.float32)
    actions, _ = model.predict(obs)
    logits = model.policy(th.as_tensor(obs))[1]
    relative = (logits - logits.amax(dim=1, keepdim=True)).exp()
    assert (relative.gather(1, th.as_tensor(actions - 5)[:, None]) >= 0.3).all()
    assert all(model.action_space.contains(action) for action in actions)


def test_hard_target_updates():
    model = discrete_bcq(tau=1.0, target_update_interval=4)
    initial = model.policy.flat_target.tensor.clone()
    model.learn(3)
    assert th.equal(model.policy.flat_target.tensor, initial)
    model.learn(1, reset_num_timesteps=False)
    online = model.policy.flat.tensor[: initial.numel()]
    assert th.equal(model.policy.flat_target.tensor, online) and not th.equal(initial, online)


class Normalizing(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.layers = th.nn.Sequential(th.nn.BatchNorm1d(self.features_dim), th.nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(super().forward(observations))


@pytest.mark.parametrize("make", [continuous_bcq, discrete_bcq])
def test_targets_are_in_evaluation_mode(make):
    kwargs = {"net_arch": [5, 4], "features_extractor_class": Normalizing}
    model = make(policy_kwargs=kwargs, learning_rate=1e-2).learn(3)
    names = ["critic", "perturbation"] if make is continuous_bcq else ["q_net"]
    for name in names:
        online, target = (getattr(model.policy, each).features_extractor.layers for each in (name, f"{name}_target"))
        assert online.training and not any(layer.training for layer in target)
        # Statistics are copied at each update of the target, weights are averaged
        th.testing.assert_close(target[0].running_var, online[0].running_var, rtol=0, atol=0)
        assert online[0].running_var.ne(1).all()
        assert target[0].weight.ne(online[0].weight).any()


@pytest.mark.parametrize("make", [continuous_bcq, discrete_bcq])
def test_frozen_parameters_stay(make):
    kwargs = {"net_arch": [5, 4], "optimizer_class": th.optim.AdamW, "features_extractor_class": Normalizing}
    model = make(policy_kwargs=kwargs).learn(3)
    net = model.policy.critic if make is continuous_bcq else model.policy.q_net
    frozen = [net.features_extractor.layers[0].weight, list(net.parameters())[-1]]
    for param in frozen:
        param.requires_grad_(False)
    before = [param.clone() for param in net.parameters()]
    model.learn(3, reset_num_timesteps=False)
    for param, value in zip(net.parameters(), before, strict=True):
        assert th.equal(param, value) == any(param is each for each in frozen)


def test_networks_that_share_a_module_are_refused():
    class Wrapping(FlattenExtractor):
        def __init__(self, observation_space, backbone):
            super().__init__(observation_space)
            self.backbone = backbone

    kwargs = {"features_extractor_class": Wrapping, "features_extractor_kwargs": {"backbone": th.nn.Linear(3, 3)}}
    with pytest.raises(ValueError, match="share a module, maybe one in `features_extractor_kwargs`"):
        continuous_bcq(policy_kwargs=kwargs).learn(1)


def data_of_two_actions(env, behaviour, n_steps=2000):
    """Behaviour that takes, with equal probability, the best action or one other, and never a third."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(n_steps, env.observation_space, env.action_space, "cpu")
    obs = env.reset()
    for _ in range(n_steps):
        action = behaviour(obs, rng)
        new_obs, reward, done, infos = env.step(action)
        buffer.add(obs, infos[0].get("terminal_observation", new_obs), action, reward, done, infos)
        obs = new_obs
    return buffer


def mean_return(env_class, behaviour, **kwargs):
    env = make_vec_env(env_class, seed=0)
    data = data_of_two_actions(env, behaviour)
    model = BCQ("MlpPolicy", env, data, learning_rate=1e-3, tau=0.05, seed=0, device="cpu", **kwargs)
    return evaluate_policy(model.learn(1000), make_vec_env(env_class, seed=1), n_eval_episodes=10)[0]


def test_learns_the_best_of_the_discrete_actions_in_the_data():
    def behaviour(obs, rng):
        return 5 + obs.argmax(axis=1) + rng.integers(2, size=1)

    # The behaviour's mean return is 10. Without the constraint, the values of actions that are not in the data are
    # whatever the network makes of them.
    kwargs = {"policy_kwargs": {"net_arch": [32]}}
    assert mean_return(MatchEnv, behaviour, action_threshold=0.3, **kwargs) == 20.0
    assert mean_return(MatchEnv, behaviour, action_threshold=0.0, **kwargs) < 15.0


def test_learns_the_best_of_the_continuous_actions_in_the_data():
    def behaviour(obs, rng):
        return obs / 2 + 0.2 * rng.integers(2, size=1) + rng.normal(0, 0.01)

    # The behaviour's mean return is about 10
    kwargs = {"policy_kwargs": {"net_arch": [32], "vae_net_arch": [64]}}
    constrained = mean_return(OffsetEnv, behaviour, perturbation_scale=0.05, **kwargs)
    free = mean_return(OffsetEnv, behaviour, perturbation_scale=1.0, **kwargs)
    assert constrained > 13.0
    assert free < 5.0


@pytest.mark.parametrize(
    ("env_id", "n_updates", "behaviour", "threshold"),
    [("CartPole-v1", 16_000, (100, 300), 475), ("Pendulum-v1", 4_000, (-900, -400), -250)],
)
def test_shipped_data_and_hyperparameters_beat_the_behaviour(env_id, n_updates, behaviour, threshold):
    settings = yaml.safe_load((PROJECT / "hyperparams" / "bcq.yml").read_text())[env_id]
    assert settings.pop("n_timesteps") >= n_updates
    settings["policy_kwargs"] = eval(settings.get("policy_kwargs", "None"))
    model = BCQ(env=make_vec_env(env_id), seed=0, device="cpu", **settings)
    low, high = behaviour
    assert low <= model.transitions.metadata["mean_return"] <= high
    test_env = make_vec_env(env_id, n_envs=10, seed=100)
    assert evaluate_policy(model.learn(n_updates), test_env, n_eval_episodes=20)[0] >= threshold


# ---- Parameters and data ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", 1.5),
        ("gamma", -0.1),
        ("batch_size", 0),
        ("min_q_weight", 2.0),
        ("perturbation_scale", -0.1),
        ("n_target_candidates", 0),
        ("n_acting_candidates", 0),
        ("latent_dim", 0),
        ("latent_clip", -1.0),
        ("kl_weight", -1.0),
        ("action_threshold", 1.01),
        ("logit_penalty", -1.0),
        ("target_update_interval", 0),
    ],
)
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* but got {value}"):
        discrete_bcq(**{name: value})


def test_observation_normalization_is_refused_with_advice():
    env = make_vec_env(MatchEnv)
    data = random_replay_buffer(env)
    with pytest.raises(DatasetError, match="norm_obs=False"):
        BCQ("MlpPolicy", VecNormalize(env), data)
    model = BCQ("MlpPolicy", env, data)
    model.set_env(VecNormalize(make_vec_env(MatchEnv)))
    with pytest.raises(DatasetError, match="norm_obs=False"):
        model.learn(1)


def test_divergence_is_a_value_error():
    model = discrete_bcq()
    model.policy.flat.tensor.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        model.learn(3)


def test_loading_needs_no_data_and_learning_asks_for_them(tmp_path):
    discrete_bcq().learn(2).save(tmp_path / "model")
    loaded = BCQ.load(tmp_path / "model")
    assert loaded.transitions is None
    with pytest.raises(ValueError, match="set_env"):
        loaded.learn(2)
    loaded.set_env(make_vec_env(MatchEnv))
    with pytest.raises(DatasetError):
        loaded.learn(2)
    loaded.dataset = random_replay_buffer(loaded.env)
    assert loaded.learn(2).num_timesteps == 2


def test_batches_bootstrap_on_truncation_but_not_on_termination():
    env = make_vec_env(MatchEnv)
    data = random_replay_buffer(env, n_steps=60)
    # Episodes of MatchEnv are truncated after 20 steps
    assert data.dones.sum() == 3 and data.timeouts.sum() == 3
    model = BCQ("MlpPolicy", env, data, seed=0, device="cpu")
    batch: ReplayBufferSamples = model.transitions.sample(500, model.batch_generator)
    assert batch.dones.sum() == 0


def test_multi_discrete_actions_are_not_supported():
    with pytest.raises(ValueError, match=r"BCQ supports Box or Discrete action spaces, but got MultiDiscrete"):
        BCQ("MlpPolicy", IdentityEnvMultiDiscrete(dim=2))
