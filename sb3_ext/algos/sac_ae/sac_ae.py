from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import polyak_update, update_learning_rate
from stable_baselines3.common.vec_env import VecFrameStack, is_vecenv_wrapped, unwrap_vec_wrapper
from stable_baselines3.sac import SAC

from sb3_ext.algos.sac_ae.autoencoder import reconstruction_loss, to_image
from sb3_ext.algos.sac_ae.policies import Actor, CnnPolicy, Critic, SACAEPolicy
from sb3_ext.common.adam import SingleTensorAdam
from sb3_ext.common.arguments import check_range
from sb3_ext.common.conv_features import channels_last
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.frame_replay_buffer import FrameReplayBuffer
from sb3_ext.common.malloc import keep_freed_memory
from sb3_ext.common.progress import ProgressMixin
from sb3_ext.common.replay_buffer import chosen_replay_buffer
from sb3_ext.common.reward_normalization import RewardNormalizationMixin

SelfSACAE = TypeVar("SelfSACAE", bound="SACAE")


class SACAE(ProgressMixin, RewardNormalizationMixin, SAC):
    """
    Soft Actor-Critic with a regularized autoencoder (SAC-AE): control from pixels.

    Actor and critics see the latent vectors of one autoencoder. Its convolutions are trained by the critics' loss and by the
    reconstruction of the images, and not by the actor's loss.

    Paper: Yarats et al. 2019, "Improving Sample Efficiency in Model-Free Reinforcement Learning from Images"
    (https://arxiv.org/abs/1910.01741). Defaults are those of the paper; the documentation lists where we differ.

    :param policy: The policy model to use (CnnPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str); its observations are images
    :param learning_rate: Learning rate of actor and critics, > 0; it can be a function of the current progress remaining
        (from 1 to 0)
    :param buffer_size: Size of the replay buffer in transitions, >= 1
    :param learning_starts: Steps of the environment, with random actions, before the first update, >= 0
    :param batch_size: Transitions in one update, >= 1
    :param tau: Polyak coefficient of the target critics' heads, in [0, 1]
    :param gamma: Discount factor, in [0, 1]
    :param train_freq: Update after so many steps in each environment; or ``(5, "step")``, ``(2, "episode")``
    :param gradient_steps: Updates after each of these rollouts; -1: as many as steps were taken
    :param action_noise: Noise added to the actions
    :param replay_buffer_class: Replay buffer class to use (None: :class:`FrameReplayBuffer`, for the number of frames that
        ``VecFrameStack`` or an attribute ``n_stack`` of the environment names)
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer
    :param optimize_memory_usage: SB3's memory-efficient variant of its own replay buffer
    :param n_steps: Steps of the return in the target, >= 1
    :param ent_coef: Entropy coefficient; "auto" learns it, "auto_0.1" from this initial value
    :param target_update_interval: Update the targets in every so many updates, >= 1
    :param target_entropy: Entropy that the learned coefficient aims at; "auto": minus the number of action dimensions
    :param encoder_tau: Polyak coefficient of the target critics' encoder, in [0, 1]
    :param actor_update_interval: Update actor and entropy coefficient in every so many updates, >= 1
    :param decoder_update_interval: Update the autoencoder in every so many updates, >= 1; None: never
    :param initial_gradient_steps: Updates done at once before the first, >= 0
    :param ent_coef_learning_rate: Learning rate of the entropy coefficient, > 0
    :param ent_coef_betas: Betas of the entropy coefficient's Adam
    :param encoder_learning_rate: Learning rate of the encoder in reconstruction, > 0
    :param decoder_learning_rate: Learning rate of the decoder, > 0
    :param latent_coef: Weight of the squared norm of the latent vectors, >= 0
    :param n_bits: Bits of each byte of an image that are to be reconstructed, 1 to 8
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if a space is not supported, a number is out of range, or training diverges
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CnnPolicy": CnnPolicy}
    policy: SACAEPolicy
    actor: Actor
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        policy: str | type[SACAEPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 100_000,
        learning_starts: int = 1000,
        batch_size: int = 128,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.1",
        target_update_interval: int = 2,
        target_entropy: str | float = "auto",
        encoder_tau: float = 0.05,
        actor_update_interval: int = 2,
        decoder_update_interval: int | None = 1,
        initial_gradient_steps: int = 1000,
        ent_coef_learning_rate: float = 1e-4,
        ent_coef_betas: tuple[float, float] = (0.5, 0.999),
        encoder_learning_rate: float = 1e-3,
        decoder_learning_rate: float = 1e-3,
        latent_coef: float = 1e-6,
        n_bits: int = 5,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        try:
            super().__init__(
                policy,
                env,
                learning_rate,
                buffer_size,
                learning_starts,
                batch_size,
                tau,
                gamma,
                train_freq,
                gradient_steps,
                action_noise,
                replay_buffer_class,
                replay_buffer_kwargs,
                optimize_memory_usage,
                n_steps,
                ent_coef,
                target_update_interval,
                target_entropy,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                _init_setup_model=False,
            )
        except (AssertionError, ValueError):
            # SB3's messages do not name what is supported here
            if hasattr(self, "action_space"):
                self._check_spaces()
            raise
        # The actor has no state-dependent exploration
        self.policy_kwargs.pop("use_sde", None)
        self.encoder_tau = encoder_tau
        self.actor_update_interval = actor_update_interval
        self.decoder_update_interval = decoder_update_interval
        self.initial_gradient_steps = initial_gradient_steps
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.ent_coef_betas = ent_coef_betas
        self.encoder_learning_rate = encoder_learning_rate
        self.decoder_learning_rate = decoder_learning_rate
        self.latent_coef = latent_coef
        self.n_bits = n_bits
        if _init_setup_model:
            self._setup_model()

    def _check_spaces(self) -> None:
        if not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"{type(self).__name__} supports Box action spaces, but got {self.action_space}.")
        space = self.observation_space
        if not (isinstance(space, spaces.Box) and is_image_space(space) and is_image_space_channels_first(space)):
            raise ValueError(
                f"{type(self).__name__} supports Box observation spaces of images (uint8, height x width x channels), "
                f"but got {space}. sb3_ext.envs.PixelObservation makes images of an environment's renderings."
            )

    def _check_arguments(self) -> None:
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs:
            raise ValueError(f"{type(self).__name__} reconstructs images as they are: use VecNormalize with norm_obs=False.")
        self._check_spaces()
        check_range(self, 0, 1, "tau", "encoder_tau", "gamma")
        intervals = ("target_update_interval", "actor_update_interval", "decoder_update_interval")
        check_range(self, 1, float("inf"), "buffer_size", "batch_size", "n_steps", *intervals)
        learning_rates = ("ent_coef_learning_rate", "encoder_learning_rate", "decoder_learning_rate")
        check_range(self, 0, float("inf"), "initial_gradient_steps", "latent_coef", *learning_rates)
        check_range(self, 1, 8, "n_bits")
        if not isinstance(self.n_bits, (int, np.integer)):
            raise ValueError(f"n_bits must be an integer, but got {self.n_bits!r}.")

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.replay_buffer_class is None:
            self.replay_buffer_class = FrameReplayBuffer
            self.replay_buffer_kwargs = {"n_stack": self._n_stack(), **self.replay_buffer_kwargs}
        with chosen_replay_buffer(self):
            super()._setup_model()
        if self.log_ent_coef is not None:
            self.ent_coef_optimizer = SingleTensorAdam(
                [self.log_ent_coef], lr=self.ent_coef_learning_rate, betas=self.ent_coef_betas, fused=True
            )

    def _n_stack(self) -> int:
        """:return: of how many frames an observation consists, as far as the environment tells"""
        assert self.env is not None
        if is_vecenv_wrapped(self.env, VecFrameStack):
            stack = unwrap_vec_wrapper(self.env, VecFrameStack)
            assert isinstance(stack, VecFrameStack)
            return int(stack.stacked_obs.n_stack)
        # Not by trying: what a process of SubprocVecEnv lacks ends it
        return int(self.env.get_attr("n_stack", indices=0)[0]) if self.env.has_attr("n_stack") else 1

    @without_denormals
    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates.

        :param gradient_steps: Number of updates
        :param batch_size: Transitions in one update
        """
        assert self.replay_buffer is not None
        if self.device.type == "cpu":
            keep_freed_memory()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        if self._n_updates == 0:
            gradient_steps += self.initial_gradient_steps

        records: dict[str, list[th.Tensor]] = {}
        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            for name, value in self._update(replay_data).items():
                records.setdefault(name, []).append(value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, values in records.items():
            mean = th.stack(values).mean().item()
            if not np.isfinite(mean):
                raise ValueError(
                    f"Training diverged: {name} is {mean} after {self.num_timesteps} steps. Try a smaller learning rate."
                )
            self.logger.record(f"train/{name}", mean)

    def _update_learning_rates(self) -> None:
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        update_learning_rate(self.policy.encoder_optimizer, self.encoder_learning_rate)
        update_learning_rate(self.policy.decoder_optimizer, self.decoder_learning_rate)
        if self.ent_coef_optimizer is not None:
            update_learning_rate(self.ent_coef_optimizer, self.ent_coef_learning_rate)

    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        """:return: what to log, scalars from before the update"""
        policy, encoder = self.policy, self.critic.features_extractor
        images = channels_last(replay_data.observations)
        obs, next_obs = policy.preprocess(images), policy.preprocess(channels_last(replay_data.next_observations))
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()
        self._n_updates += 1
        updates_actor = self._n_updates % self.actor_update_interval == 0
        updates_autoencoder = self.decoder_update_interval is not None and self._n_updates % self.decoder_update_interval == 0

        target_q_values = self._target(replay_data, next_obs, ent_coef)
        critic_loss = self._critic_loss(encoder(obs), replay_data.actions, target_q_values)
        _minimize(critic_loss, self.critic.optimizer)
        losses = {"critic_loss": critic_loss, "ent_coef": ent_coef.squeeze()}

        # One pass through the convolutions for all that follows
        if updates_actor or updates_autoencoder:
            with th.set_grad_enabled(updates_autoencoder or policy.actor_trains_convolutions):
                maps = encoder.convolutions(obs)
        if updates_actor:
            actor_loss, log_prob = self._actor_loss(maps, ent_coef)
            _minimize(actor_loss, self.actor.optimizer)
            losses["actor_loss"] = actor_loss
            if self.log_ent_coef is not None and self.ent_coef_optimizer is not None:
                losses["ent_coef_loss"] = self._ent_coef_loss(self.log_ent_coef, log_prob)
                _minimize(losses["ent_coef_loss"], self.ent_coef_optimizer)
            if updates_autoencoder and policy.actor_trains_convolutions:
                maps = encoder.convolutions(obs)
        if updates_autoencoder:
            decoder_loss, latent_loss = self._autoencoder_losses(maps, images)
            loss = decoder_loss + self.latent_coef * latent_loss
            _minimize(loss, policy.encoder_optimizer, policy.decoder_optimizer)
            losses.update(reconstruction_loss=decoder_loss, latent_loss=latent_loss)
        if self._n_updates % self.target_update_interval == 0:
            self._update_targets()
        return {name: value.detach() for name, value in losses.items()}

    @th.no_grad()
    def _target(self, replay_data: ReplayBufferSamples, next_obs: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """
        ``dones`` is set by termination only: a truncated episode goes on in the target.

        :param replay_data: A batch
        :param next_obs: Its next observations, preprocessed
        :param ent_coef: Entropy coefficient
        :return: ``r + discount * (min_i Q_target,i(s', a') - ent_coef log pi(a'|s'))`` with an action of the actor, (batch, 1)
        """
        next_actions, next_log_prob = self.actor.action_log_prob_of_maps(self.actor.features_extractor.convolutions(next_obs))
        next_features = self.critic_target.features_extractor(next_obs)
        next_q_values = self.critic_target.q_values(next_features, next_actions).min(dim=1, keepdim=True).values
        # For n-step returns gamma**n_steps, less where the episode ends before
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        return replay_data.rewards + discounts * (1 - replay_data.dones) * (next_q_values - ent_coef * next_log_prob)

    def _critic_loss(self, features: th.Tensor, actions: th.Tensor, target_q_values: th.Tensor) -> th.Tensor:
        """
        :param features: Latent vectors of the critic, (batch, features_dim)
        :param actions: In [-1, 1], (batch, action_dim)
        :param target_q_values: (batch, 1)
        :return: ``sum_i mean (Q_i(s, a) - target)^2``
        """
        return (self.critic.q_values(features, actions) - target_q_values).square().mean(dim=0).sum()

    def _actor_loss(self, maps: th.Tensor, ent_coef: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param maps: Of the convolutions, (batch, filters, height, width)
        :param ent_coef: Entropy coefficient
        :return: ``mean (ent_coef log pi(a|s) - min_i Q_i(s, a))`` with an action of the actor; and ``log pi(a|s)``, (batch, 1)
        """
        if not self.policy.actor_trains_convolutions:
            maps = maps.detach()
        actions, log_prob = self.actor.action_log_prob_of_maps(maps)
        q_values = self.critic.q_values(self.critic.features_extractor.project(maps), actions)
        return (ent_coef * log_prob - q_values.min(dim=1, keepdim=True).values).mean(), log_prob

    def _ent_coef_loss(self, log_ent_coef: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        """
        :param log_ent_coef: Logarithm of the entropy coefficient, (1,)
        :param log_prob: Of sampled actions, (batch, 1)
        :return: ``-ent_coef * mean (log pi(a|s) + target_entropy)``, whose gradient is for the coefficient only
        """
        return -(log_ent_coef.exp() * (log_prob.detach() + float(self.target_entropy)).mean()).squeeze()

    def _autoencoder_losses(self, maps: th.Tensor, images: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param maps: Of the convolutions, (batch, filters, height, width)
        :param images: What they were made of, uint8, (batch, channels, height, width)
        :return: Mean squared error of the reconstruction, and half the mean squared norm of the latent vectors
        """
        features = self.critic.features_extractor.project(maps)
        loss = reconstruction_loss(self.policy.decoder(features), images, self.n_bits)
        return loss, 0.5 * features.square().sum(dim=1).mean()

    def _update_targets(self) -> None:
        online, target = self.critic, self.critic_target
        encoders = (online.features_extractor.parameters(), target.features_extractor.parameters())
        polyak_update(*encoders, self.encoder_tau)
        polyak_update(online.head_parameters(), target.head_parameters(), self.tau)

    def reconstruct(self, observations: np.ndarray) -> np.ndarray:
        """
        :param observations: Images, uint8, channels first, (n, channels, height, width)
        :return: What the autoencoder makes of them, uint8, of the same shape
        """
        with th.no_grad():
            return to_image(self.policy.reconstruct(th.as_tensor(observations, device=self.device))).cpu().numpy()

    def learn(
        self: SelfSACAE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SACAE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSACAE:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "policy.encoder_optimizer", "policy.decoder_optimizer"], tensors


def _minimize(loss: th.Tensor, *optimizers: th.optim.Optimizer) -> None:
    """
    One step of gradient descent that touches what these optimizers have, and nothing else.

    :param loss: Scalar
    :param optimizers: Of different parameters
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    # Optimizers leave out what is frozen or has no influence
    trained = [param for param in params if param.requires_grad and loss.requires_grad]
    gradients = th.autograd.grad(loss, trained, allow_unused=True) if trained else ()
    for param, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            # Fused Adam on CPU goes through memory without a look at the layout
            param.grad = gradient if gradient.stride() == param.stride() else th.empty_like(param).copy_(gradient)
    for optimizer in optimizers:
        optimizer.step()
