from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, RolloutReturn, Schedule
from stable_baselines3.common.utils import (
    FloatSchedule,
    LinearSchedule,
    get_parameters_by_name,
    obs_as_tensor,
    polyak_update,
    update_learning_rate,
)
from stable_baselines3.her import HerReplayBuffer
from torch.nn import functional as F

from sb3_ext.algos.option_critic.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, OptionCriticPolicy, Outputs, Step
from sb3_ext.algos.option_critic.statistics import OptionStatistics
from sb3_ext.common.arguments import check_range
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.flat_parameters import backward
from sb3_ext.common.losses import clipped_surrogate_loss, standardized
from sb3_ext.common.observations import map_observations
from sb3_ext.common.progress import ProgressMixin
from sb3_ext.common.replay_buffer import default_replay_buffer_class
from sb3_ext.common.reward_normalization import RewardNormalizationMixin

SelfOptionCritic = TypeVar("SelfOptionCritic", bound="OptionCritic")


class Transitions(NamedTuple):
    """
    Transitions as they were made.

    :param observations: (batch, ...)
    :param options: In force, counted from 0, (batch, 1)
    :param actions: As drawn by the option, Discrete ones counted from 0, (batch, action_dim), or (batch, 1)
    :param rewards: (batch, 1)
    :param next_observations: (batch, ...)
    :param dones: 1 where the next state is terminal; a time limit is not terminal, (batch, 1)
    :param ends: 1 where the episode ends, at a time limit, too, (batch, 1)
    """

    observations: Any
    options: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    next_observations: Any
    dones: th.Tensor
    ends: th.Tensor


