"""Rollouts for on-policy algorithms with as little work per step as possible."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext.common.actor_critic import actor_network, is_standard
from sb3_ext.common.mlp import suits_numpy
from sb3_ext.common.observations import map_observations

# Most rows that a network gets at once: more would not be faster, and the activations of images take memory
MAX_ROWS = 512

# An array, or one for each key of a Dict space
Observations = Any


class ActorOnlyRollouts(OnPolicyAlgorithm):
    """
    Mixin for on-policy algorithms, to be named before the algorithm, that collects what SB3 collects in less time. Only the
    actor is evaluated while stepping. Values, log-probabilities and what stands for the rewards after a time limit are
    computed at the end, in batches.

    The random numbers are the same and drawn in the same order, so the rollout is SB3's, up to rounding. While stepping,
    callbacks find no ``values``, ``log_probs`` and ``obs_tensor`` among their ``locals``, and must not change the policy.
    SB3's own collector takes over for gSDE, for policies that replace methods of ``ActorCriticPolicy``, and for rollout
    buffers that replace ``add`` or cannot hold what was observed and done.
    """

    #: Whether the value of an episode's last observation is added to its last reward if a time limit ended the episode. If
    #: not, no values are used at all: those in the buffer are 0.
    bootstrap_truncated: ClassVar[bool] = True

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        :param env: The training environment
        :param callback: Called at each step, and at the beginning and end of the rollout
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of steps to take in each environment
        :return: False if the callback ended the rollout prematurely
        """
        assert self._last_obs is not None, "No previous observation was provided"
        if not self._can_evaluate_later(rollout_buffer):
            with nullcontext() if self.bootstrap_truncated else _values_of_zero(self.policy):
                return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

        # Switch to eval mode (this affects batch norm / dropout)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        callback.on_rollout_start()
        act = self._make_act(env.num_envs)
        terminal_observations: dict[tuple[int, int], Observations] = {}
        n_steps = 0

        while n_steps < n_rollout_steps:
            actions = act(self._last_obs)
            clipped_actions = actions
            if isinstance(self.action_space, spaces.Box):
                clipped_actions = actions.clip(self.action_space.low, self.action_space.high)

            new_obs, rewards, dones, infos = env.step(clipped_actions)

            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                self._evaluate(rollout_buffer, n_steps, terminal_observations)
                return False

            self._update_info_buffer(infos, dones)
            if self.bootstrap_truncated:
                for index, (done, info) in enumerate(zip(dones.tolist(), infos, strict=True)):
                    if done and info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
                        # A copy, in case the environment writes the next one in the same place
                        terminal_observations[n_steps, index] = copy.deepcopy(info["terminal_observation"])

            _store(rollout_buffer.observations, n_steps, self._last_obs)
            _store(rollout_buffer.actions, n_steps, actions)
            rollout_buffer.rewards[n_steps] = rewards
            rollout_buffer.episode_starts[n_steps] = self._last_episode_starts
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            n_steps += 1

        self._evaluate(rollout_buffer, n_steps, terminal_observations)
        values = np.zeros(env.num_envs, np.float32)
        if self.bootstrap_truncated:
            values = self._values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
        _compute_returns_and_advantages(rollout_buffer, values, dones)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _can_evaluate_later(self, rollout_buffer: RolloutBuffer) -> bool:
        """:return: Whether SB3's rollout follows from what the buffer will hold at its end"""
        return (
            is_standard(self.policy)
            # gSDE, whose noise the buffer does not hold, is not among them
            and type(self.policy.action_dist) in _DISTRIBUTIONS
            and type(rollout_buffer).add in (RolloutBuffer.add, DictRolloutBuffer.add)
            and _can_hold(rollout_buffer.observations, self._last_obs)
            and (not isinstance(self.action_space, spaces.Box) or np.can_cast(np.float32, rollout_buffer.actions.dtype))
        )

    def _make_act(self, n_envs: int) -> Callable[[Observations], np.ndarray]:
        """
        :param n_envs: Number of environments
        :return: A function that draws actions (n_envs, *action_space.shape) for observations, with the present parameters
        """
        policy, shape = self.policy, (n_envs, *self.action_space.shape)  # type: ignore[misc]
        network = actor_network(policy)
        make_draw = _DISTRIBUTIONS[type(policy.action_dist)]

        if network is None or make_draw is None or not suits_numpy(n_envs, network.weights_and_biases()):

            def act(observations: Observations) -> np.ndarray:
                with th.no_grad():
                    actions = policy.get_distribution(obs_as_tensor(observations, self.device)).get_actions()
                return actions.cpu().numpy().reshape(shape)

            return act

        forward = network.as_numpy()
        n_outputs = len(network.weights_and_biases()[-1])
        draw = make_draw(policy, th.empty(n_envs, n_outputs))

        def act_in_numpy(observations: np.ndarray) -> np.ndarray:
            outputs = forward(observations.astype(np.float32, copy=False).reshape(n_envs, -1))
            if not math.isfinite(outputs.sum()):
                raise ValueError(
                    f"The policy's outputs are {outputs}: an observation is not finite, or training has diverged. Look at "
                    "what the environment returns, or try a smaller learning rate."
                )
            return draw(outputs).reshape(shape)

        return act_in_numpy

    def _evaluate(
        self, rollout_buffer: RolloutBuffer, n_steps: int, terminal_observations: dict[tuple[int, int], Observations]
    ) -> None:
        """
        Complete what the steps have left open.

        :param rollout_buffer: Holds observations, actions, rewards and starts of episodes
        :param n_steps: Number of steps that it holds
        :param terminal_observations: Observations whose values are added to the rewards, by step and environment
        """
        rollout_buffer.pos = n_steps
        rollout_buffer.full = n_steps == rollout_buffer.buffer_size
        steps_at_once = max(MAX_ROWS // rollout_buffer.n_envs, 1)
        for start in range(0, n_steps, steps_at_once):
            self._evaluate_steps(rollout_buffer, slice(start, min(start + steps_at_once, n_steps)))
        places = list(terminal_observations)
        for start in range(0, len(places), MAX_ROWS):
            chunk = places[start : start + MAX_ROWS]
            tensors = [self.policy.obs_to_tensor(terminal_observations[place])[0] for place in chunk]
            values = self._values(map_observations(lambda *parts: th.cat(parts), *tensors))
            rollout_buffer.rewards[tuple(np.transpose(chunk))] += self.gamma * values

    def _evaluate_steps(self, rollout_buffer: RolloutBuffer, steps: slice) -> None:
        def rows(array: np.ndarray) -> th.Tensor:
            return th.as_tensor(array[steps], device=self.device).flatten(end_dim=1)

        observations, actions = map_observations(rows, rollout_buffer.observations), rows(rollout_buffer.actions)
        actions = actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions.float()
        with th.no_grad():
            if self.bootstrap_truncated:
                values, log_probs, _ = self.policy.evaluate_actions(observations, actions)
                rollout_buffer.values[steps] = values.cpu().numpy().reshape(-1, rollout_buffer.n_envs)
            else:
                log_probs = self.policy.get_distribution(observations).log_prob(actions)
        rollout_buffer.log_probs[steps] = log_probs.cpu().numpy().reshape(-1, rollout_buffer.n_envs)

    def _values(self, observations: Any) -> np.ndarray:
        with th.no_grad():
            return self.policy.predict_values(observations).flatten().cpu().numpy()


Draw = Callable[[np.ndarray], np.ndarray]


def _categorical(policy: ActorCriticPolicy, noise: th.Tensor) -> Draw:
    """:return: A function that draws actions for logits, with the random numbers of torch.multinomial"""
    noise_array = noise.numpy()

    def draw(logits: np.ndarray) -> np.ndarray:
        noise.exponential_()
        # The index of the largest p / noise
        return (logits - np.log(noise_array)).argmax(axis=1)

    return draw


def _gaussian(policy: ActorCriticPolicy, noise: th.Tensor) -> Draw:
    """:return: A function that draws actions for means, with the random numbers of torch.distributions.Normal"""
    noise_array, std = noise.numpy(), policy.log_std.detach().exp().numpy()

    def draw(mean: np.ndarray) -> np.ndarray:
        noise.normal_()
        return mean + noise_array * std

    return draw


# Those whose actions and log-probabilities are known to depend on nothing else than observations and parameters, and how to
# draw from them in numpy
_DISTRIBUTIONS: dict[type[Distribution], Callable[[ActorCriticPolicy, th.Tensor], Draw] | None] = {
    CategoricalDistribution: _categorical,
    DiagGaussianDistribution: _gaussian,
    MultiCategoricalDistribution: None,
    BernoulliDistribution: None,
}


def _can_hold(stored: Observations, observations: Observations) -> bool:
    """:return: Whether the buffer's arrays are of a kind that keeps the values of the observations"""
    if isinstance(stored, dict):
        return all(_can_hold(array, observations[key]) for key, array in stored.items())
    return np.can_cast(observations.dtype, stored.dtype, "same_kind")


def _store(stored: Observations, step: int, values: Observations) -> None:
    """Write what all environments gave or got in one step."""
    if isinstance(stored, dict):
        for key, array in stored.items():
            _store(array, step, values[key])
    else:
        # Those of Discrete spaces have a dimension less than the buffer
        stored[step] = values.reshape(stored.shape[1:])


def _compute_returns_and_advantages(buffer: RolloutBuffer, last_values: np.ndarray, dones: np.ndarray) -> None:
    """
    ``RolloutBuffer.compute_returns_and_advantage`` to the last bit, with the recursion reduced to one line.

    :param buffer: Rollout buffer with rewards, values and starts of episodes
    :param last_values: Values of the observations after the last step, (n_envs,)
    :param dones: Whether the last step ended an episode, (n_envs,)
    """
    if type(buffer).compute_returns_and_advantage is not RolloutBuffer.compute_returns_and_advantage:
        buffer.compute_returns_and_advantage(th.as_tensor(last_values), dones)
        return
    continues = 1.0 - np.concatenate([buffer.episode_starts[1:], dones[None]]).astype(np.float32)
    next_values = np.concatenate([buffer.values[1:], last_values[None]])
    deltas = buffer.rewards + buffer.gamma * next_values * continues - buffer.values
    decays = buffer.gamma * buffer.gae_lambda * continues
    advantage = np.zeros_like(last_values)
    for step in reversed(range(len(deltas))):
        advantage = np.add(deltas[step], decays[step] * advantage, out=buffer.advantages[step])
    buffer.returns = buffer.advantages + buffer.values


@contextmanager
def _values_of_zero(policy: ActorCriticPolicy) -> Iterator[None]:
    """Have the policy say that all values are 0, for SB3's collector, which would add them to rewards."""
    predict_values = policy.predict_values
    hook = policy.register_forward_hook(lambda module, args, outputs: (outputs[0], th.zeros_like(outputs[1]), outputs[2]))
    policy.predict_values = lambda obs: th.zeros_like(predict_values(obs))  # type: ignore[method-assign]
    try:
        yield
    finally:
        hook.remove()
        del policy.predict_values
