from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update

from sb3_ext.algos.sac_discrete.policies import (
    Actor,
    CnnPolicy,
    Critic,
    MlpPolicy,
    MultiInputPolicy,
    SACDiscretePolicy,
)
from sb3_ext.common.adam import SingleTensorAdam
from sb3_ext.common.arguments import check_range
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.progress import ProgressMixin
from sb3_ext.common.replay_buffer import chosen_replay_buffer
from sb3_ext.common.reward_normalization import RewardNormalizationMixin

SelfSACDiscrete = TypeVar("SelfSACDiscrete", bound="SACDiscrete")


class SACDiscrete(ProgressMixin, RewardNormalizationMixin):
    """
    Soft Actor-Critic for discrete actions (SAC-Discrete): expectations over the actions are sums, not samples.

    Paper: Christodoulou 2019, "Soft Actor-Critic for Discrete Action Settings" (https://arxiv.org/abs/1910.07207). Parameters
    and defaults are those of SB3's ``SAC`` wherever it has them. The documentation lists where we differ.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of all optimizers, > 0; it can be a function of the current progress remaining (from 1
        to 0)
    :param buffer_size: Size of the replay buffer in transitions, >= 1
    :param learning_starts: Steps of the environment, with random actions, before the first update, >= 0
    :param batch_size: Transitions in one update, >= 1
    :param tau: Polyak coefficient of the target critics, in [0, 1]; 1 copies
    :param gamma: Discount factor, in [0, 1]
    :param train_freq: Update after so many steps in each environment; or ``(5, "step")``, ``(2, "episode")``
    :param gradient_steps: Updates after each of these rollouts; -1: as many as steps were taken
    :param replay_buffer_class: Replay buffer class to use (None: chosen by the observation space and ``n_steps``)
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer
    :param optimize_memory_usage: SB3's memory-efficient variant of the replay buffer
    :param n_steps: Steps of the return in the target, >= 1. Rewards count in all of them, entropy only in the last state
    :param ent_coef: Entropy coefficient, >= 0; "auto" learns it, "auto_0.1" from this initial value
    :param target_update_interval: Update the target critics in every so many updates, >= 1
    :param target_entropy: Entropy in nats that the learned coefficient aims at, in [0, log(n_actions)], or "auto"
    :param target_entropy_ratio: What "auto" stands for, as a fraction of the largest entropy, ``log(n_actions)``, in [0, 1]
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if a space is not supported, a number is out of range, or training diverges
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: SACDiscretePolicy
    actor: Actor
    critic: Critic
    critic_target: Critic
    action_space: spaces.Discrete

    def __init__(
        self,
        policy: str | type[SACDiscretePolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        target_entropy_ratio: float = 0.5,
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
                replay_buffer_class=replay_buffer_class,
                replay_buffer_kwargs=replay_buffer_kwargs,
                optimize_memory_usage=optimize_memory_usage,
                n_steps=n_steps,
                policy_kwargs=policy_kwargs,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                verbose=verbose,
                device=device,
                support_multi_env=True,
                seed=seed,
                sde_support=False,
            )
        except AssertionError:
            # SB3's message about Box actions without bounds does not name what is supported here
            if hasattr(self, "action_space"):
                self._check_spaces()
            raise
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.target_entropy_ratio = target_entropy_ratio
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef_optimizer: th.optim.Optimizer | None = None
        if _init_setup_model:
            self._setup_model()

    def _check_spaces(self) -> None:
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(f"{type(self).__name__} supports Discrete action spaces, but got {self.action_space}.")

    def _check_arguments(self) -> None:
        self._check_spaces()
        check_range(self, 0, 1, "tau", "gamma", "target_entropy_ratio")
        check_range(self, 1, float("inf"), "buffer_size", "batch_size", "n_steps", "target_update_interval")
        if self.target_entropy != "auto":
            if isinstance(self.target_entropy, str):
                raise ValueError(f'target_entropy must be a number or "auto", but got {self.target_entropy!r}.')
            # Below 0, as for the densities of SB3's SAC, it would mean that the coefficient only falls
            check_range(self, 0, math.log(self.action_space.n), "target_entropy")
        learned, value = self._parse_ent_coef()
        if value < 0 or (learned and value == 0):
            raise ValueError(f'ent_coef must be at least 0, and more than 0 after "auto_", but got {self.ent_coef!r}.')

    def _parse_ent_coef(self) -> tuple[bool, float]:
        """:return: whether the entropy coefficient is learned, and its first value"""
        text = str(self.ent_coef)
        learned = text.startswith("auto")
        try:
            return learned, 1.0 if text == "auto" else float(text.removeprefix("auto_"))
        except ValueError as error:
            raise ValueError(f'ent_coef must be a number, "auto" or "auto_<number>", but got {self.ent_coef!r}.') from error

    def _setup_model(self) -> None:
        self._check_arguments()
        with chosen_replay_buffer(self):
            super()._setup_model()
        # As SB3's SAC
        self.actor, self.critic, self.critic_target = self.policy.actor, self.policy.critic, self.policy.critic_target
        self.batch_norm_stats = get_parameters_by_name(self.policy.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.policy.critic_target, ["running_"])
        learned, value = self._parse_ent_coef()
        if learned:
            self.log_ent_coef = th.full((1,), math.log(value), device=self.device, requires_grad=True)
            self.ent_coef_optimizer = SingleTensorAdam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)
        else:
            self.ent_coef_tensor = th.tensor(value, device=self.device)

    @without_denormals
    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay buffer and do the updates.

        :param gradient_steps: Number of updates
        :param batch_size: Transitions in one update
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self.policy.rebind()
        optimizers = [self.policy.actor_optimizer, self.policy.critic_optimizer, self.ent_coef_optimizer]
        self._update_learning_rate([optimizer for optimizer in optimizers if optimizer is not None])

        records = [
            self._update(self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)) for _ in range(gradient_steps)
        ]
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name in records[0]:
            mean = th.stack([record[name] for record in records]).mean().item()
            if not np.isfinite(mean):
                raise ValueError(
                    f"Training diverged: {name} is {mean} after {self.num_timesteps} steps. Try a smaller learning rate."
                )
            self.logger.record(f"train/{name}", mean)

    @th.no_grad()
    def _update(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        """:return: what to log, scalars from before the update"""
        policy = self.policy
        # Actor and critics have features extractors of the same kind
        replay_data = policy.critic.preprocess_batch(replay_data)
        obs = replay_data.observations
        actions = replay_data.actions.long() - int(self.action_space.start)
        ent_coef = self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.detach().exp()

        actor = policy.actor.heads.evaluate(policy.flat_actor, obs, replay_data.next_observations)
        log_probs, next_log_probs = (logits.log_softmax(dim=1) for (logits,) in (actor.outputs, actor.next_outputs))

        critic = policy.critic.heads.evaluate(policy.flat_critic, obs)
        target_q_values = self._target(replay_data, next_log_probs, ent_coef)
        critic_loss, critic_gradients = self._critic_loss(critic.outputs, actions, target_q_values)
        critic.backward(*critic_gradients)
        policy.flat_critic.step(policy.critic_optimizer)

        q_values = self._min_q_values(policy.critic.heads(obs))
        actor_loss, actor_gradient = self._actor_loss(log_probs, q_values, ent_coef)
        actor.backward(actor_gradient)
        policy.flat_actor.step(policy.actor_optimizer)

        entropy = self._entropy(log_probs)
        losses = {"actor_loss": actor_loss, "critic_loss": critic_loss}
        if self.log_ent_coef is not None and self.ent_coef_optimizer is not None:
            losses["ent_coef_loss"], self.log_ent_coef.grad = self._ent_coef_loss(self.log_ent_coef, entropy)
            self.ent_coef_optimizer.step()

        self._n_updates += 1
        if self._n_updates % self.target_update_interval == 0:
            policy.flat_critic_target.polyak_update(policy.flat_critic, self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        return {**losses, "ent_coef": ent_coef.squeeze(), "entropy": entropy, "q_value": q_values.mean()}

    def _target(self, replay_data: ReplayBufferSamples, next_log_probs: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """
        ``dones`` is set by termination only: a truncated episode goes on in the target.

        :param replay_data: A batch with preprocessed observations
        :param next_log_probs: Of all actions in the next states, (batch, n_actions)
        :param ent_coef: Entropy coefficient
        :return: ``r + discount * sum_a pi(a|s') (min_i Q_target,i(s', a) - ent_coef log pi(a|s'))``, (batch, 1)
        """
        next_q_values = self._min_q_values(self.policy.critic_target.heads(replay_data.next_observations))
        soft_values = next_log_probs.exp() * (next_q_values - ent_coef * next_log_probs)
        # For n-step returns gamma**n_steps, less where the episode ends before
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        return replay_data.rewards + discounts * (1.0 - replay_data.dones) * soft_values.sum(dim=1, keepdim=True)

    @staticmethod
    def _min_q_values(q_values: list[th.Tensor]) -> th.Tensor:
        """
        :param q_values: Of each critic, (batch, n_actions)
        :return: The smallest for each action, (batch, n_actions)
        """
        smallest, *others = q_values
        for other in others:
            smallest = th.minimum(smallest, other)
        return smallest

    @staticmethod
    def _critic_loss(
        q_values: list[th.Tensor], actions: th.Tensor, target_q_values: th.Tensor
    ) -> tuple[th.Tensor, list[th.Tensor]]:
        """
        :param q_values: Of each critic, (batch, n_actions)
        :param actions: Counted from 0, (batch, 1)
        :param target_q_values: (batch, 1)
        :return: ``0.5 sum_i mean (Q_i(s, a) - target)^2`` and its gradient with respect to each of ``q_values``
        """
        errors = [of_critic.gather(1, actions) - target_q_values for of_critic in q_values]
        loss = 0.5 * th.stack(errors).square().mean(dim=1).sum()
        gradients = [
            th.zeros_like(of_critic).scatter_(1, actions, error / len(actions))
            for of_critic, error in zip(q_values, errors, strict=True)
        ]
        return loss, gradients

    @staticmethod
    def _actor_loss(log_probs: th.Tensor, q_values: th.Tensor, ent_coef: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param log_probs: Of all actions, (batch, n_actions)
        :param q_values: (batch, n_actions)
        :param ent_coef: Entropy coefficient
        :return: ``mean_s sum_a pi(a|s) (ent_coef log pi(a|s) - Q(s, a))`` and its gradient with respect to the logits
        """
        probs, costs = log_probs.exp(), ent_coef * log_probs - q_values
        expected_costs = (probs * costs).sum(dim=1, keepdim=True)
        return expected_costs.mean(), probs * (costs - expected_costs) / len(log_probs)

    @staticmethod
    def _entropy(log_probs: th.Tensor) -> th.Tensor:
        """
        :param log_probs: Of all actions, (batch, n_actions)
        :return: Mean entropy over the batch in nats, a scalar
        """
        return -(log_probs.exp() * log_probs).sum(dim=1).mean()

    def _ent_coef_loss(self, log_ent_coef: th.Tensor, entropy: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param log_ent_coef: Logarithm of the entropy coefficient, (1,)
        :param entropy: Mean entropy over the batch, a scalar
        :return: ``log_ent_coef * (entropy - target_entropy)`` and its gradient with respect to ``log_ent_coef``, (1,)
        """
        gradient = (entropy - self._target_entropy()).reshape(1)
        return (log_ent_coef * gradient).squeeze(), gradient

    def _target_entropy(self) -> float:
        if self.target_entropy == "auto":
            return self.target_entropy_ratio * math.log(self.action_space.n)
        return float(self.target_entropy)

    def learn(
        self: SelfSACDiscrete,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SACDiscrete",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSACDiscrete:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "critic", "critic_target", "batch_norm_stats", "batch_norm_stats_target"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "policy.actor_optimizer", "policy.critic_optimizer"]
        if self.ent_coef_optimizer is None:
            return state_dicts, ["ent_coef_tensor"]
        return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]
