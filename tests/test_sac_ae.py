"""SAC-AE: networks, losses, what each of them trains, and learning from pixels."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algo_cases import ActionReward
from gymnasium import spaces
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from benchmarks.frames import resident_bytes
from sb3_ext import SACAE, FrameReplayBuffer
from sb3_ext.algos.sac_ae.autoencoder import (
    ConvDecoder,
    ConvEncoder,
    _ConvTranspose2d,
    _random_bytes,
    _ReLU,
    init_weights,
    quantize,
    reconstruction_loss,
    to_image,
)
from sb3_ext.algos.sac_ae.reconstructions import ReconstructionCallback, montage, pictures
from sb3_ext.algos.sac_ae.sac_ae import _minimize

SMALL = {"net_arch": [16], "features_extractor_kwargs": {"features_dim": 8, "n_layers": 2, "n_filters": 4}}


def image_env():
    return ActionReward(FakeImageEnv(screen_height=32, screen_width=33, n_channels=3, discrete=False))


def make_model(**kwargs):
    defaults = {"buffer_size": 60, "batch_size": 8, "learning_starts": 10, "initial_gradient_steps": 0, "policy_kwargs": SMALL}
    return SACAE("CnnPolicy", image_env(), **{"seed": 0, "device": "cpu", **defaults, **kwargs})


def batch_for(model, n=8, seed=0):
    rng = np.random.default_rng(seed)
    shape, n_actions = model.observation_space.shape, model.action_space.shape[0]
    images = [th.as_tensor(rng.integers(0, 256, (n, *shape), np.uint8)) for _ in range(2)]
    actions = th.as_tensor(rng.uniform(-1, 1, (n, n_actions)), dtype=th.float32)
    dones = th.as_tensor(rng.integers(0, 2, (n, 1)), dtype=th.float32)
    rewards = th.as_tensor(rng.normal(size=(n, 1)), dtype=th.float32)
    return ReplayBufferSamples(images[0], actions, images[1], dones, rewards)


def encoder_for(n_channels, height, width, **kwargs):
    return ConvEncoder(spaces.Box(0, 255, (n_channels, height, width), np.uint8), **kwargs)


# -- networks --


@pytest.mark.parametrize("n_layers", [1, 2, 4, 6])
@pytest.mark.parametrize("shape", [(1, 32, 32), (9, 84, 84), (3, 33, 48), (4, 47, 35)])
def test_decoder_mirrors_encoder(n_layers, shape):
    encoder = encoder_for(*shape, n_layers=n_layers, n_filters=4, features_dim=7)
    decoder = ConvDecoder(encoder)
    images = th.rand(2, *shape)
    assert encoder.convolutions(images).shape[1:] == encoder.conv_shape
    assert encoder(images).shape == (2, 7)
    assert decoder(encoder(images)).shape == images.shape
    are_convolutions = [isinstance(layer, nn.ConvTranspose2d) for layer in decoder.convolutions]
    assert sum(are_convolutions) == n_layers and are_convolutions[-1]


def test_sizes_of_the_paper():
    # "39 x 39 with 2 layers, 35 x 35 with 4, 31 x 31 with 6" in the code of the paper
    assert [encoder_for(9, 84, 84, n_layers=n, n_filters=1).conv_shape for n in (2, 4, 6)] == [
        (1, 39, 39),
        (1, 35, 35),
        (1, 31, 31),
    ]


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match="too small for 6 convolutions"):
        encoder_for(3, 12, 40, n_layers=6)


def test_latent_vectors_are_in_range_and_normalized_before_tanh():
    encoder = encoder_for(3, 32, 32)
    features = encoder(th.rand(5, 3, 32, 32))
    assert features.abs().max() < 1
    before = features.atanh()
    assert th.allclose(before.mean(dim=1), th.zeros(5), atol=1e-4)
    assert th.allclose(before.var(dim=1, unbiased=False), th.ones(5), atol=1e-2)


def test_initialization():
    linear, conv, deconv = nn.Linear(6, 4), nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 3, 3)
    for layer in (linear, conv, deconv):
        init_weights(layer)
        assert not layer.bias.any()
    assert th.allclose(linear.weight @ linear.weight.T, th.eye(4), atol=1e-5)
    for layer in (conv, deconv):
        middle = layer.weight[:, :, 1, 1].clone()
        # The gain of ReLU is the square root of 2
        assert th.allclose(middle.T @ middle, 2 * th.eye(3), atol=1e-5)
        with th.no_grad():
            layer.weight[:, :, 1, 1] = 0
        assert not layer.weight.any()


def test_quantized_images_by_hand():
    th.manual_seed(0)
    images = th.tensor([0, 7, 8, 100, 255], dtype=th.uint8)
    floors = th.tensor([0, 0, 1, 12, 31]) / 32 - 0.5
    noise = quantize(images, 5) - floors
    assert (noise >= 0).all() and (noise < 1 / 32).all() and noise.unique().numel() == 5
    many = quantize(th.full((100_000,), 100, dtype=th.uint8), 5)
    assert many.mean().item() == pytest.approx(12.5 / 32 - 0.5, abs=2e-4)
    assert quantize(images, 8).sub(images / 256 - 0.5).abs().max() <= 1 / 256
    # The middle of a step comes back as a byte of that step
    assert to_image(floors + 0.5 / 32).tolist() == [4, 4, 12, 100, 252]


@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_random_bytes_are_uniform_and_laid_out_like_the_images(memory_format):
    th.manual_seed(0)
    images = th.zeros(50, 3, 31, 33, dtype=th.uint8).to(memory_format=memory_format)
    noise = _random_bytes(images)
    assert noise.shape == images.shape and noise.stride() == images.stride() and noise.dtype == th.uint8
    counts = noise.flatten().bincount(minlength=256)
    assert len(counts) == 256
    # Chi-squared with 255 degrees of freedom: 99.9 % are below 331
    expected = images.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 331
    # Also of a part of an image
    assert _random_bytes(images[:, :, ::2]).shape == (50, 3, 16, 33)


@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
@pytest.mark.parametrize("sizes", [{}, {"stride": 2, "output_padding": (1, 0)}])
def test_layers_of_the_decoder_are_those_of_torch(memory_format, sizes):
    th.manual_seed(0)
    ours = nn.Sequential(_ConvTranspose2d(4, 5, 3, **sizes), _ReLU(), _ConvTranspose2d(5, 3, 3), _ReLU()).double()
    torchs = nn.Sequential(nn.ConvTranspose2d(4, 5, 3, **sizes), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3), nn.ReLU()).double()
    torchs.load_state_dict(ours.state_dict())
    maps, weights = th.randn(2, 4, 6, 7).double().to(memory_format=memory_format), None
    results = []
    for layers in (ours, torchs):
        inputs = maps.clone().requires_grad_()
        outputs = layers(inputs)
        weights = th.randn_like(outputs) if weights is None else weights
        gradients = th.autograd.grad((outputs * weights).sum(), [inputs, *layers.parameters()])
        results.append([outputs, *gradients])
    assert results[0][0].count_nonzero() not in (0, results[0][0].numel())
    for of_ours, of_torchs in zip(*results, strict=True):
        th.testing.assert_close(of_ours, of_torchs, rtol=1e-10, atol=1e-12)


def test_reconstruction_loss_and_its_gradient():
    images = th.randint(0, 256, (5, 3, 7, 7), dtype=th.uint8)
    reconstruction = th.randn(5, 3, 7, 7, requires_grad=True)
    th.manual_seed(0)
    loss = reconstruction_loss(reconstruction, images, 5)
    (gradient,) = th.autograd.grad(3 * loss, reconstruction)
    th.manual_seed(0)
    errors = reconstruction.detach().double() - quantize(images, 5).double()
    th.testing.assert_close(loss.double(), errors.square().mean(), rtol=1e-6, atol=0)
    th.testing.assert_close(gradient.double(), 3 * 2 * errors / errors.numel(), rtol=1e-5, atol=1e-8)


def test_reconstruction_loss_cannot_be_differentiated_twice():
    images, reconstruction = th.randint(0, 256, (5, 3, 7, 7), dtype=th.uint8), th.randn(5, 3, 7, 7, requires_grad=True)
    loss = reconstruction_loss(reconstruction, images, 5)
    th.autograd.grad(loss, reconstruction, retain_graph=True)
    with pytest.raises(RuntimeError, match="which can be done once"):
        th.autograd.grad(loss, reconstruction)
    (gradient,) = th.autograd.grad(reconstruction_loss(reconstruction, images, 5), reconstruction, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_the_actors_layers_can_be_exported():
    actor = make_model().actor
    layers = nn.Sequential(actor.features_extractor, actor.latent_pi, actor.mu, nn.Tanh()).eval()
    images = th.rand(4, 3, 32, 33) * 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exports = [th.export.export(layers, (images,)).module(), th.jit.trace(layers, images)]
    for exported in exports:
        th.testing.assert_close(exported(images), actor(images * 255, deterministic=True))


def test_log_std_is_bounded():
    model = make_model(policy_kwargs={**SMALL, "log_std_min": -3.0, "log_std_max": 1.0})
    with th.no_grad():
        model.actor.log_std.weight.mul_(1000)
        model.actor.log_std.bias.copy_(th.tensor([-1e3, 0.0, 1e3, 0.0, 0.0]))
        model.actor.log_std.weight.zero_()
    _, log_std, _ = model.actor.get_action_dist_params(batch_for(model).observations)
    assert th.allclose(log_std[0], th.tensor([-3.0, -1.0, 1.0, -1.0, -1.0]))


# -- losses --


def reference_networks(model):
    """Copies in float64, with an encoder for the actor that is a copy of the critic's."""
    return {
        name: copy.deepcopy(getattr(model.policy, name)).double() for name in ("actor", "critic", "critic_target", "decoder")
    }


