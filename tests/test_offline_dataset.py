import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from offline_data import PENDULUM_SPACES, RecordedEpisode, pendulum_episodes, write_dataset
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_ext import FrameReplayBuffer
from sb3_ext.offline import TransitionDataset, load_dataset
from sb3_ext.offline.catalog import SHIPPED_ROOT
from sb3_ext.offline.errors import DatasetNotFoundError
from sb3_ext.offline.sources import open_source
from sb3_ext.offline.storage import ReadAhead

ON_DISK = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


def everything(dataset: TransitionDataset) -> Any:
    return dataset.take(th.arange(len(dataset)))


def assert_transitions(dataset: TransitionDataset, episodes: list[RecordedEpisode], transpose: str | None = None) -> None:
    """Compare a data set with the definition of its transitions, one by one."""
    expected = [transition for episode in episodes for transition in episode.transitions()]
    assert len(dataset) == len(expected)
    samples = everything(dataset)
    for i, transition in enumerate(expected):
        for actual, wanted in (
            (samples.observations, transition.observation),
            (samples.next_observations, transition.next_observation),
        ):
            for key, array in wanted.items() if isinstance(wanted, dict) else [(None, wanted)]:
                array = np.transpose(array, (2, 0, 1)) if key is not None and key == transpose else array
                np.testing.assert_array_equal((actual if key is None else actual[key])[i].numpy(), array)
        np.testing.assert_array_equal(samples.actions[i].numpy().squeeze(), np.squeeze(transition.action))
        assert samples.rewards[i].item() == np.float32(transition.reward)
        assert samples.dones[i].item() == float(transition.terminated)


@ON_DISK
def test_hand_computed_transitions(tmp_path: Path, on_disk: bool):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    samples = everything(load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=on_disk))

    # First components of the observations: 0, 3, 6, 9 in the first episode, 12, 15, 18 in the second (in fiftieths)
    assert (samples.observations[:, 0] * 50).round().tolist() == [0, 3, 6, 12, 15]
    # After the truncated last step comes 18, seen after it, and not the first observation of any episode
    assert (samples.next_observations[:, 0] * 50).round().tolist() == [3, 6, 9, 15, 18]
    assert samples.actions.tolist() == [[-2], [0.5], [2], [1], [-1]]
    assert samples.rewards.tolist() == [[1], [2], [3], [4], [5]]
    assert samples.dones.tolist() == [[0], [0], [1], [0], [0]], "the truncated step is not terminated"
    assert samples.discounts is None
    assert samples.actions.dtype == samples.rewards.dtype == samples.dones.dtype == th.float32


DICT_SPACE = spaces.Dict(
    {
        "image": spaces.Box(0, 255, (36, 40, 3), np.uint8),
        "matrix": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
        "vector": spaces.Box(-np.inf, np.inf, (4,), np.float32),
    }
)


def random_episodes(action_space: spaces.Space, seed: int, dict_observations: bool) -> list[RecordedEpisode]:
    rng = np.random.default_rng(seed)
    action_space.seed(seed)
    episodes = []
    for terminated, length in ((True, 7), (False, 1), (False, 12), (True, 3)):
        observations: Any = rng.normal(size=(length + 1, 4)).astype(np.float32)
        if dict_observations:
            observations = {
                "image": rng.integers(0, 256, (length + 1, 36, 40, 3), dtype=np.uint8),
                "matrix": rng.normal(size=(length + 1, 2, 3)).astype(np.float32).astype(np.float64),
                "vector": observations,
            }
        actions = np.stack([action_space.sample() for _ in range(length)])
        episodes.append(RecordedEpisode(observations, actions, rng.normal(size=length), terminated))
    return episodes


@ON_DISK
@pytest.mark.parametrize("action_space", [spaces.Discrete(3, start=2), spaces.Box(-1, 3, (2,), np.float32)], ids=str)
@pytest.mark.parametrize("dict_observations", [False, True], ids=["vector", "dict"])
def test_equals_a_loop_over_episodes(tmp_path: Path, action_space: spaces.Space, dict_observations: bool, on_disk: bool):
    episodes = random_episodes(action_space, seed=0, dict_observations=dict_observations)
    data_space: spaces.Space = DICT_SPACE if dict_observations else DICT_SPACE["vector"]
    folder = write_dataset(tmp_path / "data", data_space, action_space, episodes)
    # As the algorithm sees it: behind VecTransposeImage
    env_space = spaces.Dict({**DICT_SPACE.spaces, "image": spaces.Box(0, 255, (3, 36, 40), np.uint8)})
    dataset = load_dataset(folder, env_space if dict_observations else data_space, action_space, optimize_memory_usage=on_disk)
    assert_transitions(dataset, episodes, transpose="image")
    samples = everything(dataset)
    assert samples.actions.dtype == (th.int64 if isinstance(action_space, spaces.Discrete) else th.float32)
    if dict_observations:
        assert samples.observations["image"].dtype == th.uint8


