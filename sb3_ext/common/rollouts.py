"""On-policy collection that evaluates no more than acting needs while it steps the environments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext.common.actor_critic import actor_network, is_standard

#: Numbers in the observations of one batch of values, so that those of images fit into memory
MAX_BATCH_NUMBERS = 2**24


class ActorOnlyRollouts(OnPolicyAlgorithm):
    """
    Mixin for SB3's on-policy algorithms, to be named before the algorithm in the list of base classes.

    While the environments are stepped, only the actor is evaluated. Values, log-probabilities and the values at time limits
    are computed in batches when the rollout is complete, with the same parameters. Random numbers are drawn in the order in
    which SB3 draws them, so that the rollout is the one that SB3 collects with the same seed, up to rounding. Callbacks find
    no ``values``, ``log_probs`` and ``obs_tensor`` in their ``locals`` while stepping.

    SB3's own collector runs with gSDE, and for policies and rollout buffers that replace the methods concerned.
    """

    #: Whether the value of the last observation stands for the rewards after a time limit. If not, rewards stay as the
    #: environment gave them, and no value is computed.
    bootstrap_truncated: ClassVar[bool] = True

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer with experience of the present policy.

        :param env: The training environment
        :param callback: Called at each step, and at the beginning and end of the rollout
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Steps in each environment
        :return: Whether all steps were collected; False if the callback stopped
        """
        has_known_buffer = type(rollout_buffer).add in (RolloutBuffer.add, DictRolloutBuffer.add)
        if self.use_sde or not is_standard(self.policy) or not has_known_buffer:
            return self._collect_with_sb3(env, callback, rollout_buffer, n_rollout_steps)

        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        act = self._make_actor()
        truncations: list[tuple[int, int, Any]] = []
        callback.on_rollout_start()

        for n_steps in range(n_rollout_steps):
            actions = act(self._last_obs)
            clipped_actions = actions
            if isinstance(self.action_space, spaces.Box):
                clipped_actions = np.clip(actions, self.action_space.low, self.action_space.high)
            new_obs, rewards, dones, infos = env.step(clipped_actions)

            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)

            _store(rollout_buffer.observations, n_steps, self._last_obs)
            rollout_buffer.actions[n_steps] = actions.reshape(env.num_envs, -1)
            rollout_buffer.rewards[n_steps] = rewards
            rollout_buffer.episode_starts[n_steps] = self._last_episode_starts
            if dones.any():
                truncations += [(n_steps, index, obs) for index, obs in _truncated(dones, infos)]
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        rollout_buffer.pos = n_rollout_steps
        rollout_buffer.full = n_rollout_steps == rollout_buffer.buffer_size
        with th.no_grad():
            values = self._evaluate_rollout(rollout_buffer, truncations, new_obs)
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _collect_with_sb3(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        gamma = self.gamma
        # At a time limit, SB3 adds the value times this to the reward, and uses it for nothing else
        self.gamma = gamma if self.bootstrap_truncated else 0.0
        try:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        finally:
            self.gamma = gamma

    def _make_actor(self) -> Callable[[Any], np.ndarray]:
        """:return: A function that draws the actions (n_envs, ...) for observations, until the parameters change"""
        network = actor_network(self.policy)
        draw = _DRAW.get(type(self.policy.action_dist))
        if network is not None and draw is not None and self.device.type == "cpu":
            return draw(network.as_numpy(), self.policy)

        def act(obs: Any) -> np.ndarray:
            with th.no_grad():
                actions = self.policy.get_distribution(obs_as_tensor(obs, self.device)).get_actions()
            return actions.reshape((-1, *self.action_space.shape)).cpu().numpy()  # type: ignore[misc]

        return act

    def _evaluate_rollout(
        self, rollout_buffer: RolloutBuffer, truncations: list[tuple[int, int, Any]], last_obs: Any
    ) -> th.Tensor:
        """
        Add what the actor did not need: values, log-probabilities, and the values at time limits to the rewards.

        :param rollout_buffer: With observations, actions and rewards
        :param truncations: Step, environment and last observation of the episodes that a time limit ended
        :param last_obs: Observations after the last step
        :return: Their values, (n_envs, 1)
        """
        shape = rollout_buffer.values.shape
        values, log_probs = rollout_buffer.values.reshape(-1), rollout_buffer.log_probs.reshape(-1)
        actions = rollout_buffer.actions.reshape(len(values), -1)
        for rows, obs in _batches(_flat(rollout_buffer.observations)):
            batch_actions = th.as_tensor(actions[rows], device=self.device)
            is_discrete = isinstance(self.action_space, spaces.Discrete)
            batch_actions = batch_actions.long().flatten() if is_discrete else batch_actions.float()
            batch_obs = obs_as_tensor(obs, self.device)
            if self.bootstrap_truncated:
                batch_values, batch_log_probs, _ = self.policy.evaluate_actions(batch_obs, batch_actions)
                values[rows] = batch_values.flatten().cpu().numpy()
            else:
                batch_log_probs = self.policy.get_distribution(batch_obs).log_prob(batch_actions)
            log_probs[rows] = batch_log_probs.cpu().numpy()
        rollout_buffer.values, rollout_buffer.log_probs = values.reshape(shape), log_probs.reshape(shape)

        if not self.bootstrap_truncated:
            return th.zeros(shape[1], 1)
        if truncations:
            steps, indices, observations = zip(*truncations, strict=True)
            rollout_buffer.rewards[steps, indices] += self.gamma * self._predict_values(_stack(observations))
        return self.policy.predict_values(obs_as_tensor(last_obs, self.device))

    def _predict_values(self, observations: Any) -> np.ndarray:
        """:return: (n_observations,)"""
        return np.concatenate(
            [
                self.policy.predict_values(obs_as_tensor(obs, self.device)).flatten().cpu().numpy()
                for _, obs in _batches(observations)
            ]
        )


def _gaussian_actor(network: Callable[[np.ndarray], np.ndarray], policy: ActorCriticPolicy) -> Callable[[Any], np.ndarray]:
    std = policy.log_std.detach().exp().numpy()
    shape = policy.action_space.shape

    def act(obs: np.ndarray) -> np.ndarray:
        mean = network(np.asarray(obs, np.float32).reshape(len(obs), -1))
        return (mean + th.randn(mean.shape).numpy() * std).reshape(len(obs), *shape)

    return act


def _categorical_actor(network: Callable[[np.ndarray], np.ndarray], policy: ActorCriticPolicy) -> Callable[[Any], np.ndarray]:
    def act(obs: np.ndarray) -> np.ndarray:
        logits = network(np.asarray(obs, np.float32).reshape(len(obs), -1))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        # What torch.multinomial does for one sample: whose exponential clock, with its probability as rate, rings first
        return (weights / th.empty(weights.shape).exponential_().numpy()).argmax(1)

    return act


_DRAW = {DiagGaussianDistribution: _gaussian_actor, CategoricalDistribution: _categorical_actor}


def _truncated(dones: np.ndarray, infos: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """Index and last observation of the environments whose episode a time limit has ended."""
    for index in np.flatnonzero(dones):
        obs = infos[index].get("terminal_observation")
        if obs is not None and infos[index].get("TimeLimit.truncated", False):
            yield index, obs


# Observations are arrays, or dictionaries of arrays


def _store(target: Any, step: int, obs: Any) -> None:
    if isinstance(target, dict):
        for key, array in target.items():
            _store(array, step, obs[key])
    else:
        # Those of Discrete spaces have an axis less than the buffer
        target[step] = np.reshape(obs, target.shape[1:])


def _flat(observations: Any) -> Any:
    """(n_steps, n_envs, ...) as (n_steps * n_envs, ...)"""
    if isinstance(observations, dict):
        return {key: _flat(array) for key, array in observations.items()}
    return observations.reshape(-1, *observations.shape[2:])


def _stack(observations: tuple[Any, ...]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def _batches(observations: Any) -> Iterator[tuple[slice, Any]]:
    """Rows in batches that fit into memory."""
    arrays = list(observations.values()) if isinstance(observations, dict) else [observations]
    n_rows = len(arrays[0])
    size = max(1, MAX_BATCH_NUMBERS * n_rows // max(1, sum(array.size for array in arrays)))
    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        if isinstance(observations, dict):
            yield rows, {key: array[rows] for key, array in observations.items()}
        else:
            yield rows, observations[rows]