def squashed_sample(actor, images, noise):
    latent = actor.latent_pi(actor.features_extractor(images))
    low, high = actor.log_std_min, actor.log_std_max
    log_std = low + 0.5 * (high - low) * (th.tanh(actor.log_std(latent)) + 1)
    gaussian = actor.mu(latent) + log_std.exp() * noise
    actions = th.tanh(gaussian)
    log_prob = (-0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - th.log(1 - actions**2 + 1e-6)).sum(1, keepdim=True)
    return actions, log_prob


def q_values(critic, images, actions):
    inputs = th.cat([critic.features_extractor(images), actions], dim=1)
    return th.cat([network(inputs) for network in critic.q_networks], dim=1)


def adam(params, **kwargs):
    return th.optim.Adam(list(params), lr=kwargs.pop("lr", 1e-3), **kwargs)


def without_convolutions(module):
    return [param for name, param in module.named_parameters() if "convolutions" not in name]


class PlainUpdate:
    """The update of the paper as it is written there, every pass on its own, in float64 and with torch's plain optimizers."""

    def __init__(self, model):
        self.model, self.nets = model, reference_networks(model)
        self.tie()
        actor, critic, decoder = self.nets["actor"], self.nets["critic"], self.nets["decoder"]
        self.log_ent_coef = model.log_ent_coef.detach().double().requires_grad_(True)
        if model.policy.actor_trains_convolutions:
            # Gradients of both ways to the actor's loss: its actions, and the critics that judge them
            actor.features_extractor.convolutions = critic.features_extractor.convolutions
        self.actor_optimizer = adam(
            actor.parameters() if model.policy.actor_trains_convolutions else without_convolutions(actor)
        )
        self.critic_optimizer = adam(critic.parameters())
        self.encoder_optimizer = adam(critic.features_extractor.parameters())
        self.decoder_optimizer = adam(decoder.parameters(), weight_decay=1e-7)
        self.ent_coef_optimizer = adam([self.log_ent_coef], lr=1e-4, betas=(0.5, 0.999))
        self.n_updates = 0

    def tie(self):
        actor, critic = (self.nets[name].features_extractor.convolutions for name in ("actor", "critic"))
        actor.load_state_dict(critic.state_dict())

    def __call__(self, batch):
        actor, critic, target, decoder = (self.nets[name] for name in ("actor", "critic", "critic_target", "decoder"))
        obs, next_obs = batch.observations.double() / 255, batch.next_observations.double() / 255
        ent_coef = self.log_ent_coef.exp().detach()
        self.n_updates += 1
        n_actions = batch.actions.shape[1]
        self.tie()
        with th.no_grad():
            next_actions, next_log_prob = squashed_sample(actor, next_obs, th.randn(len(obs), n_actions).double())
            next_q = q_values(target, next_obs, next_actions).min(dim=1, keepdim=True).values
            y = batch.rewards + 0.99 * (1 - batch.dones) * (next_q - ent_coef * next_log_prob)
        loss = sum(((q - y) ** 2).mean() for q in q_values(critic, obs, batch.actions.double()).split(1, dim=1))
        self.step(loss, self.critic_optimizer)
        self.tie()
        if self.n_updates % 2 == 0:
            actions, log_prob = squashed_sample(actor, obs, th.randn(len(obs), n_actions).double())
            q = q_values(critic, obs, actions).min(dim=1, keepdim=True).values
            self.step((ent_coef * log_prob - q).mean(), self.actor_optimizer)
            ent_coef_loss = (self.log_ent_coef.exp() * (-log_prob - -float(n_actions)).detach()).mean()
            self.step(ent_coef_loss, self.ent_coef_optimizer)
        noise = _random_bytes(batch.observations.to(memory_format=th.channels_last)).double() / 256
        quantized = (th.floor(batch.observations.double() / 8) + noise) / 32 - 0.5
        latent = critic.features_extractor(obs)
        loss = ((decoder(latent) - quantized) ** 2).mean() + 1e-6 * (0.5 * latent**2).sum(1).mean()
        self.step(loss, self.encoder_optimizer, self.decoder_optimizer)
        if self.n_updates % 2 == 0:
            for ours, its in zip(target.parameters(), critic.parameters(), strict=True):
                is_encoder = any(ours is param for param in target.features_extractor.parameters())
                ours.data.lerp_(its.data, 0.05 if is_encoder else 0.01)

    def step(self, loss, *optimizers):
        for module in self.nets.values():
            module.zero_grad()
        self.log_ent_coef.grad = None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("optimizer_kwargs", [{}, {"fused": False}])
