"""Reads data sets of any accepted kind as a stream of pieces of episodes, with bounded memory."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_ext.common.frame_replay_buffer import FrameReplayBuffer
from sb3_ext.offline.catalog import find_folder, not_found
from sb3_ext.offline.errors import CorruptDatasetError, PickleConsentError, UnsupportedDataError
from sb3_ext.offline.layout import Observations, Piece

if TYPE_CHECKING:
    import h5py
    from minari import MinariDataset

# Upper bound of what is held of a source while its rows are packed
PIECE_NBYTES = 4 * 2**20
# HDF5 keeps what it has read about every group, some 25 kB, until the file is closed
EPISODES_PER_OPENING = 500


class Source(ABC):
    """
    One opened data set.

    ``lengths`` has the number of steps of each episode, in order; ``identity`` says which data these are: it changes when
    the files do, and is None when they are only in memory.
    """

    name: str
    observation_space: spaces.Space
    action_space: spaces.Space
    metadata: dict[str, Any]
    lengths: np.ndarray
    identity: dict[str, Any] | None = None
    folder: Path | None = None

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """
        :return: the episodes in order, each cut into pieces of about ``PIECE_NBYTES``
        """


def open_source(source: Any, allow_pickle: bool = False, env_id: str | None = None) -> Source:
    """
    :param source: Minari id, path, replay buffer or Minari data set
    :param allow_pickle: whether pickles, which can run any code, may be opened
    :param env_id: id of the training environment, for the message when nothing is found
    :raises DatasetError: when it cannot be opened
    """
    if isinstance(source, ReplayBuffer):
        return BufferSource(source, f"{type(source).__name__} in memory")
    if isinstance(source, (str, Path)):
        return _open_path(source, allow_pickle, env_id)
    if source is None:
        raise not_found(source, env_id)

    from minari import MinariDataset

    if isinstance(source, MinariDataset):
        return MinariSource(source)
    raise UnsupportedDataError(
        "A data set is given as a Minari id, the path of a Minari data set or of a replay_buffer.pkl, an SB3 ReplayBuffer, or "
        f"a minari.MinariDataset, not as {type(source).__name__}."
    )


def _open_path(source: str | Path, allow_pickle: bool, env_id: str | None) -> Source:
    if Path(source).suffix == ".pkl":
        path = Path(source).expanduser()
        if not path.is_file():
            raise not_found(source, env_id)
        return BufferSource(_unpickle(path, allow_pickle), path.name, path)

    data = find_folder(source, env_id)

    from minari import MinariDataset

    try:
        return MinariSource(MinariDataset(data))
    except (AssertionError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, CorruptDatasetError):
            raise
        raise CorruptDatasetError(f"The data set {data} cannot be opened: {type(error).__name__}: {error}") from error


def _unpickle(path: Path, allow_pickle: bool) -> ReplayBuffer:
    if not allow_pickle:
        raise PickleConsentError(
            f"{path} is a pickle, and loading a pickle can run any code that was put into it. If you made the file or trust "
            "whoever did, say so: allow_pickle=True (from the shell: -params allow_pickle:True)."
        )
    try:
        buffer = load_from_pkl(path)
    # A damaged pickle can raise nearly anything
    except Exception as error:
        raise CorruptDatasetError(f"{path} is no intact pickle: {type(error).__name__}: {error}") from error
    if not isinstance(buffer, ReplayBuffer):
        raise UnsupportedDataError(f"{path} holds a {type(buffer).__name__}, not an SB3 ReplayBuffer.")
    return buffer


def _file_identity(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"file": path.name, "size": stat.st_size, "modified": stat.st_mtime_ns}


class MinariSource(Source):
    """
    Episodes of a Minari data set; infos are not read.

    :param dataset: the data set, possibly filtered
    """

    def __init__(self, dataset: "MinariDataset") -> None:
        self.name = dataset.id
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space
        data = Path(dataset.storage.data_path)
        self.metadata = json.loads((data / "metadata.json").read_text())
        self._storage = dataset.storage
        self._episodes = [int(index) for index in dataset.episode_indices]
        self._jpeg = self.metadata.get("jpeg_encoding", True)
        self._file = data / "main_data.hdf5"
        self.folder = data.parent if data.name == "data" else data
        if self.metadata["data_format"] == "hdf5":
            self.lengths = np.array(list(self._guarded(self._hdf5_lengths())), dtype=np.int64)
            if len(self._episodes) == self.metadata["total_episodes"] and self.lengths.sum() != self.metadata["total_steps"]:
                raise CorruptDatasetError(
                    f"The data set '{self.name}' should have {self.metadata['total_steps']} steps, but {self._file} has "
                    f"{self.lengths.sum()}."
                )
            self.identity = {**_file_identity(self._file), "episodes": self._episodes}
        else:
            lengths = (episode["total_steps"] for episode in self._storage.get_episode_metadata(self._episodes))
            self.lengths = np.array(list(self._guarded(lengths)), dtype=np.int64)

    def _guarded(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """What HDF5, JSON, JPEG and Minari raise for damaged files, as one error."""
        try:
            yield from iterator
        except (AssertionError, AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CorruptDatasetError):
                raise
            raise CorruptDatasetError(f"The data set '{self.name}' ({self._file}) is damaged: {error}") from error

    def pieces(self) -> Iterator[Piece]:
        if self.metadata["data_format"] == "hdf5":
            return self._guarded(self._hdf5_pieces())
        return self._guarded(self._minari_pieces())

    def _hdf5_episodes(self) -> "Iterator[tuple[int, h5py.Group]]":
        import h5py

        for start in range(0, len(self._episodes), EPISODES_PER_OPENING):
            with h5py.File(self._file, "r") as file:
                for episode in self._episodes[start : start + EPISODES_PER_OPENING]:
                    yield episode, file[f"episode_{episode}"]

    def _hdf5_lengths(self) -> Iterator[int]:
        for episode, group in self._hdf5_episodes():
            n_steps = len(group["rewards"])
            lengths = {key: len(group[key]) for key in ("actions", "terminations", "truncations")}
            lengths.update({key or "observations": len(array) - 1 for key, array in _leaves(group["observations"])})
            for name, length in lengths.items():
                if length != n_steps:
                    raise CorruptDatasetError(
                        f"In episode {episode} of '{self.name}', {name} are for {length} steps, rewards for {n_steps}."
                    )
            yield n_steps

    def _hdf5_pieces(self) -> Iterator[Piece]:
        """Not through Minari, which reads whole episodes with their infos."""
        for (episode, group), n_steps in zip(self._hdf5_episodes(), self.lengths, strict=True):
            observations = dict(_leaves(group["observations"]))
            step_nbytes = sum(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in observations.values())
            size = max(PIECE_NBYTES // max(step_nbytes, 1), 1)
            for start in range(0, int(n_steps), size):
                stop = min(start + size, int(n_steps))
                last = int(stop == n_steps)
                yield Piece(
                    episode,
                    start,
                    {key: self._decode(key, array[start : stop + last]) for key, array in observations.items()},
                    group["actions"][start:stop],
                    group["rewards"][start:stop],
                    group["terminations"][start:stop],
                )

    def _decode(self, key: str, array: np.ndarray) -> np.ndarray:
        """Images are kept as JPEG files, each an array of bytes, unless the data set says otherwise."""
        from minari.dataset.minari_storage import is_image_space

        space = self.observation_space[key] if isinstance(self.observation_space, spaces.Dict) else self.observation_space
        if self._jpeg and is_image_space(space) and (array.dtype == object or array.ndim == 2):
            from PIL import Image

            return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in array])
        return array

    def _minari_pieces(self) -> Iterator[Piece]:
        for episode in self._storage.get_episodes(self._episodes):
            observations = episode["observations"]
            yield Piece(
                episode["id"],
                0,
                observations if isinstance(observations, dict) else {"": observations},
                episode["actions"],
                episode["rewards"],
                episode["terminations"],
            )


def _leaves(node: "h5py.Group | h5py.Dataset", key: str = "") -> Iterator[tuple[str, "h5py.Dataset"]]:
    if hasattr(node, "keys"):
        for name in node.keys():
            # Keys of a Dict space can be paths, such as dm_control's "walker/position"
            yield from _leaves(node[name], f"{key}/{name}" if key else name)
    else:
        yield key, node


class BufferSource(Source):
    """
    What an SB3 replay buffer has been filled with, in the order of time, one environment after the other.

    SB3 keeps observations and rewards as the environment gave them (before VecNormalize), and Box actions scaled to
    [-1, 1]; these are scaled back. A transition continues an episode when its observation is the next observation of the
    one before.

    :param buffer: the buffer
    :param name: for messages
    :param path: of the file it comes from, if any
    :raises UnsupportedDataError: with ``optimize_memory_usage=True``: such a buffer has lost the observations in which
        episodes were truncated
    """

    def __init__(self, buffer: ReplayBuffer, name: str, path: Path | None = None) -> None:
        if buffer.optimize_memory_usage:
            raise UnsupportedDataError(
                f"{name} was made with optimize_memory_usage=True: it does not have the last observation of each episode. "
                "Make the buffer with optimize_memory_usage=False (from the shell: "
                '-params optimize_memory_usage:False replay_buffer_kwargs:"dict(handle_timeout_termination=True)").'
            )
        self.name = name
        self.observation_space = buffer.observation_space
        self.action_space = buffer.action_space
        self.metadata = {}
        if path is not None:
            self.folder = path.parent
            self.identity = _file_identity(path)
        self._buffer = buffer
        # Oldest first: a full buffer continues at its start
        self._order = np.roll(np.arange(buffer.size()), -buffer.pos if buffer.full else 0)
        if isinstance(buffer, FrameReplayBuffer):
            self._order = self._order[buffer.n_given_up :]
        self._ends = [self._episode_ends(env) for env in range(buffer.n_envs)]
        self.lengths = np.concatenate([np.diff(ends, prepend=0) for ends in self._ends])

    def _observations(self, next_observations: bool = False) -> Observations:
        arrays = self._buffer.next_observations if next_observations else self._buffer.observations
        return arrays if isinstance(self._buffer, DictReplayBuffer) else {"": arrays}  # type: ignore[return-value]

    def _piece_size(self) -> int:
        """:return: steps in a piece"""
        step_nbytes = sum(array[self._order[:1], 0].nbytes for array in self._observations().values())
        return max(PIECE_NBYTES // max(step_nbytes, 1), 1)

    def _episode_ends(self, env: int) -> np.ndarray:
        """:return: the number of transitions before the end of each episode of one environment"""
        if len(self._order) == 0:
            return np.zeros(0, dtype=np.int64)
        ends = self._buffer.dones[self._order, env] != 0
        here, there = self._order[:-1], self._order[1:]
        size = self._piece_size()
        for start in range(0, len(here), size):
            part = slice(start, start + size)
            for key, array in self._observations().items():
                following = self._observations(True)[key][here[part], env] != array[there[part], env]
                ends[:-1][part] |= following.reshape(len(following), -1).any(axis=1)
        ends[-1] = True
        return np.flatnonzero(ends) + 1

    def pieces(self) -> Iterator[Piece]:
        buffer, episode = self._buffer, 0
        size = self._piece_size()
        for env, ends in enumerate(self._ends):
            begin = 0
            for end in ends:
                for start in range(begin, end, size):
                    rows = self._order[start : min(start + size, end)]
                    observations = {key: array[rows, env] for key, array in self._observations().items()}
                    if start + size >= end:
                        final = self._observations(True)
                        observations = {
                            key: np.concatenate([array, final[key][rows[-1:], env]]) for key, array in observations.items()
                        }
                    yield Piece(
                        episode,
                        start - begin,
                        observations,
                        self._unscale(buffer.actions[rows, env]),
                        buffer.rewards[rows, env],
                        (buffer.dones[rows, env] * (1 - buffer.timeouts[rows, env])) != 0,
                    )
                begin, episode = end, episode + 1

    def _unscale(self, actions: np.ndarray) -> np.ndarray:
        if not isinstance(self.action_space, spaces.Box):
            return actions.reshape(-1)
        low, high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)
        return low + 0.5 * (actions + 1.0) * (high - low)
