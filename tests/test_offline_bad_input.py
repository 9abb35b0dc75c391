"""Every kind of bad data has a message that says what to do, and an exit status of its own."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from offline_data import PENDULUM_SPACES, pendulum_episodes, write_dataset
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext import BCQ
from sb3_ext.offline import errors, load_dataset

PENDULUM = "Pendulum-v1"


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def assert_message(error: type[errors.DatasetError], source: Any, *parts: str, **kwargs: Any) -> None:
    """Loading for Pendulum-v1 raises this very error, with a message that contains all parts."""
    with pytest.raises(errors.DatasetError) as caught:
        load_dataset(source, *PENDULUM_SPACES, env_id=PENDULUM, **kwargs)
    assert type(caught.value) is error, caught.value
    for part in parts:
        assert part in str(caught.value)


def test_exit_statuses_differ():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DatasetError)]
    statuses = [c.exit_status for c in classes]
    assert len(statuses) > 10
    assert len(set(statuses)) == len(statuses)
    assert all(64 <= status <= 79 for status in statuses)


@pytest.mark.parametrize("source", ["nobody/made-this-v0", Path("no/such/folder"), "no_buffer.pkl", None], ids=str)
def test_unknown(source: Any, minari_root: Path):
    write_dataset(minari_root / "mine" / "data-v3", *PENDULUM_SPACES, pendulum_episodes())
    asked = "No data set was given" if source is None else f"'{source}'"
    commands = (
        "python -m rl_zoo3.train --algo ppo --env Pendulum-v1 -f logs",
        "python -m sb3_ext.offline.collect --algo ppo --env Pendulum-v1 -f logs --n-episodes 500 "
        "--dataset-id Pendulum-v1/ppo-v0",
        "python -m rl_zoo3.train --algo bcq --env Pendulum-v1 -params dataset:\"'Pendulum-v1/ppo-v0'\"",
    )
    shipped = "sb3-ext/cartpole/replay-v0, sb3-ext/pendulum/replay-v0"
    assert_message(errors.DatasetNotFoundError, source, asked, "mine/data-v3", shipped, *commands)


def damage(dataset: Path, change: Callable[[h5py.File], None]) -> Path:
    with h5py.File(dataset / "data" / "main_data.hdf5", "r+") as file:
        change(file)
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_truncated_file(dataset: Path, keep: int):
    with open(dataset / "data" / "main_data.hdf5", "r+b") as file:
        file.truncate(keep)
    assert_message(errors.CorruptDatasetError, dataset, "main_data.hdf5")


def test_file_is_something_else(dataset: Path):
    (dataset / "data" / "main_data.hdf5").write_text("not HDF5")
    assert_message(errors.CorruptDatasetError, dataset, "main_data.hdf5")


def test_damaged_compressed_data(tmp_path: Path, dataset: Path):
    """A flipped bit in compressed data is found by its checksum."""

    def compress(file: h5py.File) -> None:
        del file["episode_0/observations"]
        values = np.zeros((4, 3), np.float32)
        file.create_dataset("episode_0/observations", data=values, chunks=(4, 3), compression="gzip", fletcher32=True)
        offsets.append(file["episode_0/observations"].id.get_chunk_info(0).byte_offset)

    offsets: list[int] = []
    damage(dataset, compress)
    load_dataset(dataset, *PENDULUM_SPACES)
    with open(dataset / "data" / "main_data.hdf5", "r+b") as file:
        file.seek(offsets[0] + 3)
        byte = file.read(1)[0]
        file.seek(offsets[0] + 3)
        file.write(bytes([byte ^ 1]))
    assert_message(errors.CorruptDatasetError, dataset, "damaged")


def test_missing_or_broken_metadata(dataset: Path):
    metadata = dataset / "data" / "metadata.json"
    content = metadata.read_text()
    metadata.write_text(content[:50])
    assert_message(errors.CorruptDatasetError, dataset, str(dataset))
    metadata.unlink()
    assert_message(errors.CorruptDatasetError, dataset, "metadata.json")


def test_episode_is_missing(dataset: Path):
    def change(file: h5py.File) -> None:
        del file["episode_1"]

    assert_message(errors.CorruptDatasetError, damage(dataset, change), "episode_1")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("observations", (4, 4), r"the observations of a step have the shape \(4,\)"),
        ("observations/inner", (4, 3), r"the observations are \['inner'\]"),
        ("actions", (3, 2), r"the actions of a step have the shape \(2,\)"),
        ("rewards", (3, 1), r"the rewards have the shape \(3, 1\)"),
        ("terminations", (3, 1), r"the terminations have the shape \(3, 1\)"),
    ],
)
def test_shapes_contradict_the_spaces(dataset: Path, name: str, shape: tuple[int, ...], message: str):
    def change(file: h5py.File) -> None:
        del file[f"episode_0/{name.split('/')[0]}"]
        file[f"episode_0/{name}"] = np.zeros(shape, np.float32)

    with pytest.raises(errors.CorruptDatasetError, match=rf"In episode 0 of .*{message}"):
        load_dataset(damage(dataset, change), *PENDULUM_SPACES)


def test_lengths_contradict(dataset: Path):
    def change(file: h5py.File) -> None:
        actions = file["episode_1/actions"][:-1]
        del file["episode_1/actions"]
        file["episode_1/actions"] = actions

    assert_message(errors.CorruptDatasetError, damage(dataset, change), "episode 1", "actions are for 1 steps, rewards for 2")


def test_number_of_steps_contradicts(tmp_path: Path):
    folder = write_dataset(tmp_path / "a", *PENDULUM_SPACES, pendulum_episodes(), total_steps=7)
    assert_message(errors.CorruptDatasetError, folder, "should have 7 steps", "has 5")


def test_nan_and_infinity(dataset: Path):
    def change(file: h5py.File) -> None:
        file["episode_0/observations"][1:3, 0] = np.nan
        # After the last step
        file["episode_1/observations"][2, 1] = np.inf
        file["episode_1/rewards"][1] = -np.inf
        file["episode_1/actions"][0] = np.nan

    assert_message(
        errors.NonFiniteDataError,
        damage(dataset, change),
        "3 in observations, the first at episode 0, step 1",
        "1 in actions, the first at episode 1, step 0",
        "1 in rewards, the first at episode 1, step 1",
    )


def test_too_large_for_float32(dataset: Path):
    def change(file: h5py.File) -> None:
        del file["episode_0/rewards"]
        file["episode_0/rewards"] = np.array([0.0, 0.0, 1e300])

    assert_message(errors.NonFiniteDataError, damage(dataset, change), "1 in rewards, the first at episode 0, step 2")


def test_action_out_of_range(dataset: Path):
    def change(file: h5py.File) -> None:
        file["episode_0/actions"][1:, 0] = [-2.5, 2.01]

    assert_message(
        errors.ActionRangeError, damage(dataset, change), "2 action values", "[-2.5] at episode 0, step 1", "Box(-2.0, 2.0"
    )


@pytest.mark.parametrize("action", [4, 0, 1.5])
def test_discrete_action_out_of_range(tmp_path: Path, action: float):
    space = spaces.Discrete(3, start=1)
    episodes = [episode._replace(actions=np.full(len(episode.rewards), action)) for episode in pendulum_episodes()]
    folder = write_dataset(tmp_path / "a", PENDULUM_SPACES[0], space, episodes)
    with pytest.raises(errors.ActionRangeError, match="5 action values"):
        load_dataset(folder, PENDULUM_SPACES[0], space)


def other_box(**changes: Any) -> spaces.Box:
    space = PENDULUM_SPACES[0]
    return spaces.Box(**{"low": space.low, "high": space.high, "dtype": np.float32, **changes})


@pytest.mark.parametrize(
    ("which", "space"),
    [
        ("observation", other_box(low=-1, high=1, shape=(4,))),
        ("observation", other_box(high=np.array([1, 1, 9], np.float32))),
        ("observation", spaces.Dict({"a": PENDULUM_SPACES[0]})),
        ("action", other_box(low=-1, high=1, shape=(1,))),
        ("action", other_box(low=-2, high=2, shape=(2,))),
    ],
    ids=str,
)
def test_spaces_differ(tmp_path: Path, which: str, space: spaces.Space):
    data_spaces = (space, PENDULUM_SPACES[1]) if which == "observation" else (PENDULUM_SPACES[0], space)
    folder = write_dataset(tmp_path / "a", *data_spaces, pendulum_episodes())
    env_space = PENDULUM_SPACES[0 if which == "observation" else 1]
    assert_message(errors.SpaceMismatchError, folder, f"The {which} space", str(space), str(env_space))


@pytest.mark.parametrize(("data_n", "env_n"), [(2, 3), (3, 2)])
def test_numbers_of_actions_differ(tmp_path: Path, data_n: int, env_n: int):
    folder = write_dataset(tmp_path / "a", PENDULUM_SPACES[0], spaces.Discrete(data_n), [])
    with pytest.raises(errors.SpaceMismatchError, match=rf"(?s)Discrete\({data_n}\).*Discrete\({env_n}\)"):
        load_dataset(folder, PENDULUM_SPACES[0], spaces.Discrete(env_n))


def test_discrete_data_for_a_continuous_environment(tmp_path: Path):
    folder = write_dataset(tmp_path / "a", PENDULUM_SPACES[0], spaces.Discrete(2), [])
    assert_message(errors.ActionTypeError, folder, "discrete actions, Discrete(2)", "continuous, Box(-2.0, 2.0")


def test_continuous_data_for_a_discrete_environment(dataset: Path):
    with pytest.raises(errors.ActionTypeError, match=r"continuous actions, Box.* discrete, Discrete"):
        load_dataset(dataset, PENDULUM_SPACES[0], spaces.Discrete(2))


def test_unsupported_action_space(tmp_path: Path):
    space = spaces.MultiDiscrete([2, 2])
    folder = write_dataset(tmp_path / "a", PENDULUM_SPACES[0], space, [pendulum_episodes()[0]])
    with pytest.raises(errors.UnsupportedDataError, match="Box or Discrete action space"):
        load_dataset(folder, PENDULUM_SPACES[0], space)


def test_empty(tmp_path: Path):
    assert_message(errors.EmptyDatasetError, write_dataset(tmp_path / "a", *PENDULUM_SPACES, []), "no transition")
    assert_message(errors.EmptyDatasetError, ReplayBuffer(10, *PENDULUM_SPACES, device="cpu"), "no transition")


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickle_needs_consent(tmp_path: Path):
    path = tmp_path / "replay_buffer.pkl"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    assert_message(errors.PickleConsentError, path, "can run any code", "-params allow_pickle:True")
    assert not (tmp_path / "trace").exists()
    assert_message(errors.UnsupportedDataError, path, "not an SB3 ReplayBuffer", allow_pickle=True)
    assert (tmp_path / "trace").exists(), "with consent it is run"


def test_damaged_pickle(tmp_path: Path):
    path = tmp_path / "replay_buffer.pkl"
    path.write_bytes(pickle.dumps(ReplayBuffer(10, *PENDULUM_SPACES, device="cpu"))[:-20])
    assert_message(errors.CorruptDatasetError, path, "no intact pickle", allow_pickle=True)


def test_replay_buffer_without_next_observations():
    buffer = ReplayBuffer(10, *PENDULUM_SPACES, device="cpu", optimize_memory_usage=True, handle_timeout_termination=False)
    assert_message(errors.UnsupportedDataError, buffer, "optimize_memory_usage=True", "last observation of each episode")


def test_something_else():
    assert_message(errors.UnsupportedDataError, 3, "not as int")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file-size limit")
def test_no_room_for_rows_on_disk(dataset: Path):
    """Nothing half-written stays."""
    code = """
