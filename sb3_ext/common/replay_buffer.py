"""SB3's replay buffer with less work in each sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize


class FastReplayBuffer(ReplayBuffer):
    """
    SB3's ``ReplayBuffer``, with the same contents and the same samples. Rows are gathered by one index instead of two, and not
    copied a second time on the way to torch.

    :param args: As of SB3's ``ReplayBuffer``
    :param kwargs: As of SB3's ``ReplayBuffer``
    """

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        env_indices = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        rows = batch_inds * self.n_envs + env_indices
        if self.optimize_memory_usage:
            next_rows = (batch_inds + 1) % self.buffer_size * self.n_envs + env_indices
            next_obs = take_rows(self.observations, next_rows)
        else:
            next_obs = take_rows(self.next_observations, rows)
        column = rows[:, None]
        data: tuple[Any, ...] = (
            self._normalize_obs(take_rows(self.observations, rows), env),
            take_rows(self.actions, rows),
            self._normalize_obs(next_obs, env),
            # Only terminations, unless SB3 was told not to tell them from time limits
            self.dones.take(column) * (1 - self.timeouts.take(column)),
            self._normalize_reward(self.rewards.take(column), env),
        )
        return ReplayBufferSamples(*(self.to_torch(array, copy=False) for array in data))


def take_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """
    :param array: (buffer_size, n_envs, ...)
    :param rows: Steps times ``n_envs`` plus environments
    :return: A copy of these rows
    """
    return array.reshape(-1, *array.shape[2:]).take(rows, axis=0)


def default_replay_buffer_class(observation_space: spaces.Space, n_steps: int) -> type[ReplayBuffer] | None:
    """
    :param observation_space: Of the algorithm
    :param n_steps: Of the algorithm
    :return: What to use where the user has not chosen, or None where SB3 chooses another kind of buffer
    """
    return None if isinstance(observation_space, spaces.Dict) or n_steps > 1 else FastReplayBuffer


@contextmanager
def chosen_replay_buffer(model: OffPolicyAlgorithm) -> Iterator[None]:
    """
    For SB3 to set up the model: its replay buffer is of the default class, unless the user has chosen another, and one of
    n-step returns has ``n_steps`` and ``gamma`` of the algorithm, unless ``replay_buffer_kwargs`` say something else.

    :param model: That is set up
    """
    if model.replay_buffer_class is None:
        model.replay_buffer_class = default_replay_buffer_class(model.observation_space, model.n_steps)
    n_step_returns, chosen = {"n_steps": model.n_steps, "gamma": model.gamma}, model.replay_buffer_class
    if model.n_steps > 1 and chosen is not None and issubclass(chosen, NStepReplayBuffer):
        model.replay_buffer_kwargs = {**n_step_returns, **model.replay_buffer_kwargs}
    with warnings.catch_warnings():
        # SB3 says that it ignores `n_steps` where it is given a class, and does not look whether the buffer has it
        if n_step_returns.items() <= model.replay_buffer_kwargs.items():
            warnings.filterwarnings("ignore", message="`n_steps=")
        yield


def split_batch(replay_data: ReplayBufferSamples, batch_size: int) -> Iterator[ReplayBufferSamples]:
    """
    :param replay_data: Transitions, also with observations of a Dict space
    :param batch_size: Transitions in each part, but the last one may have less
    :return: Their parts, in their order
    """

    def parts(field: th.Tensor | dict[str, th.Tensor] | None) -> Any:
        if isinstance(field, dict):
            return (dict(zip(field, tensors, strict=True)) for tensors in zip(*map(parts, field.values()), strict=True))
        return repeat(None) if field is None else field.split(batch_size)

    # Fields that are None have no end
    return (type(replay_data)(*fields) for fields in zip(*map(parts, replay_data), strict=False))