def test_image_observations_and_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Minari keeps images as JPEG files; frames of one colour survive that within rounding."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = spaces.Box(0, 255, (40, 48, 3), np.uint8)
    frames = np.stack([np.full(space.shape, colour, np.uint8) for colour in (10, 90, 170)])
    buffer = EpisodeBuffer(
        observations=list(frames),
        actions=[0, 1],
        rewards=[0.0, 1.0],
        terminations=[False, False],
        truncations=[False, True],
    )
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            "test/images-v0", [buffer], observation_space=space, action_space=spaces.Discrete(2)
        )
    dataset = load_dataset("test/images-v0", spaces.Box(0, 255, (3, 40, 48), np.uint8), spaces.Discrete(2))
    samples = everything(dataset)
    assert samples.observations.shape == (2, 3, 40, 48)
    np.testing.assert_allclose(samples.observations[:, 0, 0, 0], [10, 90], atol=2)
    np.testing.assert_allclose(samples.next_observations[:, 2, 5, 7], [90, 170], atol=2)


def test_bytes_that_are_no_images(tmp_path: Path):
    # As a data set that Minari makes says by default
    space = spaces.Box(0, 255, (6,), np.uint8)
    observations = np.arange(18, dtype=np.uint8).reshape(3, 6)
    episode = RecordedEpisode(observations, np.array([0, 1]), np.array([0.0, 1.0]))
    folder = write_dataset(tmp_path / "data", space, spaces.Discrete(2), [episode], jpeg_encoding=True)
    assert everything(load_dataset(folder, space, spaces.Discrete(2))).observations.tolist() == observations[:2].tolist()