import resource, sys
from gymnasium import make
from sb3_ext import BCQ
from sb3_ext.offline import errors, load_dataset
env = make("Pendulum-v1")
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
try:
    load_dataset(sys.argv[1], env.observation_space, env.action_space, optimize_memory_usage=True)
except errors.DiskFullError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code, dataset], capture_output=True, text=True, check=False)
    assert "do not fit" in process.stdout, process.stderr
    assert list(dataset.glob(".rows-*")) == []


def test_normalised_observations_of_the_training_environment(dataset: Path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make(PENDULUM)]), norm_obs=True)
    with pytest.raises(errors.NormalizedEnvError, match=r"norm_obs=False"):
        BCQ("MlpPolicy", env, dataset)
    rewards_only = VecNormalize(DummyVecEnv([lambda: gym.make(PENDULUM)]), norm_obs=False)
    BCQ("MlpPolicy", rewards_only, dataset)


def train(dataset: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "sb3_ext.zoo", "train", "--algo", "bcq", "--env", PENDULUM, "-n", "1", "-params", f"dataset:'{dataset}'"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_zoo_leaves_with_the_exit_status(tmp_path: Path, dataset: Path):
    def change(file: h5py.File) -> None:
        file["episode_0/rewards"][0] = np.nan

    damage(dataset, change)
    for name, error, part in (
        ("nobody/made-this-v0", errors.DatasetNotFoundError, "'nobody/made-this-v0'"),
        (str(dataset), errors.NonFiniteDataError, "1 in rewards"),
        ("sb3-ext/cartpole/replay-v0", errors.ActionTypeError, "discrete actions"),
    ):
        process = train(name, tmp_path)
        assert process.returncode == error.exit_status, process.stderr
        message = next(line for line in process.stderr.splitlines() if line.startswith("sb3-ext: error: "))
        assert part in message
        assert "Traceback" not in process.stderr
