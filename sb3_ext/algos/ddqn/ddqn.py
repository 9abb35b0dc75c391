from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule
from stable_baselines3.dqn import DQN

from sb3_ext.algos.ddqn.policies import CnnPolicy, DDQNPolicy, MlpPolicy, MultiInputPolicy
from sb3_ext.common.arguments import check_range
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.frame_replay_buffer import FrameReplayBuffer
from sb3_ext.common.losses import huber_loss
from sb3_ext.common.progress import ProgressMixin
from sb3_ext.common.q_network import QNetwork
from sb3_ext.common.replay_buffer import FastReplayBuffer, chosen_replay_buffer, split_batch
from sb3_ext.common.reward_normalization import RewardNormalizationMixin

SelfDDQN = TypeVar("SelfDDQN", bound="DDQN")

# Observations are sampled together up to this size, which the processor's cache holds
_NUMBERS_TOGETHER = 2**16

# Replay buffers that draw each transition of a sample without regard to the others. Not HER's: what it relabels comes last.
_DRAW_INDEPENDENTLY = (FastReplayBuffer, FrameReplayBuffer, ReplayBuffer, NStepReplayBuffer, DictReplayBuffer)


class DDQN(ProgressMixin, RewardNormalizationMixin, DQN):
    """
    Double Deep Q-Network (Double DQN): the online network chooses the next action, the target network values it.

    Paper: van Hasselt, Guez, Silver 2016, "Deep Reinforcement Learning with Double Q-learning"
    (https://arxiv.org/abs/1509.06461). All but ``double_q`` is SB3's ``DQN``, whose defaults these are. The documentation
    lists where we differ.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate, > 0; it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer in transitions, >= 1
    :param learning_starts: Steps of the environment before the first update, >= 0
    :param batch_size: Transitions in one update, >= 1
    :param tau: Polyak coefficient of the target network, in [0, 1]; 1 copies
    :param gamma: Discount factor, in [0, 1]
    :param train_freq: Update after so many steps in each environment; or ``(5, "step")``, ``(2, "episode")``
    :param gradient_steps: Updates after each of these rollouts; -1: as many as steps were taken
    :param replay_buffer_class: Replay buffer class to use (None: chosen by the observation space and ``n_steps``)
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer
    :param optimize_memory_usage: SB3's memory-efficient variant of the replay buffer
    :param n_steps: Steps of the return in the target, >= 1
    :param target_update_interval: Update the target network every so many steps of the environment, >= 1
    :param exploration_fraction: Fraction of the training over which the probability of a random action falls
    :param exploration_initial_eps: Its first value, in [0, 1]
    :param exploration_final_eps: Its last value, in [0, 1]
    :param max_grad_norm: Largest Euclidean norm of the gradient
    :param double_q: Whether the online network chooses the next action; otherwise the target network chooses it, which is DQN
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
    policy: DDQNPolicy
    action_space: spaces.Discrete
    q_net: QNetwork
    q_net_target: QNetwork

    def __init__(
        self,
        policy: str | type[DDQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int = 10000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 10,
        double_q: bool = True,
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
                learning_rate=learning_rate,
                buffer_size=buffer_size,
                learning_starts=learning_starts,
                batch_size=batch_size,
                tau=tau,
                gamma=gamma,
                train_freq=train_freq,
                gradient_steps=gradient_steps,
                replay_buffer_class=replay_buffer_class,
                replay_buffer_kwargs=replay_buffer_kwargs,
                optimize_memory_usage=optimize_memory_usage,
                n_steps=n_steps,
                target_update_interval=target_update_interval,
                exploration_fraction=exploration_fraction,
                exploration_initial_eps=exploration_initial_eps,
                exploration_final_eps=exploration_final_eps,
                max_grad_norm=max_grad_norm,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                _init_setup_model=False,
            )
        except AssertionError as error:
            space = getattr(self, "action_space", None)
            if space is None or isinstance(space, spaces.Discrete):
                raise
            raise ValueError(f"{type(self).__name__} supports Discrete action spaces, but got {space}.") from error
        self.double_q = double_q
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_numbers()
        with chosen_replay_buffer(self):
            super()._setup_model()

    def _check_numbers(self) -> None:
        check_range(self, 0, 1, "tau", "gamma", "exploration_initial_eps", "exploration_final_eps")
        check_range(self, 1, float("inf"), "buffer_size", "batch_size", "n_steps", "target_update_interval")

    @without_denormals
    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Sample the replay buffer and do the updates.

        :param gradient_steps: Number of updates
        :param batch_size: Transitions in one update
        """
        self.policy.set_training_mode(True)
        self.policy.rebind()
        self._update_learning_rate(self.policy.optimizer)
        losses = [self._update(*batch) for batch in self._batches(gradient_steps, batch_size)]
        self._n_updates += gradient_steps
        loss = th.stack(losses).mean().item()
        if not np.isfinite(loss):
            raise ValueError(
                f"Training diverged: the loss is {loss} after {self.num_timesteps} steps. Try a smaller learning rate."
            )
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", loss)

    def _batches(self, n_batches: int, batch_size: int) -> Iterator[tuple[ReplayBufferSamples, th.Tensor]]:
        """
        Between the updates of one call of ``train`` the target network stays as it is. So small batches are sampled, and their
        next states valued by it, many at a time.

        :param n_batches: Number of batches
        :param batch_size: Transitions in each
        :return: Batches with preprocessed observations, each with the target network's values in the next states,
            (batch, n_actions)
        """
        assert self.replay_buffer is not None
        n_together = 1
        if type(self.replay_buffer) in _DRAW_INDEPENDENTLY:
            n_together = max(1, _NUMBERS_TOGETHER // (batch_size * spaces.flatdim(self.observation_space)))
        for n_done in range(0, n_batches, n_together):
            n_transitions = min(n_together, n_batches - n_done) * batch_size
            replay_data = self.replay_buffer.sample(n_transitions, env=self._vec_normalize_env)
            replay_data = self.q_net.preprocess_batch(replay_data)
            with th.no_grad():
                next_q_values = self.q_net_target.q_values(replay_data.next_observations)
            yield from zip(split_batch(replay_data, batch_size), next_q_values.split(batch_size), strict=True)

    @th.no_grad()
    def _update(self, replay_data: ReplayBufferSamples, next_q_values: th.Tensor) -> th.Tensor:
        """
        :param replay_data: A batch with preprocessed observations
        :param next_q_values: The target network's values in the next states, (batch, n_actions)
        :return: the loss before the update, a scalar
        """
        policy, q_net = self.policy, self.policy.q_net
        next_observations = replay_data.next_observations if self.double_q else None
        online = q_net.heads.evaluate(policy.flat, replay_data.observations, next_observations)
        (q_values,), (online_next_q_values,) = online.outputs, online.next_outputs
        target_q_values = self._target(replay_data, online_next_q_values, next_q_values)
        actions = replay_data.actions.long() - int(self.action_space.start)
        loss, gradient = huber_loss(q_values, actions, target_q_values)
        online.backward(gradient)
        policy.flat.step(policy.optimizer, self.max_grad_norm)
        return loss

    def _target(
        self, replay_data: ReplayBufferSamples, online_next_q_values: th.Tensor, next_q_values: th.Tensor
    ) -> th.Tensor:
        """
        ``dones`` is set by termination only: a truncated episode goes on in the target.

        :param replay_data: A batch
        :param online_next_q_values: The online network's values in the next states, (batch, n_actions); not used unless
            ``double_q``
        :param next_q_values: The target network's, (batch, n_actions)
        :return: ``r + discount * Q_target(s', argmax_a Q(s', a))``, (batch, 1)
        """
        chooser = online_next_q_values if self.double_q else next_q_values
        next_q_values = next_q_values.gather(1, chooser.argmax(dim=1, keepdim=True))
        # For n-step returns gamma**n_steps, less where the episode ends before
        discounts = self.gamma if replay_data.discounts is None else replay_data.discounts
        return replay_data.rewards + discounts * (1.0 - replay_data.dones) * next_q_values

    def learn(
        self: SelfDDQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDDQN:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=type(self).__name__ if tb_log_name is None else tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