def test_pieces_of_long_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An episode that is read in many pieces has no seams."""
    monkeypatch.setattr("sb3_ext.offline.sources.PIECE_NBYTES", 100)
    episodes = random_episodes(spaces.Discrete(2), seed=1, dict_observations=False)
    folder = write_dataset(tmp_path / "data", DICT_SPACE["vector"], spaces.Discrete(2), episodes)
    assert_transitions(load_dataset(folder, DICT_SPACE["vector"], spaces.Discrete(2)), episodes)


def test_the_same_generator_gives_the_same_batches(tmp_path: Path):
    """Also when the generator is used for something else, or the batch size changes, so that nothing could be foreseen."""
    episodes = random_episodes(spaces.Discrete(2), seed=2, dict_observations=False)
    folder = write_dataset(tmp_path / "data", DICT_SPACE["vector"], spaces.Discrete(2), episodes)
    memory, disk = (
        load_dataset(folder, DICT_SPACE["vector"], spaces.Discrete(2), optimize_memory_usage=on_disk)
        for on_disk in (False, True)
    )
    generators = [th.Generator().manual_seed(3) for _ in range(2)]
    seen = set()
    for step in range(200):
        if step % 50 == 49:
            for generator in generators:
                th.rand(1, generator=generator)
        batch_size = 4 if step < 100 else 7
        one, other = (
            dataset.sample(batch_size, generator) for dataset, generator in zip((memory, disk), generators, strict=True)
        )
        for left, right in zip(one[:5], other[:5], strict=True):
            assert th.equal(left, right)
        seen.update(one.rewards.flatten().tolist())
    assert len(seen) == len(memory), "every transition is drawn at some time"
    assert th.equal(generators[0].get_state(), generators[1].get_state())


def test_batches_are_read_ahead(tmp_path: Path):
    """Otherwise the data on disk would be much slower than those in memory."""
    rng = np.random.default_rng(0)
    episode = RecordedEpisode(rng.normal(size=(1001, 4)).astype(np.float32), rng.integers(0, 2, 1000), rng.normal(size=1000))
    folder = write_dataset(tmp_path / "data", DICT_SPACE["vector"], spaces.Discrete(2), [episode])
    dataset = load_dataset(folder, DICT_SPACE["vector"], spaces.Discrete(2), optimize_memory_usage=True)
    reads = []
    ahead: Any = dataset._read_ahead
    assert isinstance(ahead, ReadAhead)
    read, ahead._read = ahead._read, lambda *arguments: (reads.append(arguments), read(*arguments))
    generator = th.Generator().manual_seed(0)
    for _ in range(273):
        dataset.sample(4, generator)
    # 1 + 8 + 64 + 200, at most the whole data set at once: 250 batches
    assert len(reads) == 4


def fill(buffer: ReplayBuffer, steps: list[tuple]) -> ReplayBuffer:
    for step in steps:
        buffer.add(*step)
    return buffer


def step(values: list[float], next_values: list[float], action: list[float], done: list[bool], timeout: list[bool]) -> tuple:
    """One step of as many environments as there are values; observations have three equal components, rewards are values."""
    observations, next_observations = (np.repeat(np.array(v, np.float32)[:, None], 3, axis=1) for v in (values, next_values))
    infos = [{"TimeLimit.truncated": t} for t in timeout]
    return observations, next_observations, np.array(action)[:, None], np.array(values), np.array(done), infos


def pendulum_buffer(n_envs: int = 2, size: int = 5) -> ReplayBuffer:
    return ReplayBuffer(size * n_envs, *PENDULUM_SPACES, device="cpu", n_envs=n_envs)


@ON_DISK
def test_replay_buffer(on_disk: bool):
    """Two environments, one after the other; only what is filled; actions in the environment's units."""
    buffer = fill(
        pendulum_buffer(),
        [
            step([0.0, 0.5], [0.1, 0.6], [-1.0, 1.0], [False, False], [False, False]),
            # Environment 0 terminates (it then starts at 0.4), environment 1 is truncated (it starts at 0.9)
            step([0.1, 0.6], [0.2, 0.7], [0.0, 0.5], [True, True], [False, True]),
            step([0.4, 0.9], [0.3, 0.8], [0.25, 0.0], [False, False], [False, False]),
        ],
    )
    samples = everything(load_dataset(buffer, *PENDULUM_SPACES, optimize_memory_usage=on_disk))
    np.testing.assert_allclose(samples.observations[:, 1], [0.0, 0.1, 0.4, 0.5, 0.6, 0.9])
    np.testing.assert_allclose(samples.next_observations[:, 1], [0.1, 0.2, 0.3, 0.6, 0.7, 0.8])
    assert samples.actions.flatten().tolist() == [-2, 0, 0.5, 2, 1, 0]
    assert samples.dones.flatten().tolist() == [0, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(samples.rewards[:, 0], [0.0, 0.1, 0.4, 0.5, 0.6, 0.9])


def test_full_replay_buffer_is_read_in_the_order_of_time():
    """A full buffer continues at its start, and what it overwrote is gone: 3, 4 and 5 are there, and 6."""
    buffer = pendulum_buffer(n_envs=1, size=4)
    values = [0.1 * i for i in range(8)]
    fill(buffer, [step([values[i]], [values[i + 1]], [0.0], [False], [False]) for i in range(7)])
    dataset = load_dataset(buffer, *PENDULUM_SPACES)
    samples = everything(dataset)
    np.testing.assert_allclose(samples.observations[:, 0], values[3:7], rtol=1e-6)
    np.testing.assert_allclose(samples.next_observations[:, 0], values[4:8], rtol=1e-6)
    # One episode of four steps: five rows of [3 observations | action | reward | terminated], and four row numbers
    assert dataset.nbytes == 5 * 6 * 4 + 4 * 4


@ON_DISK
def test_frame_replay_buffer(on_disk: bool):
    """Episodes so short that frames of the oldest transitions are gone: what is left is what a plain buffer holds."""
    space, n_rows = spaces.Box(0, 255, (4, 13, 14), np.uint8), 40
    frames = FrameReplayBuffer(n_rows, space, spaces.Discrete(2), device="cpu")
    plain = ReplayBuffer(n_rows, space, spaces.Discrete(2), device="cpu")
    rng, stack = np.random.default_rng(0), np.zeros(space.shape, np.uint8)
    for i in range(100):
        next_stack = np.concatenate([stack[1:], rng.integers(0, 256, (1, 13, 14), np.uint8)])
        done = i % 6 == 5
        for buffer in (frames, plain):
            infos = [{"TimeLimit.truncated": i % 12 == 5}]
            buffer.add(stack[None], next_stack[None], np.array([[i % 2]]), np.array([i]), np.array([done]), infos)
        stack = rng.integers(0, 256, space.shape, np.uint8) if done else next_stack
    assert frames.n_given_up > 0
    ours, expected = (
        everything(load_dataset(buffer, space, spaces.Discrete(2), optimize_memory_usage=on_disk))
        for buffer in (frames, plain)
    )
    for actual, wanted in zip(ours[:5], expected[:5], strict=True):
        th.testing.assert_close(actual, wanted[frames.n_given_up :], rtol=0, atol=0)


def test_replay_buffer_without_a_done_between_episodes():
    """Learning that was continued starts anew without the last episode having ended."""
    buffer = fill(
        pendulum_buffer(n_envs=1),
        [
            step([0.0], [0.1], [0.0], [False], [False]),
            step([0.7], [0.8], [0.0], [False], [False]),
        ],
    )
    samples = everything(load_dataset(buffer, *PENDULUM_SPACES))
    np.testing.assert_allclose(samples.next_observations[:, 0], [0.1, 0.8])


def test_dict_replay_buffer_from_a_pickle(tmp_path: Path):
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "image": spaces.Box(0, 255, (3, 36, 36), np.uint8)})
    buffer = DictReplayBuffer(10, space, spaces.Discrete(3, start=1), device="cpu")
    space.seed(0)
    observations = [{key: value[None] for key, value in space.sample().items()} for _ in range(4)]
    for i in range(3):
        buffer.add(observations[i], observations[i + 1], np.array([i + 1]), np.array([i]), np.array([i == 2]), [{}])
    path = tmp_path / "replay_buffer.pkl"
    path.write_bytes(pickle.dumps(buffer))
    samples = everything(load_dataset(path, space, spaces.Discrete(3, start=1), allow_pickle=True))
    assert samples.actions.flatten().tolist() == [1, 2, 3]
    assert samples.dones.flatten().tolist() == [0, 0, 1]
    for i in range(3):
        for key in space.spaces:
            np.testing.assert_array_equal(samples.observations[key][i], observations[i][key][0])
            np.testing.assert_array_equal(samples.next_observations[key][i], observations[i + 1][key][0])