class OptionCritic(ProgressMixin, RewardNormalizationMixin):
    """
    Option-Critic: learns the policies of options and when they end, together with their values.

    Paper: Bacon, Harb, Precup 2017, "The Option-Critic Architecture" (https://arxiv.org/abs/1609.05140). The values of the
    options are learned from replayed transitions with target networks; how options act and end is learned from the transitions
    of the latest rollout. The documentation lists where we differ.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the values and the shared layers, > 0; it can be a function of the current progress
        remaining (from 1 to 0)
    :param buffer_size: Size of the replay buffer in transitions, >= 1
    :param learning_starts: Steps of the environment before the first update, >= 0
    :param batch_size: Transitions in one update of the values, >= 1
    :param tau: Polyak coefficient of the target network, in [0, 1]; 1 copies
    :param gamma: Discount factor, in [0, 1]
    :param train_freq: Update after so many steps in each environment; or ``(5, "step")``, ``(2, "episode")``
    :param gradient_steps: Updates of the values after each of these rollouts; -1: as many as steps were taken. With the last
        one, the options' policies and terminations take a step on the rollout.
    :param replay_buffer_class: Replay buffer class to use (None: chosen by the observation space). It holds options in the
        place of actions.
    :param replay_buffer_kwargs: Keyword arguments of the replay buffer
    :param optimize_memory_usage: SB3's memory-efficient variant of the replay buffer
    :param n_options: Number of options, >= 1
    :param actor_learning_rate: Learning rate of the options' policies, or a schedule (None: ``learning_rate``)
    :param termination_learning_rate: Learning rate of the terminations, or a schedule (None: ``learning_rate``)
    :param termination_regularization: Deliberation cost: how much better another option must be for the present one to end,
        >= 0. Larger values give longer options.
    :param gae_lambda: Trade-off of bias and variance in the advantages of the options' policies, in [0, 1]. At 0, as in the
        paper, an action is judged by one step; above, also by those of the rollout that follow
    :param normalize_advantage: Whether to standardize the advantages of each rollout, if it has two or more transitions
    :param n_epochs: Steps of the options' policies on each rollout, >= 1. From the second on, they have the clipped objective
        of PPO, and leave the shared layers alone.
    :param clip_range: How far from 1 the ratio of new to old probabilities counts in it, >= 0, or a schedule
    :param ent_coef: Weight of the entropy of the options' policies, >= 0, or a schedule
    :param detach_heads: Whether the shared layers learn from the values only; otherwise policies and terminations train them,
        too
    :param target_update_interval: Update the target network every so many steps of the environment, >= 1
    :param exploration_fraction: Fraction of the training over which the probability of a random option falls, in [0, 1]
    :param exploration_initial_eps: Its first value, in [0, 1]
    :param exploration_final_eps: Its last value, in [0, 1]
    :param max_grad_norm: Largest Euclidean norm of each gradient (None: no limit)
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
    policy: OptionCriticPolicy

    def __init__(
        self,
        policy: str | type[OptionCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 7e-4,
        buffer_size: int = 100_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_options: int = 4,
        actor_learning_rate: float | Schedule | None = None,
        termination_learning_rate: float | Schedule | None = None,
        termination_regularization: float = 0.01,
        gae_lambda: float = 0.0,
        normalize_advantage: bool = False,
        n_epochs: int = 1,
        clip_range: float | Schedule = 0.2,
        ent_coef: float | Schedule = 0.01,
        detach_heads: bool = True,
        target_update_interval: int = 200,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float | None = 10,
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
                policy_kwargs=policy_kwargs,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                verbose=verbose,
                device=device,
                support_multi_env=True,
                seed=seed,
                sde_support=False,
            )
        except AssertionError as error:
            space = getattr(self, "action_space", None)
            if not isinstance(space, spaces.Box) or np.isfinite([space.low, space.high]).all():
                raise
            raise ValueError(
                f"{type(self).__name__} supports Box action spaces with finite bounds, but got {space}."
            ) from error
        self.n_options = n_options
        self.actor_learning_rate = actor_learning_rate
        self.termination_learning_rate = termination_learning_rate
        self.termination_regularization = termination_regularization
        self.gae_lambda = gae_lambda
        self.normalize_advantage = normalize_advantage
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.ent_coef = ent_coef
        self.detach_heads = detach_heads
        self.target_update_interval = target_update_interval
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.max_grad_norm = max_grad_norm
        self.exploration_rate = exploration_initial_eps
        self._n_calls = 0
        self._rollout: list[tuple[Any, ...]] = []
        self._options = np.zeros(0, np.int64)
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        if not isinstance(self.action_space, (spaces.Box, spaces.Discrete)):
            raise ValueError(f"{type(self).__name__} supports Box and Discrete action spaces, but got {self.action_space}.")
        check_range(self, 0, 1, "tau", "gamma", "gae_lambda")
        check_range(self, 0, 1, "exploration_fraction", "exploration_initial_eps", "exploration_final_eps")
        check_range(self, 1, float("inf"), "buffer_size", "batch_size", "n_options", "n_epochs", "target_update_interval")
        check_range(self, 0, float("inf"), "termination_regularization", "max_grad_norm")
        schedules = ("ent_coef", "clip_range", "actor_learning_rate", "termination_learning_rate")
        check_range(self, 0, float("inf"), *(name for name in schedules if not callable(getattr(self, name))))

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.replay_buffer_class is None:
            self.replay_buffer_class = default_replay_buffer_class(self.observation_space, n_steps=1) or DictReplayBuffer
        if issubclass(self.replay_buffer_class, HerReplayBuffer):
            raise ValueError(
                f"{type(self).__name__} does not support HerReplayBuffer: options learn to act from the goals of the rollout."
            )
        if self.replay_buffer is None:
            # All that learns from it are the values of the options
            self.replay_buffer = self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                spaces.Discrete(self.n_options),
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **self.replay_buffer_kwargs,
            )
        n_steps = getattr(self.replay_buffer, "n_steps", 1)
        if n_steps > 1:
            raise ValueError(
                f"{type(self).__name__} supports replay buffers with n_steps=1, since options can end after each step, "
                f"but got n_steps={n_steps}."
            )
        if self.policy_kwargs.get("n_options", self.n_options) != self.n_options:
            raise ValueError(f"Give n_options to {type(self).__name__}, not in policy_kwargs: {self.policy_kwargs}.")
        given, self.policy_kwargs = self.policy_kwargs, {**self.policy_kwargs, "n_options": self.n_options}
        super()._setup_model()
        self.policy_kwargs = given
        self.batch_norm_stats = get_parameters_by_name(self.policy.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.policy.critic_target, ["running_"])
        self.exploration_schedule = LinearSchedule(
            self.exploration_initial_eps, self.exploration_final_eps, self.exploration_fraction
        )
        self._statistics = OptionStatistics(self.n_options, self.n_envs, self._stats_window_size)
        # Those of a loaded model may go on
        if len(self._options) != self.n_envs:
            self._options = np.zeros(self.n_envs, np.int64)

    # ---- Acting ----

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        self._rollout = []
        # The parameters stay as they are until its end
        self._outputs = self.policy.outputs_in_numpy(self.n_envs) or self._outputs_in_torch
        return super().collect_rollouts(*args, **kwargs)

    def _outputs_in_torch(self, obs: Any) -> Outputs:
        return self.policy.outputs(obs_as_tensor(obs, self.device))

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """:return: actions for the environments, and the options for the replay buffer, (n_envs, 1)"""
        assert self._last_obs is not None and self._last_episode_starts is not None
        is_start = np.asarray(self._last_episode_starts)
        obs: Any = self._last_obs
        outputs = self._outputs(obs)
        self._step: Step = self.policy.decide(outputs, self._options, is_start, False, self.exploration_rate)
        self._options = self._step.options
        self._statistics.add(self._options, self._step.is_chosen, self._step.terminations, is_start)
        actions = self.policy.to_env(self._step.actions)
        if isinstance(self.action_space, spaces.Box):
            actions = self.policy.unscale_action(actions.reshape(-1, *self.action_space.shape))
        return actions, self._options.reshape(-1, 1)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        is_terminal = dones & ~np.array([info.get("TimeLimit.truncated", False) for info in infos])
        next_obs = _with_last_observations(new_obs, dones, infos)
        rewards, terminals, ends = (column.astype(np.float32)[:, None] for column in (reward, is_terminal, dones))
        self._rollout.append((self._last_obs, buffer_action, self._step.actions, rewards, next_obs, terminals, ends))
        self._last_episode_starts = dones
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _on_step(self) -> None:
        self._n_calls += 1
        # As SB3's DQN: steps are counted over all environments
        if self._n_calls % max(self.target_update_interval // self.n_envs, 1) == 0:
            polyak_update(self.policy.critic.parameters(), self.policy.critic_target.parameters(), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    # ---- Learning ----

    @without_denormals
    def train(self, gradient_steps: int, batch_size: int = 32) -> None:
        """
        Update the values on replayed transitions and, with the last update, policies and terminations on the rollout.

        :param gradient_steps: Number of updates of the values
        :param batch_size: Transitions in each of them
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self.policy.rebind()
        self._update_learning_rates()
        critic_losses = [self._update_values(self._sample(batch_size)) for _ in range(gradient_steps - 1)]
        # A model that has been loaded with its replay buffer has no rollout yet
        if self._rollout:
            losses = self._update_all(self._sample(batch_size), self._latest_rollout())
        else:
            losses = {"critic_loss": self._update_values(self._sample(batch_size))}

        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/ent_coef", self._now(self.ent_coef))
        losses["critic_loss"] = th.stack([*critic_losses, losses["critic_loss"]]).mean()
        for name, loss in losses.items():
            value = loss.item()
            if not np.isfinite(value):
                raise ValueError(
                    f"Training diverged: {name} is {value} after {self.num_timesteps} steps. Try a smaller learning rate."
                )
            self.logger.record(f"train/{name}", value)

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self.policy.critic_optimizer)
        for name in ("actor", "termination"):
            learning_rate = getattr(self, f"{name}_learning_rate")
            now = self._now(self.lr_schedule if learning_rate is None else learning_rate)
            update_learning_rate(getattr(self.policy, f"{name}_optimizer"), now)

    def _sample(self, batch_size: int) -> ReplayBufferSamples:
        assert self.replay_buffer is not None
        return self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)

    def _latest_rollout(self) -> Transitions:
        """:return: all transitions of the rollout in one batch, those of one step together, on the device"""

        def concatenate(*arrays: np.ndarray) -> np.ndarray:
            # Discrete observations, to which replay buffers give a dimension, those of a Dict space in place
            return np.concatenate([array[:, None] if array.ndim == 1 else array for array in arrays])

        columns: Any = (
            obs_as_tensor(map_observations(concatenate, *column), self.device) for column in zip(*self._rollout, strict=True)
        )
        return Transitions(*columns)

    def _update_values(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """:return: the loss before the update"""
        _, next_values, terminations = self._evaluate_next(replay_data.next_observations)
        options = replay_data.actions
        target_values = self._target(options, replay_data.rewards, replay_data.dones, next_values, terminations)
        loss = self._critic_loss(replay_data.observations, options, target_values)
        self.policy.flat_critic.minimize(loss, self.policy.critic_optimizer, self.max_grad_norm)
        return loss.detach()

    def _update_all(self, replay_data: ReplayBufferSamples, rollout: Transitions) -> dict[str, th.Tensor]:
        """:return: the losses before the update, and the entropy of the policies"""
        policy, n_replayed = self.policy, len(replay_data.rewards)
        # The next states of both in one pass: with small networks it is the calls that take time
        next_hidden, next_values, terminations = self._evaluate_next(
            map_observations(lambda *batches: th.cat(batches), replay_data.next_observations, rollout.next_observations)
        )
        target_values = self._target(
            th.cat([replay_data.actions, rollout.options]),
            th.cat([replay_data.rewards, rollout.rewards]),
            th.cat([replay_data.dones, rollout.dones]),
            next_values,
            terminations,
        )
        critic_loss = self._critic_loss(replay_data.observations, replay_data.actions, target_values[:n_replayed])
        with th.set_grad_enabled(not self.detach_heads):
            hidden = policy.critic.hidden(rollout.observations)
            next_hidden = next_hidden[n_replayed:] if self.detach_heads else policy.critic.hidden(rollout.next_observations)
        advantages = self._advantages(rollout, hidden, target_values[n_replayed:])
        actor_loss, log_probs, entropy = self._actor_loss(rollout, hidden, advantages)
        termination_loss = self._termination_loss(rollout, next_hidden)

        # Each of the heads has a part in a single loss only, and the shared layers in all of them, unless detached
        total = critic_loss + actor_loss + termination_loss
        backward(total, policy.flat_actor, policy.flat_termination, policy.flat_critic)
        policy.flat_actor.step(policy.actor_optimizer, self.max_grad_norm)
        policy.flat_termination.step(policy.termination_optimizer, self.max_grad_norm)
        policy.flat_critic.step(policy.critic_optimizer, self.max_grad_norm)
        if self.n_epochs > 1:
            self._go_on_improving(rollout, advantages, log_probs.detach())
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "termination_loss": termination_loss}
        return {**{name: loss.detach() for name, loss in losses.items()}, "entropy": entropy}

    @th.no_grad()
    def _evaluate_next(self, next_observations: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param next_observations: (batch, ...)
        :return: What the heads see there, (batch, hidden_dim); values of the options by the target network, and their
            termination probabilities, (batch, n_options) each
        """
        hidden = self.policy.critic.hidden(next_observations)
        return hidden, self.policy.critic_target(next_observations), self.policy.terminations(hidden)

    def _target(
        self,
        options: th.Tensor,
        rewards: th.Tensor,
        dones: th.Tensor,
        next_values: th.Tensor,
        terminations: th.Tensor,
    ) -> th.Tensor:
        """
        ``dones`` is set by termination only: a truncated episode goes on in the target.

        :param options: In force, (batch, 1)
        :param rewards: (batch, 1)
        :param dones: (batch, 1)
        :param next_values: Of all options in the next states, (batch, n_options)
        :param terminations: Of all options in the next states, (batch, n_options)
        :return: ``r + gamma U(option, s')``, where U is the value of arriving in s' with the option: it goes on or ends there
            (Bacon et al. 2017, equation 3), (batch, 1)
        """
        termination = terminations.gather(1, options)
        if_it_goes_on, if_it_ends = next_values.gather(1, options), next_values.amax(dim=1, keepdim=True)
        arrival_values = (1.0 - termination) * if_it_goes_on + termination * if_it_ends
        return rewards + self.gamma * (1.0 - dones) * arrival_values

    def _critic_loss(self, observations: Any, options: th.Tensor, target_values: th.Tensor) -> th.Tensor:
        """
        :param observations: (batch, ...)
        :param options: In force, (batch, 1)
        :param target_values: (batch, 1)
        :return: Half the mean squared error of the options' values. No Huber loss: options act at random, and values are
            means, not medians, of what follows.
        """
        return 0.5 * F.mse_loss(self.policy.critic(observations).gather(1, options), target_values)

    def _actor_loss(
        self, rollout: Transitions, hidden: th.Tensor, advantages: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Intra-option policy gradient (Bacon et al. 2017, theorem 1) with the option's value as baseline. Actions are constants.

        :param rollout: The latest transitions
        :param hidden: What the heads see, (batch, hidden_dim)
        :param advantages: (batch,)
        :return: Loss, logarithms of the actions' probabilities or densities, (batch,), and mean entropy of the policies
        """
        log_probs, entropies = self.policy.evaluate_options(hidden, rollout.options.squeeze(1), rollout.actions)
        entropy = entropies.mean()
        loss = -(log_probs * advantages).mean() - self._now(self.ent_coef) * entropy
        return loss, log_probs, entropy.detach()

    def _go_on_improving(self, rollout: Transitions, advantages: th.Tensor, old_log_probs: th.Tensor) -> None:
        """
        The steps of the options' policies on this rollout after the first one, within the clipping range around what they were
        before it (Klissarov et al. 2017, "Learnings Options End-to-End for Continuous Action Tasks",
        https://arxiv.org/abs/1712.00004).

        :param rollout: The latest transitions
        :param advantages: (batch,)
        :param old_log_probs: Logarithms of the actions' probabilities or densities before the first step, (batch,)
        """
        clip_range, ent_coef = self._now(self.clip_range), self._now(self.ent_coef)
        with th.no_grad():
            hidden = self.policy.critic.hidden(rollout.observations)
        for _ in range(self.n_epochs - 1):
            log_probs, entropies = self.policy.evaluate_options(hidden, rollout.options.squeeze(1), rollout.actions)
            loss = clipped_surrogate_loss(log_probs, old_log_probs, advantages, clip_range)
            loss -= ent_coef * entropies.mean()
            self.policy.flat_actor.minimize(loss, self.policy.actor_optimizer, self.max_grad_norm)

    def _now(self, schedule: float | Schedule) -> float:
        """:return: its value at this point of the training"""
        return FloatSchedule(schedule)(self._current_progress_remaining)

    @th.no_grad()
    def _advantages(self, rollout: Transitions, hidden: th.Tensor, target_values: th.Tensor) -> th.Tensor:
        """
        Generalized advantage estimation (Schulman et al. 2016, equation 16) for pairs of state and option. What follows is
        that of the options which came into force, until the episode or the rollout ends.

        :param rollout: The latest transitions
        :param hidden: What the heads see, (batch, hidden_dim)
        :param target_values: (batch, 1)
        :return: How much better the actions were than the option's policy in that state, (batch,)
        """
        advantages = target_values - self.policy.critic.values(hidden).gather(1, rollout.options)
        if self.gae_lambda > 0.0:
            by_step = advantages.view(-1, self.n_envs)
            decays = self.gamma * self.gae_lambda * (1.0 - rollout.ends).view(-1, self.n_envs)
            for step in reversed(range(len(by_step) - 1)):
                by_step[step] += decays[step] * by_step[step + 1]
        is_standardized = self.normalize_advantage and len(advantages) > 1
        return standardized(advantages.squeeze(1)) if is_standardized else advantages.squeeze(1)

    def _termination_loss(self, rollout: Transitions, next_hidden: th.Tensor) -> th.Tensor:
        """
        Termination gradient (Bacon et al. 2017, theorem 2): in the next state, for the option that was in force.

        :param rollout: The latest transitions
        :param next_hidden: What the heads see in the next states, (batch, hidden_dim)
        :return: Mean of the termination probabilities, weighted by how much better the option is than the best one, plus the
            deliberation cost; terminal states do not count
        """
        with th.no_grad():
            next_values = self.policy.critic.values(next_hidden)
            advantages = next_values.gather(1, rollout.options) - next_values.amax(dim=1, keepdim=True)
        terminations = self.policy.terminations(next_hidden).gather(1, rollout.options)
        return (terminations * (advantages + self.termination_regularization) * (1.0 - rollout.dones)).mean()

    # ---- The rest of SB3's contract ----

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps:
            self._statistics = OptionStatistics(self.n_options, self.n_envs, self._stats_window_size)
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def learn(
        self: SelfOptionCritic,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "OptionCritic",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOptionCritic:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def dump_logs(self) -> None:
        for name, value in self._statistics.summary().items():
            self.logger.record(f"options/{name}", value)
        collapse = self._statistics.collapse()
        if collapse is not None and self.num_timesteps > self.learning_starts:
            # Python shows the same warning once
            warnings.warn(f"The options have collapsed: {collapse}.", stacklevel=2)
        super().dump_logs()

    def _excluded_save_params(self) -> list[str]:
        own = ["batch_norm_stats", "batch_norm_stats_target", "_rollout", "_outputs", "_step", "_statistics"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"policy.{name}_optimizer" for name in ("critic", "actor", "termination"))], []


def _with_last_observations(new_obs: Any, dones: np.ndarray, infos: list[dict[str, Any]]) -> Any:
    """:return: the observations, where an episode has ended its last one instead of the first one of the next episode"""
    ended = [index for index in np.flatnonzero(dones) if infos[index].get("terminal_observation") is not None]
    next_obs = deepcopy(new_obs) if ended else new_obs
    for index in ended:
        last = infos[index]["terminal_observation"]
        if isinstance(next_obs, dict):
            for key in next_obs:
                next_obs[key][index] = last[key]
        else:
            next_obs[index] = last
    return next_obs