@pytest.mark.parametrize("actor_trains_convolutions", [False, True])
def test_updates_equal_the_plain_ones_of_the_paper(actor_trains_convolutions, optimizer_kwargs):
    policy_kwargs = {"actor_trains_convolutions": actor_trains_convolutions, "optimizer_kwargs": optimizer_kwargs}
    model = make_model(policy_kwargs={**SMALL, **policy_kwargs})
    plain = PlainUpdate(model)
    for seed in range(6):
        batch = batch_for(model, seed=seed)
        for update in (model._update, plain):
            th.manual_seed(seed)
            update(batch)
    plain.tie()
    for name, expected in plain.nets.items():
        ours = getattr(model.policy, name).state_dict()
        for key, value in expected.state_dict().items():
            # Adam's first steps have the size of the learning rate whatever the gradient, so that small ones can differ
            assert th.allclose(ours[key].double(), value, atol=2e-4), (name, key)
            assert (ours[key].double() - value).abs().mean() < 5e-6, (name, key)
    assert model.log_ent_coef.item() == pytest.approx(plain.log_ent_coef.item(), rel=1e-6)


def changed_by(model, update):
    before = copy.deepcopy(model.policy.state_dict())
    update()
    return {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}


@pytest.mark.parametrize("lets_through", [False, True])
def test_the_actor_leaves_the_convolutions_alone_unless_it_is_let_through(lets_through):
    model = make_model(
        policy_kwargs={**SMALL, "actor_trains_convolutions": lets_through},
        actor_update_interval=1,
        decoder_update_interval=None,
        target_update_interval=100,
    )
    # What is left is the actor's update
    model.critic.optimizer.param_groups[0]["lr"] = 0.0
    changed = changed_by(model, lambda: model._update(batch_for(model)))
    convolutions = {name for name in changed if "convolutions" in name}
    # The same tensors under the names of both
    own = {name for name, _ in model.policy.named_parameters() if name.startswith("actor.") and "convolutions" not in name}
    assert bool(convolutions) == lets_through
    assert changed - convolutions == own | {name for name in own if name.startswith("actor.features_extractor.projection")}


