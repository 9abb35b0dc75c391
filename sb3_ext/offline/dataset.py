"""Transitions recorded earlier, checked once and ready to be sampled."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.utils import get_device

from sb3_ext.offline.errors import EmptyDatasetError
from sb3_ext.offline.layout import Layout, Samples
from sb3_ext.offline.sources import Source, open_source
from sb3_ext.offline.storage import DiskRows, MemoryRows, ReadAhead, draw
from sb3_ext.offline.validation import ValueChecker, check_spaces

if TYPE_CHECKING:
    from minari import MinariDataset


class TransitionDataset:
    """
    All transitions of a data set.

    ``terminated`` and ``truncated`` stay apart: ``dones`` in a batch are 1 only where the environment terminated, and the
    next observation of the last step of an episode is the one observed after it, never the first of another episode.

    :param source: an opened data set
    :param observation_space: of the environment, as the algorithm sees it: with images channel-first
    :param action_space: of the environment
    :param device: on which batches are returned, and on which the data lie unless ``optimize_memory_usage``
    :param optimize_memory_usage: leave the data on disk; they then take at most about 400 MB of resident memory
    :raises DatasetError: as ``load_dataset``
    """

    def __init__(
        self,
        source: Source,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "cpu",
        optimize_memory_usage: bool = False,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.metadata = source.metadata
        self.device = get_device(device)
        check_spaces(source.name, (source.observation_space, source.action_space), (observation_space, action_space))
        lengths = source.lengths[source.lengths > 0]
        self._n_transitions = int(lengths.sum())
        if self._n_transitions == 0:
            raise EmptyDatasetError(f"The data set '{source.name}' holds no transition.")

        self._layout = Layout(observation_space, action_space)
        checker = ValueChecker(source.name, source.observation_space, action_space)
        pieces = checker.check_all(source.pieces())
        self._rows: MemoryRows | DiskRows
        self._read_ahead: ReadAhead | None = None
        if optimize_memory_usage:
            identity = source.identity and {**source.identity, "spaces": [repr(observation_space), repr(action_space)]}
            self._rows = DiskRows(self._layout, lengths, pieces, source.folder, identity)
            self._read_ahead = ReadAhead(self._rows, self._n_transitions, 2 * self._layout.row_nbytes)
        else:
            self._rows = MemoryRows(self._layout, lengths, pieces, self.device)

    def __len__(self) -> int:
        """:return: number of transitions"""
        return self._n_transitions

    @property
    def nbytes(self) -> int:
        """Bytes that the transitions take, in memory or on disk."""
        return self._rows.nbytes

    def sample(self, batch_size: int, generator: th.Generator) -> Samples:
        """
        Draw transitions uniformly, with replacement. A generator in the same state gives the same batch, from memory as from
        disk. From disk it is fast only if nothing else is drawn from the generator between two batches.

        :param batch_size: number of transitions
        :param generator: advanced by one ``torch.randint``
        :return: ``observations``, ``actions`` (in the environment's units: (batch, dim) float32, or (batch, 1) int64),
            ``next_observations``, ``dones`` (1 where terminated) and ``rewards``, (batch, 1) float32; ``discounts`` is None
        """
        if self._read_ahead is not None:
            return self._decode(self._read_ahead.next(batch_size, generator))
        return self.take(draw(self._n_transitions, batch_size, generator))

    def take(self, indices: th.Tensor) -> Samples:
        """
        :param indices: int64, (batch,), each from 0 to ``len(self) - 1``, in the order of the data set's steps
        :return: these transitions, as ``sample`` returns them
        """
        device = "cpu" if self._read_ahead is not None else self.device
        return self._decode(self._rows.gather(indices.to(device)))

    def _decode(self, planes: dict[str, th.Tensor]) -> Samples:
        return self._layout.decode({name: plane.to(self.device) for name, plane in planes.items()})

    def normalized_score(self, mean_return: float) -> float | None:
        """
        :param mean_return: of an agent's episodes
        :return: 0 for the data set's ``ref_min_score`` (a random agent), 100 for its ``ref_max_score``; None if it has none
        """
        low, high = self.metadata.get("ref_min_score"), self.metadata.get("ref_max_score")
        if low is None or high is None or low == high:
            return None
        return 100 * (mean_return - low) / (high - low)


def load_dataset(
    source: "str | Path | ReplayBuffer | MinariDataset | None",
    observation_space: spaces.Space,
    action_space: spaces.Space,
    *,
    device: th.device | str = "cpu",
    allow_pickle: bool = False,
    optimize_memory_usage: bool = False,
    env_id: str | None = None,
) -> TransitionDataset:
    """
    Read and check a data set.

    :param source: id of a Minari data set (in Minari's local folder, or shipped with this package), path of a Minari data set,
        path of a ``replay_buffer.pkl``, a ``ReplayBuffer``, or a ``minari.MinariDataset``
    :param observation_space: of the environment, as the algorithm sees it: with images channel-first
    :param action_space: of the environment
    :param device: on which batches are returned
    :param allow_pickle: open a ``.pkl``, which can run any code that was put into it
    :param optimize_memory_usage: leave the data on disk, for data sets larger than memory
    :param env_id: id of the environment, for which the message says how to make a data set when there is none
    :return: the transitions
    :raises DatasetError: one subclass per kind of mistake, see ``sb3_ext.offline.errors``
    """
    opened: Any = open_source(source, allow_pickle, env_id)
    return TransitionDataset(opened, observation_space, action_space, device, optimize_memory_usage)
