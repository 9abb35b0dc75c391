"""How steps lie in memory and on disk: one row per observation, two planes of columns."""

from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_ext.offline.errors import UnsupportedDataError

Samples = ReplayBufferSamples | DictReplayBufferSamples
# One array per key of a Dict observation space; a plain space has the one key "".
Observations = dict[str, np.ndarray]


class Piece(NamedTuple):
    """
    Consecutive steps of one episode, as read from a source.

    The piece that ends an episode has one observation more than steps: what was observed after the last step.

    :param episode: number of the episode, for messages
    :param first_step: number of the first step within its episode, for messages
    """

    episode: int
    first_step: int
    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray


class _Part(NamedTuple):
    key: str
    shape: tuple[int, ...]
    size: int
    is_byte: bool


class Layout:
    """
    Packs steps into rows and unpacks batches of transitions.

    Row ``r`` of the ``floats`` plane is ``[observation | action | reward | terminated]`` (float32); row ``r`` of the
    ``bytes`` plane is what the observation has of ``uint8``, i.e. images. An episode of T steps takes T + 1 rows, so that
    the next observation of row ``r`` is the observation of row ``r + 1`` and every observation is stored once. A batch
    therefore reads *two* neighbouring rows per transition, as one gather from an overlapping view (``overlapping``).

    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: Box or Discrete
    :raises UnsupportedDataError: for other spaces
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        if not isinstance(action_space, (spaces.Box, spaces.Discrete)):
            raise UnsupportedDataError(f"Offline data need a Box or Discrete action space, not {action_space}.")
        self.action_space = action_space
        self.action_dim = get_action_dim(action_space)
        self.is_dict = isinstance(observation_space, spaces.Dict)
        subspaces = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        try:
            parts = [self._part(key, space) for key, space in subspaces.items()]
        except NotImplementedError as error:
            raise UnsupportedDataError(f"Offline data cannot have the observation space {observation_space}.") from error
        self.float_parts = [part for part in parts if not part.is_byte]
        self.byte_parts = [part for part in parts if part.is_byte]
        float_sizes = [part.size for part in self.float_parts]
        self._float_sizes = [*float_sizes, self.action_dim, 1, 1, *float_sizes]
        self._byte_sizes = [part.size for part in self.byte_parts] * 2
        self.widths = {"floats": sum(float_sizes) + self.action_dim + 2, "bytes": sum(self._byte_sizes) // 2}
        # Columns that a transition takes from the row of its next observation
        self._next_widths = {"floats": sum(float_sizes), "bytes": self.widths["bytes"]}
        self.row_nbytes = 4 * self.widths["floats"] + self.widths["bytes"]

    @staticmethod
    def _part(key: str, space: spaces.Space) -> _Part:
        shape = get_obs_shape(space)
        if not isinstance(shape, tuple):
            raise NotImplementedError(f"{space} is nested")
        return _Part(key, shape, int(np.prod(shape)), space.dtype == np.uint8)

    def overlapping(self, plane: th.Tensor, name: str) -> th.Tensor:
        """
        :param plane: (rows, width), contiguous
        :param name: "floats" or "bytes"
        :return: a view without copy, (rows - 1, width + columns of the next observation)
        """
        width = self.widths[name]
        return plane.as_strided((len(plane) - 1, width + self._next_widths[name]), (width, 1))

    def encode(self, piece: Piece) -> dict[str, np.ndarray]:
        """
        :param piece: checked steps, with the shapes of the spaces
        :return: rows of each plane that is not empty, one per observation
        """
        n_steps = len(piece.rewards)
        n_rows = max([n_steps, *(len(array) for array in piece.observations.values())])
        floats = np.zeros((n_rows, self.widths["floats"]), dtype=np.float32)
        column = self._copy(self.float_parts, piece.observations, floats)
        actions = piece.actions.reshape(n_steps, self.action_dim)
        # Counted from zero, so that float32 holds every discrete action exactly
        start = self.action_space.start if isinstance(self.action_space, spaces.Discrete) else 0
        floats[:n_steps, column : column + self.action_dim] = actions - start
        # The values have been checked, and too large ones are reported when all are read
        with np.errstate(over="ignore"):
            floats[:n_steps, -2] = piece.rewards
        floats[:n_steps, -1] = piece.terminations
        rows = {"floats": floats}
        if self.byte_parts:
            rows["bytes"] = np.empty((n_rows, self.widths["bytes"]), dtype=np.uint8)
            self._copy(self.byte_parts, piece.observations, rows["bytes"])
        return rows

    @staticmethod
    def _copy(parts: list[_Part], observations: Observations, plane: np.ndarray) -> int:
        column = 0
        for part in parts:
            array = observations[part.key]
            if array.shape[1:] != part.shape and array.ndim == 4:
                array = VecTransposeImage.transpose_image(array)
            plane[:, column : column + part.size] = array.reshape(len(array), part.size)
            column += part.size
        return column

    def decode(self, batch: dict[str, th.Tensor]) -> Samples:
        """
        :param batch: rows gathered from the overlapping views
        :return: the transitions; observations, actions, rewards and dones are views of the batch
        """
        floats = batch["floats"].split(self._float_sizes, dim=1)
        n = len(self.float_parts)
        actions, rewards, dones = floats[n : n + 3]
        observations = self._unflatten(self.float_parts, floats[:n])
        next_observations = self._unflatten(self.float_parts, floats[n + 3 :])
        if self.byte_parts:
            images = batch["bytes"].split(self._byte_sizes, dim=1)
            n = len(self.byte_parts)
            observations.update(self._unflatten(self.byte_parts, images[:n]))
            next_observations.update(self._unflatten(self.byte_parts, images[n:]))
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long()
            if self.action_space.start != 0:
                actions += int(self.action_space.start)
        if self.is_dict:
            return DictReplayBufferSamples(observations, actions, next_observations, dones, rewards)
        return ReplayBufferSamples(observations[""], actions, next_observations[""], dones, rewards)

    @staticmethod
    def _unflatten(parts: list[_Part], columns: tuple[th.Tensor, ...]) -> dict[str, th.Tensor]:
        return {
            part.key: tensor if len(part.shape) == 1 else tensor.unflatten(1, part.shape)
            for part, tensor in zip(parts, columns, strict=True)
        }
