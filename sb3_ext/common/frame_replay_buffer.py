"""A replay buffer for stacks of frames that keeps every frame once."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext.common.replay_buffer import take_rows

# Frames beyond one for each transition: an episode has a stack more than it has transitions
_SPARE_FRAMES = 0.03

# Where observations are no stacks of so many frames, transitions without a break between them are fewer
_MIN_UNBROKEN = 10


class FrameReplayBuffer(NStepReplayBuffer):
    """
    Replay buffer for frame-stacked images, with the samples of SB3's in an eighth of the memory (for stacks of 4).

    Of each stack only the newest frame is stored, and the stack is rebuilt when it is sampled. Nothing is assumed about when
    episodes begin and end: where a stack does not continue the one before it, all of its frames are stored.

    Frames for 1.03 times ``buffer_size`` are kept. Where episodes are so short that this is not enough, the oldest
    transitions are given up a little earlier.

    It can be the ``replay_buffer_class`` of any off-policy algorithm. Those of SB3 and sb3-contrib do not hand on their
    ``n_steps``: it is set with ``replay_buffer_kwargs=dict(n_steps=3, gamma=0.99)``.

    :param buffer_size: Transitions in all environments together
    :param observation_space: Box of images, uint8, channels first: the frames of a stack one after the other, the newest last
    :param action_space: Action space
    :param device: Of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Must be False, since this is another way to the same end
    :param handle_timeout_termination: Whether time limits are told apart from termination, see SB3's ``ReplayBuffer``
    :param n_stack: Frames in a stack, >= 1; with 1, an observation and the next one still share their frames
    :param n_steps: Steps of the returns, >= 1
    :param gamma: Discount factor of n-step returns
    :raises ValueError: if the observations are no stacks of ``n_stack`` images
    """

    # Transitions since the last one that was left out
    _n_unbroken = 0

    observations: _Stacks  # type: ignore[assignment]
    next_observations: _Stacks  # type: ignore[assignment]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_stack: int = 4,
        n_steps: int = 1,
        gamma: float = 0.99,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("FrameReplayBuffer stores frames once by itself: leave optimize_memory_usage=False.")
        if not (
            isinstance(observation_space, spaces.Box)
            and is_image_space(observation_space)
            and is_image_space_channels_first(observation_space)
            and n_stack >= 1
            and observation_space.shape[0] % n_stack == 0
        ):
            raise ValueError(
                f"FrameReplayBuffer supports stacks of n_stack={n_stack} images (at least 1; uint8, channels first, as many "
                f"channels as all frames of a stack have), but got {observation_space}."
            )
        # Observations of one row only, which are not used
        super().__init__(
            n_envs,
            observation_space,
            action_space,
            device,
            n_envs,
            handle_timeout_termination=handle_timeout_termination,
            n_steps=n_steps,
            gamma=gamma,
        )
        self.n_stack = n_stack
        self.buffer_size = max(buffer_size // n_envs, 1)
        for name in ("actions", "rewards", "dones", "timeouts"):
            one_row = getattr(self, name)
            setattr(self, name, np.zeros((self.buffer_size, *one_row.shape[1:]), one_row.dtype))
        self._frames = _Frames(self.buffer_size, n_envs, n_stack, self.obs_shape)
        self.observations = _Stacks(self._frames, is_next=False)
        self.next_observations = _Stacks(self._frames, is_next=True)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        As SB3's, but a transition from one observation to another that does not follow it is left out. SB3 makes one where
        training goes on after it was stopped in the middle of a step, or after the environment was used for something else.

        :param obs: Observations, (n_envs, ...)
        :param next_obs: Those that the actions led to, (n_envs, ...)
        :param action: (n_envs, ...)
        :param reward: (n_envs,)
        :param done: (n_envs,)
        :param infos: One of each environment
        :raises ValueError: if next observations often are not the observations moved on by one frame
        """
        n_channels = self._frames.n_channels
        if np.array_equal(next_obs[:, :-n_channels], obs[:, n_channels:]):
            super().add(obs, next_obs, action, reward, done, infos)
            self._n_unbroken += 1
        elif self._n_unbroken >= _MIN_UNBROKEN:
            self._n_unbroken = 0
        else:
            raise ValueError(
                "FrameReplayBuffer got a next observation that is not the observation moved on by one of "
                f"{self.n_stack} frames, the newest last. Stack frames with VecFrameStack (`frame_stack` in the zoo) and give "
                "their number as n_stack, or use another buffer. If training was stopped a few steps ago, or the environment "
                "used for something else, go on with `set_env(env, force_reset=True)`."
            )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """
        :param batch_size: Number of transitions
        :param env: To normalize rewards and observations, if given
        :return: Drawn uniformly, with replacement, from the transitions whose frames are there. Observations and next
            observations may lie in the same memory: change them in copies.
        """
        n_rows, n_given_up = self.size(), self.n_given_up
        rows = np.random.randint(n_given_up, n_rows, size=batch_size)
        if n_given_up:
            # Counted from the oldest
            rows = (rows + (self.pos if self.full else 0)) % self.buffer_size
        return self._get_samples(rows, env=env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        if self.n_steps > 1:
            return super()._get_samples(batch_inds, env)
        # As SB3's ReplayBuffer, but the frames that a stack and the next one share are read once. For one environment, numpy
        # would draw nothing.
        rows: np.ndarray = batch_inds
        envs: np.ndarray | int = 0
        if self.n_envs > 1:
            envs = np.random.randint(0, high=self.n_envs, size=len(batch_inds))
            rows = batch_inds * self.n_envs + envs
        stacks_and_next_frame = self._frames.read(rows, envs, oldest=self.n_stack - 1, newest=-1)
        n_channels, column = self._frames.n_channels, rows[:, None]
        data = (
            self._normalize_obs(stacks_and_next_frame[:, :-n_channels], env),
            take_rows(self.actions, rows),
            self._normalize_obs(stacks_and_next_frame[:, n_channels:], env),
            self.dones.take(column) * (1 - self.timeouts.take(column)),
            self._normalize_reward(self.rewards.take(column), env),
        )
        # Without ``to_torch``, which takes longer on CPU for what is a copy already
        tensors = map(th.from_numpy, data)
        return ReplayBufferSamples(*(tensors if self.device.type == "cpu" else (tensor.to(self.device) for tensor in tensors)))

    def to_torch(self, array: np.ndarray, copy: bool = True) -> th.Tensor:
        # All that is sampled has been copied by indexing
        return th.from_numpy(array).to(self.device)

    @property
    def n_given_up(self) -> int:
        """How many of the oldest rows are not sampled, since frames of theirs are no longer there."""
        return self._frames.n_given_up(self.size(), self.pos)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays when they are full."""
        arrays = (self.actions, self.rewards, self.dones, self.timeouts)
        return self._frames.nbytes + sum(array.nbytes for array in arrays)


class _Stacks:
    """
    What SB3's buffers do with an array of observations: assign a row, and read at rows and environments.

    :param frames: Where the frames are
    :param is_next: Whether these are the next observations
    """

    def __init__(self, frames: _Frames, is_next: bool) -> None:
        self._frames, self._is_next = frames, is_next

    def __setitem__(self, row: int, stacks: np.ndarray) -> None:
        # SB3's buffers assign copies, which can be kept
        if self._is_next:
            self._frames.append(stacks)
        else:
            self._frames.begin(row, stacks)

    def __getitem__(self, index: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        rows, envs = index
        newest = -1 if self._is_next else 0
        oldest = newest + self._frames.n_stack - 1
        return self._frames.read(rows * self._frames.n_envs + envs, envs, oldest, newest)


class _Frames:
    """
    The frames of each environment in a ring, numbered from 0 without end.

    :param n_rows: Rows of the buffer
    :param n_envs: Number of environments
    :param n_stack: Frames in a stack
    :param stack_shape: (n_stack * channels, height, width)
    """

    def __init__(self, n_rows: int, n_envs: int, n_stack: int, stack_shape: tuple[int, ...]) -> None:
        self.n_envs, self.n_stack, self.stack_shape = n_envs, n_stack, stack_shape
        self.n_channels = stack_shape[0] // n_stack
        self.n_slots = int((1.0 + _SPARE_FRAMES) * n_rows) + n_stack + 1
        # Behind the ring its first slots once more, so that what a transition shows always lies in one piece
        frame_shape = (self.n_channels, *stack_shape[1:])
        self.slots = np.zeros((n_envs, self.n_slots + n_stack, *frame_shape), np.uint8)
        # Of each row: number of the observation's newest frame
        self.newest = np.zeros((n_rows, n_envs), np.int64)
        # Of each environment. Numpy takes longer for so few numbers.
        self.n_frames = [0] * n_envs
        self.last_stacks: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.newest.nbytes

    def begin(self, row: int, stacks: np.ndarray) -> None:
        """
        :param row: Of the transition that begins
        :param stacks: Its observations, (n_envs, ...)
        """
        for env, stack in enumerate(stacks):
            if self.last_stacks is None or not np.array_equal(stack, self.last_stacks[env]):
                for frame in self._split(stack):
                    self._push(env, frame)
        self.newest[row] = [n_frames - 1 for n_frames in self.n_frames]
        self.last_stacks = stacks

    def append(self, stacks: np.ndarray) -> None:
        """
        :param stacks: The next observations of the transition that has begun, moved on by one frame, (n_envs, ...)
        """
        for env, stack in enumerate(stacks):
            self._push(env, self._split(stack)[-1])
        self.last_stacks = stacks

    def _split(self, stack: np.ndarray) -> np.ndarray:
        return stack.reshape(self.n_stack, self.n_channels, *self.stack_shape[1:])

    def _push(self, env: int, frame: np.ndarray) -> None:
        slot = self.n_frames[env] % self.n_slots
        self.slots[env, slot] = frame
        if slot < self.n_stack:
            self.slots[env, self.n_slots + slot] = frame
        self.n_frames[env] += 1

    def n_given_up(self, n_rows: int, pos: int) -> int:
        """
        :param n_rows: Rows that are filled
        :param pos: The next row to be filled
        :return: How many of the oldest of them have a frame that is no longer there
        """
        n_whole_stacks = self.n_slots - self.n_stack + 1

        def is_lost(index: int) -> bool:
            row = (pos - n_rows + index) % len(self.newest)
            newest_frames = self.newest[row].tolist()
            return any(newest < n - n_whole_stacks for newest, n in zip(newest_frames, self.n_frames, strict=True))

        # Frames are numbered in the order of the rows. As a rule, all of them are there.
        return bisect.bisect_left(range(n_rows), True, key=lambda index: not is_lost(index)) if is_lost(0) else 0

    def read(self, rows: np.ndarray, envs: np.ndarray | int, oldest: int, newest: int) -> np.ndarray:
        """
        :param rows: Rows of the buffer times ``n_envs`` plus environments, (batch,)
        :param envs: The environments, (batch,), or 0 if there is only one
        :param oldest: How many frames the oldest wanted frame is older than the newest one of the observation
        :param newest: The same for the newest wanted frame; -1 is that of the next observation
        :return: (batch, (oldest - newest + 1) * channels, height, width)
        """
        n_wanted, n_slots = oldest - newest + 1, self.slots.shape[1]
        starts = (self.newest.take(rows) - oldest) % self.n_slots + envs * n_slots
        # One copy of all frames of a transition takes less time than one copy of each
        n_bytes = self.slots[0, 0].size
        shape = (self.n_envs * n_slots - n_wanted + 1, n_wanted * n_bytes)
        pieces: np.ndarray = np.ndarray(shape, np.uint8, self.slots, strides=(n_bytes, 1))
        return pieces[starts].reshape(len(rows), -1, *self.stack_shape[1:])