def test_all_ways_to_name_a_minari_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = write_dataset(tmp_path / "test" / "data-v0", *PENDULUM_SPACES, pendulum_episodes())
    dataset = minari.load_dataset("test/data-v0")
    for source in ("test/data-v0", str(folder), folder, folder / "data", dataset):
        assert_transitions(load_dataset(source, *PENDULUM_SPACES), pendulum_episodes())
    truncated = dataset.filter_episodes(lambda episode: not episode.terminations.any())
    assert_transitions(load_dataset(truncated, *PENDULUM_SPACES), pendulum_episodes()[1:])


def test_float_precision_of_the_spaces_may_differ(tmp_path: Path):
    episodes = [episode._replace(observations=episode.observations.astype(np.float64)) for episode in pendulum_episodes()]
    space = PENDULUM_SPACES[0]
    folder = write_dataset(tmp_path, spaces.Box(space.low, space.high, dtype=np.float64), PENDULUM_SPACES[1], episodes)
    assert everything(load_dataset(folder, *PENDULUM_SPACES)).observations.dtype == th.float32


def test_actions_outside_by_rounding_are_clipped(tmp_path: Path):
    episode = pendulum_episodes()[0]._replace(actions=np.array([[-2.000001], [0.5], [2.000001]]))
    samples = everything(load_dataset(write_dataset(tmp_path, *PENDULUM_SPACES, [episode]), *PENDULUM_SPACES))
    assert samples.actions.flatten().tolist() == [-2, 0.5, 2]


def test_normalized_score(tmp_path: Path):
    folder = write_dataset(tmp_path / "a", *PENDULUM_SPACES, pendulum_episodes(), ref_min_score=-1000, ref_max_score=-200)
    assert load_dataset(folder, *PENDULUM_SPACES).normalized_score(-400) == pytest.approx(75)
    without = write_dataset(tmp_path / "b", *PENDULUM_SPACES, pendulum_episodes())
    assert load_dataset(without, *PENDULUM_SPACES).normalized_score(-400) is None


def rows_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(".rows-*"))


