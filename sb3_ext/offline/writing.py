"""Keeps recorded episodes safe while they are collected, and makes a Minari data set of them at the end."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from sb3_ext.offline.errors import DatasetExistsError, DiskFullError, ResumeError
from sb3_ext.offline.recording import Episode
from sb3_ext.offline.storage import NO_SPACE

if TYPE_CHECKING:
    import h5py

# Arrays smaller than this take less room uncompressed
_COMPRESS_FROM = 128


class EpisodeStore:
    """
    A data set in the making: one file per episode in a hidden folder beside the target, so that a killed process loses
    nothing that was finished. The target appears at the end, complete, by being renamed.

    :param target: folder of the data set, which must not exist yet
    :param settings: all that the episodes depend on, as JSON types
    :raises DatasetExistsError: when the target exists
    :raises ResumeError: when an unfinished collection for this target has other settings
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        if target.exists():
            raise DatasetExistsError(f"{target} exists already. Choose another --dataset-id or --output, or delete it.")
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self._episodes = self.folder / "episodes"
        with self._room():
            self._episodes.mkdir(parents=True, exist_ok=True)
            known = self.folder / "settings.json"
            if not known.exists():
                _write_atomically(known, json.dumps(settings).encode())
        earlier = json.loads(known.read_text())
        differing = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
        if differing:
            differences = ", ".join(f"{key} was {earlier.get(key)!r} and is {settings.get(key)!r}" for key in differing)
            raise ResumeError(
                f"{self.folder} holds an unfinished collection with other settings: {differences}. "
                "Finish it with the command it was started with, or delete that folder."
            )

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise DiskFullError(
                f"There is no room left in {self.target.parent} ({error.strerror or error}). The {len(self)} episodes "
                f"finished so far are kept in {self.folder}: free space and run the same command again to go on from there."
            ) from error

    def _path(self, index: int) -> Path:
        return self._episodes / f"{index}.npz"

    def __len__(self) -> int:
        """:return: number of finished episodes"""
        return sum(path.suffix == ".npz" for path in self._episodes.iterdir()) if self._episodes.exists() else 0

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def clear(self) -> None:
        """Forget all episodes."""
        shutil.rmtree(self._episodes)
        self._episodes.mkdir()

    def add(self, index: int, episode: Episode, seed: int | None) -> None:
        """
        :param index: number of the episode in the data set
        :param episode: finished
        :param seed: with which the environment was reset, if it was
        :raises DiskFullError: when it does not fit
        """
        arrays = {f"observations/{key}": array for key, array in episode.observations.items()}
        for name in ("actions", "rewards", "terminations", "truncations"):
            arrays[name] = getattr(episode, name)
        if seed is not None:
            arrays["seed"] = np.array(seed)
        path = self._path(index)
        # Of this process, in case that somebody has started the same twice
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with self._room(), open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self, index: int) -> dict[str, np.ndarray]:
        with np.load(self._path(index)) as arrays:
            return dict(arrays)

    def returns(self) -> np.ndarray:
        """:return: the sum of rewards of each episode"""
        return np.array([self._load(index)["rewards"].sum(dtype=np.float64) for index in range(len(self))])

    def finish(self, observation_space: gym.Space, action_space: gym.Space, metadata: dict[str, Any]) -> None:
        """
        Write the data set and take the unfinished one away.

        :param observation_space: of the recorded observations
        :param action_space: of the recorded actions
        :param metadata: as JSON types, beside what Minari needs
        :raises DiskFullError: when it does not fit
        :raises DatasetExistsError: when another process has made the target meanwhile
        """
        import h5py
        from minari.serialization import serialize_space

        dataset = self.folder / "dataset"
        data = dataset / "data"
        shutil.rmtree(dataset, ignore_errors=True)
        n_steps = 0
        try:
            with self._room():
                data.mkdir(parents=True)
                with h5py.File(data / "main_data.hdf5", "w", libver="latest") as file:
                    for index in range(len(self)):
                        n_steps += _write_episode(file.create_group(f"episode_{index}"), index, self._load(index))
                metadata = {
                    "total_episodes": len(self),
                    "total_steps": n_steps,
                    "data_format": "hdf5",
                    # Lossless: images as they are, compressed as everything else
                    "jpeg_encoding": False,
                    "observation_space": serialize_space(observation_space),
                    "action_space": serialize_space(action_space),
                    "minari_version": version("minari"),
                    # In MB, as Minari has it
                    "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),
                    **metadata,
                }
                (data / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        except DiskFullError:
            shutil.rmtree(dataset, ignore_errors=True)
            raise
        try:
            dataset.rename(self.target)
        except OSError as error:
            raise DatasetExistsError(f"{self.target} has been made by another process meanwhile.") from error
        shutil.rmtree(self.folder)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _write_episode(group: "h5py.Group", index: int, arrays: dict[str, np.ndarray]) -> int:
    """:return: number of steps"""
    group.attrs["id"] = index
    group.attrs["total_steps"] = n_steps = len(arrays["rewards"])
    seed = arrays.pop("seed", None)
    if seed is not None:
        group.attrs["seed"] = int(seed)
    # Minari prints the keys of the infos of every episode
    group.create_group("infos")
    for name, array in arrays.items():
        # A checksum finds damage that the file's structure would not show
        compression = {"compression": "gzip", "shuffle": True, "fletcher32": True} if array.nbytes >= _COMPRESS_FROM else {}
        chunks = array.shape if array.nbytes >= _COMPRESS_FROM and array.nbytes < 2**20 else None
        group.create_dataset(name.rstrip("/"), data=array, chunks=chunks, **compression)
    return n_steps