@pytest.mark.parametrize("loss", ["critic", "autoencoder"])
def test_critic_and_autoencoder_train_the_convolutions(loss):
    model = make_model(actor_update_interval=100, target_update_interval=100)
    frozen = {
        "critic": [model.policy.encoder_optimizer, model.policy.decoder_optimizer],
        "autoencoder": [model.critic.optimizer],
    }
    for optimizer in frozen[loss]:
        optimizer.param_groups[0]["lr"] = 0.0
    changed = changed_by(model, lambda: model._update(batch_for(model)))
    heads = {"critic": "critic.qf", "autoencoder": "decoder."}
    trained = heads.pop(loss)
    assert any(name.startswith("critic.features_extractor.convolutions") for name in changed)
    assert any(name.startswith("critic.features_extractor.projection") for name in changed)
    assert any(name.startswith(trained) for name in changed)
    assert not any(name.startswith(other) for name in changed for other in heads.values())
    assert not any(name.startswith(("critic_target", "actor.latent")) for name in changed)


def test_target_coefficients():
    model = make_model(encoder_tau=0.25, tau=0.5, target_update_interval=3)
    before = copy.deepcopy(model.critic_target.state_dict())
    for seed in range(2):
        model._update(batch_for(model, seed=seed))
    assert all(th.equal(value, before[name]) for name, value in model.critic_target.state_dict().items())
    model._update(batch_for(model, seed=2))
    online = model.critic.state_dict()
    for name, value in model.critic_target.state_dict().items():
        tau = 0.25 if name.startswith("features_extractor") else 0.5
        assert th.allclose(value, (1 - tau) * before[name] + tau * online[name], atol=1e-6), name


