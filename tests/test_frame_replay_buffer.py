"""The frame memory against SB3's buffers, filled from the same stream."""

import copy
from contextlib import nullcontext
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_ext import DDQN, DuelingDDQN, FrameReplayBuffer

# More than channels, by which SB3 tells where the channels are
HEIGHT, WIDTH = 13, 14
ACTIONS = spaces.Discrete(3)


def image_space(n_stack, n_channels=1):
    return spaces.Box(0, 255, (n_stack * n_channels, HEIGHT, WIDTH), np.uint8)


class Stream:
    """
    Random frames in episodes of random lengths, stacked.

    :param before: What a stack shows before the first frame of an episode: "black", "repeated", or "other" frames
    """

    def __init__(self, rng, n_envs, n_stack, n_channels, longest, before):
        self.rng, self.n_envs, self.n_stack, self.longest, self.before = rng, n_envs, n_stack, longest, before
        self.frame_shape = (n_channels, HEIGHT, WIDTH)
        self.stacks = np.stack([self.reset() for _ in range(n_envs)])

    def frame(self):
        return self.rng.integers(0, 256, self.frame_shape, np.uint8)

    def reset(self):
        first = self.frame()
        older = {"black": np.zeros_like, "repeated": np.copy, "other": lambda _: self.frame()}[self.before]
        return np.concatenate([*(older(first) for _ in range(self.n_stack - 1)), first])

    def step(self):
        """:return: arguments of ``add``"""
        n_channels = self.frame_shape[0]
        obs = self.stacks.copy()
        next_obs = np.concatenate([obs[:, n_channels:], np.stack([self.frame() for _ in range(self.n_envs)])], axis=1)
        dones = self.rng.random(self.n_envs) < 1 / self.longest
        infos = [{"TimeLimit.truncated": bool(done and self.rng.random() < 0.5)} for done in dones]
        self.stacks = next_obs.copy()
        for env in np.flatnonzero(dones):
            self.stacks[env] = self.reset()
        actions, rewards = self.rng.integers(3, size=(self.n_envs, 1)), self.rng.normal(size=self.n_envs)
        return obs, next_obs, actions, rewards, dones, infos


def both_buffers(n_rows, n_envs, n_stack, n_channels, n_steps):
    common = {
        "observation_space": image_space(n_stack, n_channels),
        "action_space": ACTIONS,
        "device": "cpu",
        "n_envs": n_envs,
    }
    ours = FrameReplayBuffer(n_rows * n_envs, **common, n_stack=n_stack, n_steps=n_steps, gamma=0.9)
    if n_steps == 1:
        return ours, ReplayBuffer(n_rows * n_envs, **common)
    return ours, NStepReplayBuffer(n_rows * n_envs, **common, n_steps=n_steps, gamma=0.9)


def assert_same_samples(ours, plain, rows, seed=0):
    batches = []
    for buffer in (ours, plain):
        np.random.seed(seed)  # for the environments
        batches.append(buffer._get_samples(rows.copy()))
    for name, value, expected in zip(batches[0]._fields, *batches, strict=True):
        if expected is None:
            assert value is None
            continue
        assert value.dtype == expected.dtype, name
        assert th.equal(value, expected), name


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(2, 40),
    n_steps_taken=st.integers(1, 130),
    n_envs=st.integers(1, 3),
    n_stack=st.integers(1, 4),
    n_channels=st.sampled_from([1, 3]),
    longest=st.sampled_from([1, 2, 5, 30]),
    before=st.sampled_from(["black", "repeated", "other"]),
    n_steps=st.sampled_from([1, 3]),
)
def test_same_contents_as_a_plain_buffer(seed, n_rows, n_steps_taken, n_envs, n_stack, n_channels, longest, before, n_steps):
    rng = np.random.default_rng(seed)
    stream = Stream(rng, n_envs, n_stack, n_channels, longest, before)
    ours, plain = both_buffers(n_rows, n_envs, n_stack, n_channels, n_steps)
    for _ in range(n_steps_taken):
        transition = stream.step()
        ours.add(*copy.deepcopy(transition))
        plain.add(*transition)
    assert (ours.size(), ours.pos, ours.full) == (plain.size(), plain.pos, plain.full)
    n_given_up = ours._frames.n_given_up(ours.size(), ours.pos)
    # Every frame is there that there is room for: one at each step, and those that episodes begin with
    assert n_given_up == 0 or max(ours._frames.n_frames) > ours._frames.n_slots
    rows = np.arange(n_given_up, ours.size()) + (ours.pos if ours.full else 0)
    if len(rows):
        assert_same_samples(ours, plain, rows % n_rows, seed=seed)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_same_draws_as_a_plain_buffer(n_steps):
    stream = Stream(np.random.default_rng(0), 2, 4, 1, 60, "black")
    ours, plain = both_buffers(100, 2, 4, 1, n_steps)
    normalizing = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=False, gamma=0.9)
    normalizing.ret_rms.var = np.array(4.0)
    for step in range(150):
        transition = stream.step()
        ours.add(*transition)
        plain.add(*transition)
        for env in (None, normalizing) if step in (20, 149) else ():
            batches = []
            for buffer in (ours, plain):
                np.random.seed(1)
                batches.append(buffer.sample(32, env=env))
            for value, expected in zip(*batches, strict=True):
                assert value is expected is None or th.equal(value, expected)


