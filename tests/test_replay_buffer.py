"""The faster replay buffer against SB3's, from the same stream of transitions and the same random numbers."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import DictReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ext import DDQN, SACDiscrete
from sb3_ext.common.replay_buffer import FastReplayBuffer, split_batch

SPACES = {
    "vectors": spaces.Box(-1, 1, (3,)),
    "matrices": spaces.Box(-1, 1, (3, 2)),
    "images": spaces.Box(0, 255, (1, 6, 6), np.uint8),
    "classes": spaces.Discrete(5),
}


def fill(buffers, n_steps, n_envs, seed=0):
    rng = np.random.default_rng(seed)
    buffers[0].observation_space.seed(seed)
    for _ in range(n_steps):
        obs, next_obs = (np.stack([buffers[0].observation_space.sample() for _ in range(n_envs)]) for _ in range(2))
        dones = rng.random(n_envs) < 0.4
        infos = [{"TimeLimit.truncated": bool(done and rng.random() < 0.5)} for done in dones]
        actions, rewards = rng.integers(4, size=(n_envs, 1)), rng.random(n_envs)
        for buffer in buffers:
            buffer.add(obs, next_obs, actions, rewards, dones, infos)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [4, 25])
@pytest.mark.parametrize("kwargs", [{}, {"optimize_memory_usage": True, "handle_timeout_termination": False}])
def test_samples_are_those_of_sb3(space, n_envs, n_steps, kwargs):
    # Room for 10 steps: not full, or written over
    buffers = [
        cls(10 * n_envs, space, spaces.Discrete(4), "cpu", n_envs, **kwargs) for cls in (ReplayBuffer, FastReplayBuffer)
    ]
    fill(buffers, n_steps, n_envs)
    samples = []
    for buffer in buffers:
        np.random.seed(1)
        samples.append(buffer.sample(50))
    for expected, actual in zip(*samples, strict=True):
        if expected is None:
            assert actual is None
            continue
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert (actual == expected).all()


def test_samples_can_be_changed_without_changing_the_buffer():
    buffer = FastReplayBuffer(10, SPACES["vectors"], spaces.Discrete(4), "cpu")
    fill([buffer], 10, 1)
    before = buffer.observations.copy(), buffer.rewards.copy()
    sample = buffer.sample(20)
    sample.observations.zero_()
    sample.rewards.zero_()
    np.testing.assert_array_equal(before[0], buffer.observations)
    np.testing.assert_array_equal(before[1], buffer.rewards)


@pytest.mark.parametrize("algo", [DDQN, SACDiscrete])
@pytest.mark.parametrize(
    ("n_steps", "replay_buffer_kwargs", "expected"),
    [
        (1, {"n_steps": 1, "gamma": 0.9}, (1, 0.9)),
        (3, {"n_steps": 3, "gamma": 0.9}, (3, 0.9)),
        # Of the algorithm, and of SB3's buffer
        (4, {}, (4, 0.9)),
        (1, {}, (3, 0.99)),
    ],
)
def test_n_step_buffer_of_the_users_own(algo, n_steps, replay_buffer_kwargs, expected, recwarn):
    kwargs = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": replay_buffer_kwargs, "learning_starts": 10}
    model = algo("MlpPolicy", "CartPole-v1", n_steps=n_steps, gamma=0.9, device="cpu", **kwargs).learn(20)
    assert type(model.replay_buffer) is NStepReplayBuffer
    assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == expected
    assert not [warning for warning in recwarn if "n_steps" in str(warning.message)]


@pytest.mark.parametrize("algo", [DDQN, SACDiscrete])
def test_n_steps_that_the_buffer_does_not_have_are_warned_of(algo):
    kwargs = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2}}
    for given in (kwargs, {"replay_buffer_class": ReplayBuffer}):
        with pytest.warns(UserWarning, match="`n_steps=3` is ignored"):
            algo("MlpPolicy", "CartPole-v1", n_steps=3, device="cpu", **given)


def test_normalization():
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    env.reset()
    for _ in range(5):
        env.step(np.array([0, 1]))
    buffers = [cls(10, SPACES["vectors"], spaces.Discrete(4), "cpu", 2) for cls in (ReplayBuffer, FastReplayBuffer)]
    for buffer in buffers:
        buffer.observations = buffer.next_observations = np.ones((5, 2, 4), np.float32)
        buffer.rewards[:] = 3.0
        buffer.full = True
    samples = []
    for buffer in buffers:
        np.random.seed(1)
        samples.append(buffer.sample(50, env=env))
    for name in ("observations", "next_observations", "rewards"):
        expected, actual = (getattr(sample, name) for sample in samples)
        assert (actual == expected).all() and not (actual == 1.0).any()


@pytest.mark.parametrize("algo", [DDQN, SACDiscrete])
def test_it_is_used_unless_told_otherwise(algo):
    for kwargs, expected in (
        ({}, "FastReplayBuffer"),
        ({"n_steps": 3}, "NStepReplayBuffer"),
        ({"replay_buffer_class": ReplayBuffer}, "ReplayBuffer"),
    ):
        model = algo("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu", **kwargs)
        assert type(model.replay_buffer).__name__ == expected


def test_transitions_are_split_in_their_order():
    column = th.arange(5.0).unsqueeze(1)
    observations, next_observations = ({"a": column + first, "b": column + first + 10} for first in (0, 1))
    data = DictReplayBufferSamples(observations, column + 20, next_observations, column, column)
    parts = list(split_batch(data, 2))
    assert [len(part.rewards) for part in parts] == [2, 2, 1] and all(part.discounts is None for part in parts)
    for index, first in enumerate((0, 2, 4)):
        rows = slice(first, first + 2)
        assert parts[index].observations["b"].tolist() == (column + 10)[rows].tolist()
        assert parts[index].next_observations["a"].tolist() == (column + 1)[rows].tolist()
        assert parts[index].actions.tolist() == (column + 20)[rows].tolist()
    assert [part.discounts.tolist() for part in split_batch(data._replace(discounts=column), 4)] == [
        column[:4].tolist(),
        column[4:].tolist(),
    ]