def test_time_limits_are_bootstrapped_and_terminations_are_not():
    model = make_model(ent_coef=0.0)
    obs = np.zeros((1, *model.observation_space.shape), np.uint8)
    for truncated in (True, False):
        model.replay_buffer.add(obs, obs, np.zeros((1, 5)), np.ones(1), np.ones(1), [{"TimeLimit.truncated": truncated}])
    batch = model.replay_buffer._get_samples(np.array([0, 1]))
    with th.no_grad():
        for network in model.critic_target.q_networks:
            network[-1].weight.zero_()
            network[-1].bias.fill_(10.0)
    targets = model._target(batch, model.policy.preprocess(batch.next_observations), th.zeros(1))
    assert targets.squeeze(1).tolist() == pytest.approx([1 + 0.99 * 10, 1.0])


def test_fixed_entropy_coefficient_and_n_step_returns():
    model = make_model(ent_coef=0.2, n_steps=3, gamma=0.9)
    assert model.ent_coef_optimizer is None
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.9)
    model.learn(20)
    assert model._n_updates == 10


def test_n_steps_that_the_replay_buffer_does_not_have_are_warned_of(tmp_path, recwarn):
    for kwargs in ({}, {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"n_stack": 1}}):
        model = make_model(n_steps=3, gamma=0.9, **kwargs)
        assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (3, 0.9)
    model.save(tmp_path / "model")
    SACAE.load(tmp_path / "model", device="cpu")
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]
    with pytest.warns(UserWarning, match="`n_steps=2` is ignored"):
        SACAE.load(tmp_path / "model", device="cpu", n_steps=2)