def test_samples_are_copies():
    stream = Stream(np.random.default_rng(0), 1, 4, 1, 10, "black")
    buffer, _ = both_buffers(20, 1, 4, 1, 1)
    for _ in range(10):
        buffer.add(*stream.step())
    before = buffer._get_samples(np.arange(10)).observations.clone()
    batch = buffer._get_samples(np.arange(10))
    batch.observations.zero_()
    batch.rewards.zero_()
    assert th.equal(buffer._get_samples(np.arange(10)).observations, before)
    assert buffer.rewards[:10].any()


@pytest.mark.parametrize("n_added", [100, 110, 130])
def test_short_episodes_give_up_the_oldest_transitions_only(n_added):
    # Five frames for each transition, and room for 103 + 5
    stream = Stream(np.random.default_rng(0), 1, 4, 1, 1, "black")
    buffer, _ = both_buffers(100, 1, 4, 1, 1)
    for _ in range(n_added):
        buffer.add(*stream.step())
    assert buffer._frames.n_given_up(100, buffer.pos) == 100 - 21
    np.random.seed(0)
    drawn = []
    buffer._get_samples = lambda rows, env=None: drawn.extend(rows)
    buffer.sample(5000)
    assert set(drawn) == {row % 100 for row in range(n_added - 21, n_added)}


def test_memory_of_a_million_atari_transitions():
    # Nothing is allocated before it is written to
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = FrameReplayBuffer(1_000_000, space, spaces.Discrete(6), "cpu", n_envs=8)
    assert buffer.nbytes < 7.5e9


def frames_env(length):
    """
    Images of 40 x 40.

    :param length: Of an episode; what is left of it after 70 steps is cut
    """

    class Frames(gym.Env):
        observation_space = spaces.Box(0, 255, (40, 40, 1), np.uint8)
        action_space = spaces.Discrete(2)

        def _frame(self):
            return self.np_random.integers(0, 256, (40, 40, 1), np.uint8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps_left = length
            return self._frame(), {}

        def step(self, action):
            self.steps_left -= 1
            return self._frame(), float(action), self.steps_left == 0, False, {}

    # Long enough that no transition has to be given up, and so the draws are the same
    return gym.wrappers.TimeLimit(Frames(), 70)


@pytest.mark.parametrize("algo", [DQN, QRDQN, DDQN, DuelingDDQN])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_training_is_the_same_as_with_a_plain_buffer(algo, n_steps, tmp_path):
    def train(**kwargs):
        env = VecTransposeImage(VecFrameStack(DummyVecEnv([partial(frames_env, 68), partial(frames_env, 100)]), 3))
        model = algo(
            "CnnPolicy", env, buffer_size=134, learning_starts=20, batch_size=8, train_freq=4, seed=0, device="cpu", **kwargs
        )
        return model.learn(320)

    plain = train(n_steps=n_steps)
    ours = train(
        replay_buffer_class=FrameReplayBuffer, replay_buffer_kwargs={"n_stack": 3, "n_steps": n_steps, "gamma": plain.gamma}
    )
    assert ours.replay_buffer.full and ours._n_updates > 5
    assert 0 < ours.replay_buffer.timeouts.sum() < ours.replay_buffer.dones.sum()
    for name, value in plain.policy.state_dict().items():
        th.testing.assert_close(ours.policy.state_dict()[name], value, rtol=1e-5, atol=1e-6)

    ours.save_replay_buffer(tmp_path / "buffer")
    np.random.seed(0)
    expected = ours.replay_buffer.sample(16)
    ours.load_replay_buffer(tmp_path / "buffer")
    np.random.seed(0)
    for value, expected_value in zip(ours.replay_buffer.sample(16), expected, strict=True):
        assert value is expected_value is None or th.equal(value, expected_value)
    ours.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (spaces.Box(0, 255, (6, 84, 84), np.uint8), {}),  # no multiple of 4
        (spaces.Box(0, 255, (84, 84, 4), np.uint8), {}),  # channels last
        (spaces.Box(0, 1, (4, 84, 84), np.float32), {}),
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), {"n_stack": 0}),
        (spaces.Dict({"a": spaces.Box(0, 255, (4, 84, 84), np.uint8)}), {}),
    ],
)
def test_what_is_no_stack_of_frames_is_refused(space, kwargs):
    with pytest.raises(ValueError, match=r"supports stacks of n_stack=\d images .* but got (Box|Dict)"):
        FrameReplayBuffer(10, space, ACTIONS, "cpu", **kwargs)