def test_rows_on_disk_are_written_once_and_checked(tmp_path: Path):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())

    def load() -> TransitionDataset:
        return load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)

    load()
    (rows,) = rows_folders(folder)
    inode = (rows / "floats").stat().st_ino
    assert_transitions(load(), pendulum_episodes())
    assert (rows / "floats").stat().st_ino == inode, "the files are used again"

    with open(rows / "floats", "r+b") as file:
        file.truncate(20)
    assert_transitions(load(), pendulum_episodes())

    os.utime(folder / "data" / "main_data.hdf5", ns=(1, 1))
    load()
    assert len(rows_folders(folder)) == 2, "a changed data set is read again"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_rows_that_another_process_writes_at_the_same_time(tmp_path: Path, is_damaged: bool):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    source = open_source(folder)
    if is_damaged:
        load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
        (rows,) = rows_folders(folder)
        (rows / "floats").write_bytes(b"")
    read, inodes = source.pieces, []

    def pieces() -> Iterator[Any]:
        yield from read()
        # The other one is ready first
        other: Any = load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
        inodes.append((other._rows.path / "floats").stat().st_ino)

    source.pieces = pieces  # type: ignore[method-assign]
    dataset = TransitionDataset(source, *PENDULUM_SPACES, optimize_memory_usage=True)
    assert_transitions(dataset, pendulum_episodes())
    (rows,) = rows_folders(folder)
    assert [(rows / "floats").stat().st_ino] == inodes


def test_rows_on_disk_are_for_all_who_may_read_the_data(tmp_path: Path):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
    (rows,) = rows_folders(folder)
    assert rows.stat().st_mode == folder.stat().st_mode