def test_updates_at_once_before_the_first():
    model = make_model(initial_gradient_steps=7)
    model.learn(11)
    assert model._n_updates == 8
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 9


def test_gradients_are_laid_out_as_their_parameters():
    torch_version, ours = (nn.Parameter(th.arange(54.0).reshape(2, 3, 3, 3)) for _ in range(2))
    ours.data = ours.data.contiguous(memory_format=th.channels_last)
    optimizers = [th.optim.Adam([torch_version], lr=0.1), th.optim.Adam([ours], lr=0.1, fused=True)]
    factors = th.linspace(-1, 1, 54).reshape(2, 3, 3, 3)
    for _ in range(3):
        for param, optimizer in zip((torch_version, ours), optimizers, strict=True):
            # A copy in between, whose gradient has the layout of the copy
            _minimize((param.contiguous().square() * factors).sum(), optimizer)
    th.testing.assert_close(ours, torch_version)


@pytest.mark.parametrize(
    "frozen", ["decoder", "critic.features_extractor", "critic.features_extractor.convolutions.0", "actor"]
)
def test_frozen_parts_stay_and_the_others_are_trained(frozen):
    model = make_model()
    part = model.policy.get_submodule(frozen).requires_grad_(False)
    kept = {id(param) for param in part.parameters()}
    before = {name: (param, param.detach().clone()) for name, param in model.policy.named_parameters()}
    model.learn(14)
    for name, (param, value) in before.items():
        if not name.startswith("critic_target"):
            assert th.equal(param, value) == (id(param) in kept), name