def test_observations_that_are_not_stacked_are_noticed():
    buffer = FrameReplayBuffer(10, image_space(4), ACTIONS, "cpu")
    rng = np.random.default_rng(0)
    obs, next_obs = rng.integers(0, 256, (2, 1, 4, HEIGHT, WIDTH), np.uint8)
    with pytest.raises(ValueError, match="VecFrameStack"):
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])


class StopAfter(BaseCallback):
    def __init__(self, n_steps, error):
        super().__init__()
        self.last, self.error = n_steps, error

    def _on_step(self):
        if self.num_timesteps == self.last and self.error is not None:
            raise self.error
        return self.num_timesteps < self.last


@pytest.mark.parametrize("interruption", ["callback", "keyboard", "evaluation"])
@pytest.mark.parametrize("algo", [DQN, DDQN])
def test_training_goes_on_after_an_interruption(algo, interruption):
    env = VecFrameStack(DummyVecEnv([partial(frames_env, 9)]), 3)
    kwargs = {"buffer_size": 100, "learning_starts": 45, "train_freq": 1, "seed": 0, "device": "cpu"}
    frames = {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"n_stack": 3}}
    model = algo("CnnPolicy", env, **kwargs, **frames)
    if interruption == "evaluation":
        model.learn(20)
        evaluate_policy(model, env, n_eval_episodes=1, warn=False)
    else:
        error = KeyboardInterrupt() if interruption == "keyboard" else None
        with nullcontext() if error is None else pytest.raises(KeyboardInterrupt):
            model.learn(40, callback=StopAfter(20, error))
    stored = model.replay_buffer.size()
    model.learn(30, reset_num_timesteps=False)
    # All but the transition whose observation was a thing of the past
    assert model.replay_buffer.size() == stored + 29
    batch = model.replay_buffer._get_samples(np.arange(stored + 29))
    assert th.equal(batch.observations[:, 1:], batch.next_observations[:, :-1])


def test_a_few_broken_transitions_are_left_out_and_many_are_an_error():
    stream = Stream(np.random.default_rng(0), 1, 4, 1, 1000, "black")
    buffer = FrameReplayBuffer(100, image_space(4), ACTIONS, "cpu")
    broken = np.random.default_rng(0).integers(0, 256, (1, 4, HEIGHT, WIDTH), np.uint8)
    for n_unbroken in (10, 10, 9):
        for _ in range(n_unbroken):
            buffer.add(*(step := stream.step()))
        with nullcontext() if n_unbroken == 10 else pytest.raises(ValueError, match="force_reset=True"):
            buffer.add(step[0], broken, *step[2:])
    assert buffer.pos == 29


def test_optimize_memory_usage_is_refused_with_advice():
    with pytest.raises(ValueError, match="optimize_memory_usage=False"):
        FrameReplayBuffer(10, image_space(4), ACTIONS, "cpu", optimize_memory_usage=True)
