from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from torch.nn import functional as F

from sb3_ext.algos.bcq.policies import (
    BCQPolicy,
    ContinuousBCQPolicy,
    ContinuousCnnPolicy,
    ContinuousMultiInputPolicy,
    DiscreteBCQPolicy,
    DiscreteCnnPolicy,
    DiscreteMultiInputPolicy,
)
from sb3_ext.common.arguments import check_range
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.losses import huber_loss
from sb3_ext.common.offline_algorithm import OfflineAlgorithm
from sb3_ext.offline.layout import Samples

if TYPE_CHECKING:
    from minari import MinariDataset

SelfBCQ = TypeVar("SelfBCQ", bound="BCQ")


class BCQ(OfflineAlgorithm):
    """
    Batch-Constrained deep Q-learning (BCQ): offline RL that only considers actions that the data make likely.

    For ``Box`` actions: Fujimoto et al. 2019, "Off-Policy Deep Reinforcement Learning without Exploration"
    (https://arxiv.org/abs/1812.02900, Algorithm 1). A variational autoencoder proposes actions, a network perturbs them
    slightly, the critics choose. For ``Discrete`` actions: Fujimoto et al. 2019b, "Benchmarking Batch Deep Reinforcement
    Learning Algorithms" (https://arxiv.org/abs/1910.01708, Algorithm 1). An imitation head excludes unlikely actions, a
    double Q-network chooses. Reference code: https://github.com/sfujim/BCQ. The documentation lists where we differ.

    The defaults are those of the first paper; ``hyperparams/bcq.yml`` has settings for Discrete actions and for pixels.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment whose spaces the data must fit (if registered in Gym, can be str)
    :param dataset: A Minari id, a path to a Minari data set folder or to a ``replay_buffer.pkl`` of the zoo, an SB3
        ``ReplayBuffer``, or a ``minari.MinariDataset``
    :param learning_rate: Learning rate of every optimizer, > 0; it can be a function of the current progress
        remaining (from 1 to 0)
    :param batch_size: Number of transitions in one update, >= 1
    :param tau: Polyak coefficient of the target networks, in [0, 1]; 1 copies
    :param gamma: Discount factor, in [0, 1]
    :param target_update_interval: Update the target networks every so many gradient updates, >= 1
    :param min_q_weight: Box only. Weight of the critics' minimum in the target, in [0, 1]; the rest goes to their
        maximum (lambda in the paper)
    :param perturbation_scale: Box only. Largest perturbation of an action, in units of half the action range,
        in [0, 1] (Phi in the paper); 0 switches the perturbation off
    :param n_target_candidates: Box only. Candidate actions in the target, >= 1
    :param n_acting_candidates: Box only. Candidate actions when acting, >= 1. A model that is loaded has as many as before
    :param latent_dim: Box only. Size of the generative model's latent vector, >= 1 (None: twice the number of action
        dimensions)
    :param latent_clip: Box only. Latent samples are clipped to [-latent_clip, latent_clip], >= 0
    :param kl_weight: Box only. Weight of the Kullback-Leibler divergence in the loss of the generative model, >= 0
    :param action_threshold: Discrete only. An action is allowed if the imitation head gives it at least this fraction
        of the probability of the most likely action, in [0, 1]; 0 is plain double Q-learning, 1 is behaviour cloning
    :param logit_penalty: Discrete only. Weight of the mean squared imitation logit in the loss, >= 0
    :param allow_pickle: Consent to unpickle ``dataset``. A pickle can run any code when it is read: use it only for
        files that you made yourself.
    :param optimize_memory_usage: Read the transitions from disk while training, for data larger than memory
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param stats_window_size: Accepted as by every SB3 algorithm; no episodes are run in training
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param _init_setup_model: Whether or not to build the network and read the data at the creation of the instance
    :raises ValueError: if a space is not supported, a number is out of range, or the data cannot be used
        (:class:`sb3_ext.offline.DatasetError`)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ContinuousBCQPolicy,
        "CnnPolicy": ContinuousCnnPolicy,
        "MultiInputPolicy": ContinuousMultiInputPolicy,
    }
    discrete_policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": DiscreteBCQPolicy,
        "CnnPolicy": DiscreteCnnPolicy,
        "MultiInputPolicy": DiscreteMultiInputPolicy,
    }
    policy: BCQPolicy

    def __init__(
        self,
        policy: str | type[BCQPolicy],
        env: GymEnv | str | None,
        dataset: str | pathlib.Path | ReplayBuffer | MinariDataset | None = None,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 100,
        tau: float = 0.005,
        gamma: float = 0.99,
        target_update_interval: int = 1,
        min_q_weight: float = 0.75,
        perturbation_scale: float = 0.05,
        n_target_candidates: int = 10,
        n_acting_candidates: int = 100,
        latent_dim: int | None = None,
        latent_clip: float = 0.5,
        kl_weight: float = 0.5,
        action_threshold: float = 0.3,
        logit_penalty: float = 1e-2,
        allow_pickle: bool = False,
        optimize_memory_usage: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            dataset,
            learning_rate,
            batch_size,
            gamma,
            allow_pickle=allow_pickle,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
        )
        if isinstance(policy, str) and env is not None and isinstance(self.action_space, spaces.Discrete):
            self.policy_class = self.discrete_policy_aliases[policy]
        self.tau = tau
        self.target_update_interval = target_update_interval
        self.min_q_weight = min_q_weight
        self.perturbation_scale = perturbation_scale
        self.n_target_candidates = n_target_candidates
        self.n_acting_candidates = n_acting_candidates
        self.latent_dim = latent_dim
        self.latent_clip = latent_clip
        self.kl_weight = kl_weight
        self.action_threshold = action_threshold
        self.logit_penalty = logit_penalty
        if _init_setup_model:
            self._setup_model()
            self._load_transitions()

    def _setup_model(self) -> None:
        self._check_parameters()
        super()._setup_model()

    def _check_parameters(self) -> None:
        check_range(self, 0, 1, "tau", "min_q_weight", "perturbation_scale", "action_threshold")
        check_range(
            self, 1, float("inf"), "target_update_interval", "n_target_candidates", "n_acting_candidates", "latent_dim"
        )
        check_range(self, 0, float("inf"), "latent_clip", "kl_weight", "logit_penalty")

    def _policy_arguments(self) -> dict[str, Any]:
        if isinstance(self.action_space, spaces.Discrete):
            return {"action_threshold": self.action_threshold}
        return {
            "latent_dim": self.latent_dim,
            "latent_clip": self.latent_clip,
            "perturbation_scale": self.perturbation_scale,
            "n_acting_candidates": self.n_acting_candidates,
        }

    @without_denormals
    def train(self, gradient_steps: int, batch_size: int) -> None:
        assert self.transitions is not None
        # Setting it visits every module; only acting has unset it
        if not self.policy.training:
            self.policy.set_training_mode(True)
        self.policy.rebind()
        self._update_learning_rate([getattr(self.policy, name) for name in self.policy.optimizer_names])
        update = self._discrete_update if isinstance(self.action_space, spaces.Discrete) else self._continuous_update

        for _ in range(gradient_steps):
            update(self.transitions.sample(batch_size, self.batch_generator))
            self._n_updates += 1

    # ---- Box actions (Fujimoto et al. 2019, Algorithm 1) ----

    def _continuous_update(self, replay_data: Samples) -> None:
        policy = cast(ContinuousBCQPolicy, self.policy)
        actions = policy.scale_actions(replay_data.actions)

        vae_loss = self._vae_loss(replay_data.observations, actions)
        policy.flat_vae.minimize(vae_loss, policy.vae_optimizer)

        target_q_values = self._continuous_target(replay_data)
        critic_loss = self._critic_loss(replay_data.observations, actions, target_q_values)
        policy.flat_critic.minimize(critic_loss, policy.critic_optimizer)

        perturbation_loss = self._perturbation_loss(replay_data.observations)
        policy.flat_perturbation.minimize(perturbation_loss, policy.perturbation_optimizer)

        if (self._n_updates + 1) % self.target_update_interval == 0:
            policy.flat_critic_target.polyak_update(policy.flat_critic, self.tau)
            policy.flat_perturbation_target.polyak_update(policy.flat_perturbation, self.tau)
            policy.copy_running_statistics()
        self._record_losses(vae_loss=vae_loss, critic_loss=critic_loss, perturbation_loss=perturbation_loss)

    def _noise(self, n_rows: int) -> th.Tensor:
        """Standard normal noise of the size of the latent vector, (n_rows, latent_dim)."""
        latent_dim = cast(ContinuousBCQPolicy, self.policy).latent_dim
        return th.randn((n_rows, latent_dim), generator=self.generator, device=self.device)

    def _vae_loss(self, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """Reconstruction error and Kullback-Leibler divergence, both as means over batch and dimensions."""
        vae = cast(ContinuousBCQPolicy, self.policy).vae
        features = vae.extract_features(observations, vae.features_extractor)
        mean, log_std = vae.encode(features, actions)
        std = log_std.exp()
        reconstruction = vae.decode(features, mean + std * self._noise(len(actions)))
        kl_divergence = -0.5 * (1.0 + 2.0 * log_std - mean.square() - std.square()).mean()
        return F.mse_loss(reconstruction, actions) + self.kl_weight * kl_divergence

    @th.no_grad()
    def _continuous_target(self, replay_data: Samples) -> th.Tensor:
        """
        Value of the best candidate action in the next state, (batch,).

        ``dones`` is set by termination only: a truncated episode goes on in the target.
        """
        policy = cast(ContinuousBCQPolicy, self.policy)
        batch_size, n_candidates = len(replay_data.rewards), self.n_target_candidates
        next_obs = replay_data.next_observations
        latents = policy.clip_latents(self._noise(batch_size * n_candidates))
        next_actions = policy.candidate_actions(next_obs, latents, policy.perturbation_target, n_candidates)
        critic = policy.critic_target
        features = critic.extract_features(next_obs, critic.features_extractor).repeat_interleave(n_candidates, dim=0)
        q_values = policy.q_values(critic, features, next_actions)  # (n_critics, batch * n_candidates)
        q_min, q_max = q_values.aminmax(dim=0)
        # (batch * n_candidates,) -> (batch, n_candidates) -> (batch,)
        next_q_values = (self.min_q_weight * q_min + (1.0 - self.min_q_weight) * q_max).view(batch_size, n_candidates).amax(1)
        return replay_data.rewards.squeeze(1) + self.gamma * (1.0 - replay_data.dones.squeeze(1)) * next_q_values

    def _critic_loss(self, observations: PyTorchObs, actions: th.Tensor, target_q_values: th.Tensor) -> th.Tensor:
        """Sum over the critics of their mean squared errors."""
        policy = cast(ContinuousBCQPolicy, self.policy)
        features = policy.critic.extract_features(observations, policy.critic.features_extractor)
        return (policy.q_values(policy.critic, features, actions) - target_q_values).square().mean(dim=1).sum()

    def _perturbation_loss(self, observations: PyTorchObs) -> th.Tensor:
        """Deterministic policy gradient through the first critic."""
        policy = cast(ContinuousBCQPolicy, self.policy)
        vae, perturbation, critic = policy.vae, policy.perturbation, policy.critic
        # Neither the generative model nor the critic learns from this loss
        with th.no_grad():
            features = vae.extract_features(observations, vae.features_extractor)
            actions = vae.decode(features, policy.clip_latents(self._noise(len(features))))
            critic_features = critic.extract_features(observations, critic.features_extractor)
        features = perturbation.extract_features(observations, perturbation.features_extractor)
        perturbed_actions = perturbation(features, actions)
        return -critic.q_networks[0](th.cat([critic_features, perturbed_actions], dim=1)).mean()

    # ---- Discrete actions (Fujimoto et al. 2019b, Algorithm 1) ----

    @th.no_grad()
    def _discrete_update(self, replay_data: Samples) -> None:
        policy = cast(DiscreteBCQPolicy, self.policy)
        replay_data = policy.q_net.preprocess_batch(replay_data)
        actions = replay_data.actions - int(self.action_space.start)  # type: ignore[attr-defined]
        online = policy.heads.evaluate(policy.flat, replay_data.observations, replay_data.next_observations)
        q_values, logits = online.outputs
        target_q_values = self._discrete_target(replay_data, *online.next_outputs)
        q_loss, q_gradient = huber_loss(q_values, actions, target_q_values)
        imitation_loss, logits_gradient = self._imitation_loss(logits, actions)
        online.backward(q_gradient, logits_gradient)
        policy.flat.step(policy.optimizer)

        if (self._n_updates + 1) % self.target_update_interval == 0:
            policy.flat_target.polyak_update(policy.flat, self.tau)
            policy.copy_running_statistics()
        self._record_losses(q_loss=q_loss, imitation_loss=imitation_loss)

    def _discrete_target(self, replay_data: Samples, q_values: th.Tensor, logits: th.Tensor) -> th.Tensor:
        """
        The online network chooses among the likely actions, the target network values the choice, (batch, 1).

        ``q_values`` and ``logits``, (batch, n_actions), are the online network's for the next observations, which are
        preprocessed. ``dones`` is set by termination only: a truncated episode goes on in the target.
        """
        policy = cast(DiscreteBCQPolicy, self.policy)
        next_actions = policy.constrained_argmax(q_values, logits)
        next_q_values = policy.q_net_target.q_values(replay_data.next_observations).gather(1, next_actions)
        return replay_data.rewards + self.gamma * (1.0 - replay_data.dones) * next_q_values

    def _imitation_loss(self, logits: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Negative log-likelihood of the data's actions plus a penalty that keeps the logits small, and the gradient for
        ``logits``.
        """
        log_probs = logits.log_softmax(dim=1)
        loss = self.logit_penalty * logits.square().mean() - log_probs.gather(1, actions).mean()
        # Probability minus 1 for the action taken
        gradient = log_probs.exp_().scatter_add_(1, actions, logits.new_full(actions.shape, -1.0)).div_(len(actions))
        return loss, gradient.add_(logits, alpha=2.0 * self.logit_penalty / logits.numel())

    def learn(
        self: SelfBCQ,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "BCQ",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfBCQ:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"policy.{name}" for name in self.policy.optimizer_names)], []