def test_what_killed_processes_have_left_is_removed(tmp_path: Path):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
    (rows,) = rows_folders(folder)
    abandoned, growing = (rows.with_name(f"{rows.name}.{name}") for name in ("abandoned", "growing"))
    shutil.copytree(rows, abandoned)
    rows.rename(growing)
    for path in (abandoned, *abandoned.iterdir()):
        os.utime(path, (1, 1))
    load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
    assert rows_folders(folder) == sorted([rows, growing])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_data_on_disk_can_be_copied(tmp_path: Path, copied: Callable[[TransitionDataset], TransitionDataset]):
    folder = write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    dataset = load_dataset(folder, *PENDULUM_SPACES, optimize_memory_usage=True)
    other = copied(dataset)
    assert_transitions(other, pendulum_episodes())
    assert_transitions(dataset, pendulum_episodes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that share open files")
def test_processes_that_share_open_files_read_what_they_ask_for(tmp_path: Path):
    script = tmp_path / "fork.py"
    write_large(tmp_path / "data", 20_000, 4)
    script.write_text("""
import os
import sys

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ext.offline import load_dataset

th.set_num_threads(1)
data = sys.argv[1], spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
expected = load_dataset(*data).take(th.arange(20_000)).observations
dataset = load_dataset(*data, optimize_memory_usage=True)
is_parent = os.fork() > 0
th.manual_seed(int(is_parent))
try:
    for _ in range(1000):
        indices = th.randint(20_000, (20,))
        assert th.equal(dataset.take(indices).observations, expected[indices])
finally:
    if not is_parent:
        os._exit(sys.exc_info()[0] is not None)
assert os.wait()[1] == 0
""")
    subprocess.run([sys.executable, script, tmp_path / "data"], check=True, timeout=120)


def test_keys_of_observations_can_be_paths(tmp_path: Path):
    space = spaces.Dict({"walker/position": spaces.Box(-1, 1, (2,)), "walker/speed": spaces.Box(-1, 1, (1,))})
    observations = {"walker/position": np.arange(8.0).reshape(4, 2) / 8, "walker/speed": np.arange(4.0)[:, None] / 4}
    observations = {key: array.astype(np.float32) for key, array in observations.items()}
    episode = RecordedEpisode(observations, np.zeros((3, 1), np.float32), np.arange(3.0))
    folder = write_dataset(tmp_path / "data", space, PENDULUM_SPACES[1], [episode])
    assert_transitions(load_dataset(folder, space, PENDULUM_SPACES[1]), [episode])


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_dataset(tmp_path / "data", *PENDULUM_SPACES, pendulum_episodes())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_transitions(load_dataset("~/data", *PENDULUM_SPACES), pendulum_episodes())
    with pytest.raises(DatasetNotFoundError, match="is no data set: give an id, a folder with"):
        load_dataset("~/data/data/main_data.hdf5", *PENDULUM_SPACES)


def test_what_is_read_ahead_has_room_for_its_indices(tmp_path: Path):
    buffer = fill(pendulum_buffer(n_envs=1), [step([0.0], [0.1], [0.0], [False], [False])])
    rows: Any = load_dataset(buffer, *PENDULUM_SPACES, optimize_memory_usage=True)._rows
    # Six numbers of a row, and the observation behind them
    ahead = ReadAhead(rows, 1_000_000, row_nbytes=36, max_nbytes=100_000)
    assert ahead._max_transitions == 1000


def test_rows_of_data_in_memory_go_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    buffer = fill(pendulum_buffer(n_envs=1), [step([0.0], [0.1], [0.0], [False], [False])])
    dataset = load_dataset(buffer, *PENDULUM_SPACES, optimize_memory_usage=True)
    assert len(rows_folders(tmp_path)) == 1
    del dataset
    gc.collect()
    assert rows_folders(tmp_path) == []


def test_shipped_datasets():
    """What the examples and the default hyperparameters rely on: deliberately mediocre behaviour."""
    size = 0
    for env_id, dataset_id, low, high in (
        ("CartPole-v1", "sb3-ext/cartpole/replay-v0", 100, 300),
        ("Pendulum-v1", "sb3-ext/pendulum/replay-v0", -900, -400),
    ):
        env = gym.make(env_id)
        dataset = load_dataset(dataset_id, env.observation_space, env.action_space)
        # Read by Minari itself, too
        episodes = list(minari.MinariDataset(SHIPPED_ROOT / dataset_id / "data").iterate_episodes())
        returns = [episode.rewards.sum() for episode in episodes]
        assert low <= np.mean(returns) <= high
        assert np.mean(returns) == pytest.approx(dataset.metadata["mean_return"], rel=1e-5)
        assert sum(map(len, episodes)) == len(dataset)
        assert dataset.metadata["command"].startswith("python -m sb3_ext.offline.collect --algo ")
        assert dataset.metadata["dataset_id"] == dataset_id
        assert dataset.metadata["ref_min_score"] < dataset.metadata["ref_max_score"]
        size += sum(path.stat().st_size for path in (SHIPPED_ROOT / dataset_id).rglob("*") if path.is_file())
    assert size <= 2e6


# Loads a data set and prints by how many bytes the peak of resident memory has grown since the imports
MEASURE = """
import sys, numpy as np, torch as th
from gymnasium import spaces
from sb3_ext.offline import load_dataset
import h5py, minari

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

observation_space, action_space = spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
# What the first use of each library takes
load_dataset(sys.argv[1] + "/small", observation_space, action_space).sample(256, th.Generator())
before = peak()
dataset = load_dataset(sys.argv[1] + "/large", observation_space, action_space, optimize_memory_usage=sys.argv[2] == "disk")
generator = th.Generator().manual_seed(0)
for _ in range(int(sys.argv[3])):
    dataset.sample(256, generator)
print(len(dataset), peak() - before)
"""


def write_large(folder: Path, n_steps: int, n_episodes: int) -> None:
    rng = np.random.default_rng(0)
    length = n_steps // n_episodes
    episode = RecordedEpisode(
        rng.random((length + 1, 17), dtype=np.float32), rng.random((length, 6), dtype=np.float32), np.zeros(length, np.float32)
    )
    space = spaces.Box(-np.inf, np.inf, (17,), np.float32)
    write_dataset(folder, space, spaces.Box(-1, 1, (6,), np.float32), [episode] * n_episodes)


def measure(folder: Path, storage: str, n_batches: int) -> tuple[int, int]:
    write_large(folder / "small", 100, 1)
    command = [sys.executable, "-c", MEASURE, folder, storage, str(n_batches)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert process.returncode == 0, process.stderr
    n_transitions, growth = process.stdout.split()
    return int(n_transitions), int(growth)


# Observation, next observation, action, reward and done as float32
TRANSITION_NBYTES = (2 * 17 + 6 + 2) * 4
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


@LINUX
def test_memory_of_a_million_transitions(tmp_path: Path):
    write_large(tmp_path / "large", 1_000_000, 1000)
    n_transitions, growth = measure(tmp_path, "memory", 10)
    assert n_transitions == 1_000_000
    assert growth <= 1.2 * n_transitions * TRANSITION_NBYTES


@LINUX
def test_bounded_memory_for_data_on_disk(tmp_path: Path):
    """Five million transitions (840 MB), within the memory that ``optimize_memory_usage`` promises."""
    write_large(tmp_path / "large", 5_000_000, 5)
    n_transitions, growth = measure(tmp_path, "disk", 12_000)
    assert n_transitions == 5_000_000
    assert growth <= 400e6 < 0.5 * n_transitions * TRANSITION_NBYTES