def test_parameters_without_influence_stay():
    class WithUnused(ConvEncoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.unused = nn.Linear(3, 3)

    policy_kwargs = {**SMALL, "features_extractor_class": WithUnused}
    model = make_model(policy_kwargs=policy_kwargs)
    before = model.critic.features_extractor.unused.weight.clone()
    model.learn(14)
    assert th.equal(model.critic.features_extractor.unused.weight, before)


# -- sharing, saving, arguments --


def assert_shared(policy):
    actor, critic = policy.actor.features_extractor, policy.critic.features_extractor
    assert actor.convolutions is critic.convolutions
    assert actor.projection is not critic.projection
    in_optimizer = {id(param) for group in policy.critic.optimizer.param_groups for param in group["params"]}
    assert all(id(param) in in_optimizer for param in actor.convolutions.parameters())
    in_optimizer = {id(param) for group in policy.actor.optimizer.param_groups for param in group["params"]}
    assert not any(id(param) in in_optimizer for param in critic.parameters())
    target = policy.critic_target.features_extractor
    assert not {id(param) for param in target.parameters()} & {id(param) for param in critic.parameters()}


def test_convolutions_stay_the_same_object(tmp_path):
    model = make_model().learn(14)
    assert_shared(model.policy)
    assert_shared(copy.deepcopy(model.policy))
    model.save(tmp_path / "model")
    loaded = SACAE.load(tmp_path / "model", device="cpu")
    assert_shared(loaded.policy)
    loaded.set_parameters(model.get_parameters())
    assert_shared(loaded.policy)
    # Training goes on with what is shared
    before = copy.deepcopy(loaded.critic.features_extractor.convolutions.state_dict())
    loaded._update(batch_for(loaded))
    after = loaded.actor.features_extractor.convolutions.state_dict()
    assert not th.equal(before["0.weight"], after["0.weight"])


def test_learning_rates_given_at_loading_are_used(tmp_path):
    make_model().learn(14).save(tmp_path / "model")
    rates = {"encoder_learning_rate": 1e-5, "decoder_learning_rate": 2e-5, "ent_coef_learning_rate": 3e-5}
    loaded = SACAE.load(tmp_path / "model", env=image_env(), device="cpu", **rates)
    loaded.learn(2, reset_num_timesteps=False)
    optimizers = [loaded.policy.encoder_optimizer, loaded.policy.decoder_optimizer, loaded.ent_coef_optimizer]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == list(rates.values())


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_environments_without_stacks_have_one_frame(vec_env_class):
    model = SACAE("CnnPolicy", vec_env_class([image_env]), buffer_size=50, device="cpu", policy_kwargs=SMALL)
    assert model.replay_buffer.n_stack == 1
    model.env.close()


def test_number_of_frames_is_found():
    vec_env = VecFrameStack(make_vec_env(image_env), n_stack=2)
    model = SACAE("CnnPolicy", vec_env, buffer_size=50, device="cpu", policy_kwargs=SMALL)
    assert isinstance(model.replay_buffer, FrameReplayBuffer) and model.replay_buffer.n_stack == 2
    assert make_model(replay_buffer_kwargs={"n_stack": 3}).replay_buffer.n_stack == 3


def test_the_decoder_has_the_weight_decay_of_its_own():
    model = make_model(policy_kwargs={**SMALL, "decoder_weight_decay": 0.3, "optimizer_kwargs": {"weight_decay": 0.1}})
    optimizers = [model.critic.optimizer, model.policy.decoder_optimizer]
    assert [optimizer.param_groups[0]["weight_decay"] for optimizer in optimizers] == [0.1, 0.3]
    # Not every optimizer has one
    make_model(policy_kwargs={**SMALL, "decoder_weight_decay": 0.0, "optimizer_class": th.optim.Rprop})


def test_memory_of_100_000_transitions():
    # Nothing is written, so that the operating system does not allocate it
    space = spaces.Box(0, 255, (9, 84, 84), np.uint8)
    buffer = FrameReplayBuffer(100_000, space, spaces.Box(-1, 1, (6,)), device="cpu", n_stack=3)
    assert buffer.nbytes <= 2.2e9


def test_a_loaded_agent_has_no_memory_for_transitions(tmp_path):
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=9, discrete=False)
    SACAE("CnnPolicy", env, device="cpu", policy_kwargs=SMALL).save(tmp_path / "model")
    before = resident_bytes()
    model = SACAE.load(tmp_path / "model", device="cpu")
    # Room for 100,000 transitions, which the system gives when they come
    assert model.replay_buffer.nbytes > 6e9
    assert resident_bytes() - before < 200e6


class Inverting(ConvEncoder):
    def forward(self, images):
        return super().forward(1 - images)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder_tau": 1.5}, "encoder_tau must be in"),
        ({"actor_update_interval": 0}, "actor_update_interval must be at least 1"),
        ({"decoder_update_interval": 0}, "decoder_update_interval must be at least 1"),
        ({"latent_coef": -1}, "latent_coef must be at least 0"),
        ({"n_bits": 9}, "n_bits must be in"),
        ({"n_bits": 4.5}, "n_bits must be an integer, but got 4.5"),
        ({"policy_kwargs": {"features_extractor_class": Inverting}}, "Inverting has a `forward` of its own"),
        ({"policy_kwargs": {"features_extractor_kwargs": {"n_layers": 0}}}, "n_layers must be at least 1, but got 0"),
        ({"policy_kwargs": {"features_extractor_class": NatureCNN}}, "must be a ConvEncoder, but got NatureCNN"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_observations_that_are_no_images():
    with pytest.raises(ValueError, match=r"supports Box observation spaces of images .* but got Box.*PixelObservation"):
        SACAE("CnnPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="norm_obs=False"):
        SACAE("CnnPolicy", VecNormalize(make_vec_env(image_env)))


# -- learning --


class Pointer(gym.Env):
    """A bar somewhere in an image, and a reward for pointing at it."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        column = self.np_random.integers(2, 30)
        self.position = (column - 15.5) / 14
        image = np.zeros((32, 32, 3), np.uint8)
        image[8:24, column - 2 : column + 3] = (250, 120, 60)
        self.image = image
        return image, {}

    def step(self, action):
        return self.image, -abs(float(action[0]) - self.position), True, False, {}


def test_learns_from_pixels():
    model = SACAE(
        "CnnPolicy",
        make_vec_env(Pointer, seed=0),
        buffer_size=2000,
        batch_size=32,
        learning_starts=200,
        initial_gradient_steps=200,
        decoder_learning_rate=1e-2,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [64], "features_extractor_kwargs": {"features_dim": 16, "n_layers": 2, "n_filters": 8}},
    )
    model.learn(700)
    # Random actions: -0.67
    mean, _ = evaluate_policy(model, make_vec_env(Pointer, seed=1), n_eval_episodes=100)
    assert mean >= -0.12
    images = np.stack([Pointer().reset(seed=seed)[0].transpose(2, 0, 1) for seed in range(20)])
    error = np.abs(model.reconstruct(images).astype(float) - images).mean()
    # The same image for all: 17
    assert error <= 8


# -- pictures --


def test_reconstructions_are_drawn_during_training(tmp_path):
    callback = ReconstructionCallback(interval=10, n_images=3)
    drawn = make_model()
    drawn.set_logger(configure(str(tmp_path), ["tensorboard"]))
    drawn.learn(30, callback=callback, log_interval=1)
    paths = sorted(path.name for path in tmp_path.glob("*.png"))
    assert paths == ["reconstructions_10_steps.png", "reconstructions_20_steps.png", "reconstructions_30_steps.png"]
    with Image.open(tmp_path / paths[0]) as image:
        assert image.size == (3 * 33, 2 * 32)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert events.Images("train/reconstructions")
    with pytest.raises(ValueError, match="must be at least 1, but got 0 and 8"):
        ReconstructionCallback(interval=0)


def test_there_is_nothing_to_draw_before_the_first_transition_is_stored(tmp_path):
    make_model().learn(3, callback=ReconstructionCallback(interval=1, folder=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reconstructions_2_steps.png", "reconstructions_3_steps.png"]


def test_drawing_uses_no_random_numbers_of_the_training(tmp_path):
    model = make_model().learn(20)
    np.random.seed(3)
    expected = np.random.rand()
    callback = ReconstructionCallback(interval=1, folder=str(tmp_path))
    callback.init_callback(model)
    np.random.seed(3)
    callback._draw(model.replay_buffer)
    assert np.random.rand() == expected


def test_montage_shows_the_newest_frames_over_their_reconstructions():
    env = VecFrameStack(make_vec_env(image_env), n_stack=2)
    model = SACAE("CnnPolicy", env, buffer_size=9, policy_kwargs=SMALL, device="cpu")
    images = batch_for(model, n=2).observations.numpy()
    image = montage(model, images)
    assert image.shape == (64, 66, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[:32, 33:], images[1, 3:].transpose(1, 2, 0))
    np.testing.assert_array_equal(image[32:, :33], model.reconstruct(images)[0, 3:].transpose(1, 2, 0))


def test_pictures_of_the_model_card():
    model = make_model()
    # As the zoo's commands make it, channels last
    figures = pictures(model, DummyVecEnv([image_env]), deterministic=True)
    assert list(figures) == ["reconstructions"]
    assert figures["reconstructions"].axes[0].images[0].get_array().shape == (64, 8 * 33, 3)
    assert pictures(make_model(decoder_update_interval=None), DummyVecEnv([image_env]), deterministic=True) == {}
