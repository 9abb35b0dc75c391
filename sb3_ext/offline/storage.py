"""Where rows lie: in memory, or in files that are read with bounded resident memory."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch as th

from sb3_ext.offline.errors import CorruptDatasetError, DiskFullError
from sb3_ext.offline.layout import Layout, Piece

# Part of the name of the row files: changes whenever their content would
FORMAT = 1
# Rows are read in windows of this many bytes, which stay in the processor's cache until the wanted rows are copied
_WINDOW = 2**20
# Reading on takes less time than a second read while no more than this many bytes are skipped
_GAP = 2**17
# Of the numbers that finding a transition takes, while it is read ahead
_INDEX_NBYTES = 64
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Rows(Protocol):
    """Rows of all episodes, one after the other, and the row of each transition."""

    nbytes: int

    def gather(self, indices: th.Tensor) -> dict[str, th.Tensor]:
        """
        :param indices: numbers of transitions, on the device of the rows
        :return: for each plane, the row of each transition with the next observation's columns
        """
        ...


def row_numbers(lengths: np.ndarray) -> np.ndarray:
    """
    :param lengths: steps of each episode
    :return: the row of each transition, when an episode of T steps takes T + 1 rows
    """
    return np.arange(lengths.sum()) + np.repeat(np.arange(len(lengths)), lengths)


class MemoryRows:
    """
    :param layout: of the rows
    :param lengths: steps of each episode
    :param pieces: all steps, in order
    :param device: on which the rows lie
    """

    def __init__(self, layout: Layout, lengths: np.ndarray, pieces: Iterator[Piece], device: th.device) -> None:
        n_rows = int(lengths.sum()) + len(lengths)
        planes = {
            "floats": th.empty((n_rows, layout.widths["floats"]), dtype=th.float32, device=device),
            "bytes": th.empty((n_rows, layout.widths["bytes"]), dtype=th.uint8, device=device),
        }
        cursor = 0
        for piece in pieces:
            for name, rows in layout.encode(piece).items():
                planes[name][cursor : cursor + len(rows)] = th.from_numpy(rows)
            cursor += len(rows)
        # Half the memory while 32 bits suffice
        dtype = th.int32 if n_rows < 2**31 else th.int64
        self._row_numbers = th.from_numpy(row_numbers(lengths)).to(device, dtype)
        self._planes = {name: layout.overlapping(plane, name) for name, plane in planes.items() if plane.numel()}
        self.nbytes = sum(t.untyped_storage().nbytes() for t in (self._row_numbers, *self._planes.values()))

    def gather(self, indices: th.Tensor) -> dict[str, th.Tensor]:
        rows = self._row_numbers.index_select(0, indices)
        return {name: plane.index_select(0, rows) for name, plane in self._planes.items()}


class DiskRows:
    """
    Rows in files: written once beside the data set (or into a temporary folder that goes with the process, where that
    folder cannot be written) and used again as long as the data set's file is the same.

    :param layout: of the rows
    :param lengths: steps of each episode
    :param pieces: all steps, in order; only read when the files have to be written
    :param folder: of the data set
    :param identity: of the data set and the spaces; None when the data are only in memory
    :raises DiskFullError: when the files do not fit
    """

    def __init__(
        self,
        layout: Layout,
        lengths: np.ndarray,
        pieces: Iterator[Piece],
        folder: Path | None,
        identity: dict[str, Any] | None,
    ) -> None:
        n_rows = int(lengths.sum()) + len(lengths)
        row_nbytes = {"floats": 4 * layout.widths["floats"], "bytes": layout.widths["bytes"]}
        self._sizes = {name: size * n_rows for name, size in row_nbytes.items()}
        self.nbytes = sum(self._sizes.values())
        path = None
        if folder is not None and identity is not None and os.access(folder, os.W_OK):
            key = hashlib.sha256(json.dumps([FORMAT, identity, self._sizes], sort_keys=True).encode()).hexdigest()[:16]
            path = folder / f".rows-{key}"
        if path is None or not self._is_complete(path):
            path = self._write(layout, pieces, path)
        self.path = path
        # An episode's transitions lie as many rows further as there are episodes before it
        self._episode_ends = th.from_numpy(np.cumsum(lengths))
        self._files = {name: _RowFile(path / name, layout, name) for name, size in self._sizes.items() if size}

    def _is_complete(self, path: Path) -> bool:
        return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in self._sizes.items())

    def _write(self, layout: Layout, pieces: Iterator[Piece], path: Path | None) -> Path:
        if path is None:
            temporary = Path(tempfile.mkdtemp(prefix=".rows-"))
        else:
            # Who may read the data set may read this
            _remove_abandoned(path)
            temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            temporary.mkdir()
        try:
            with open(temporary / "floats", "wb") as floats, open(temporary / "bytes", "wb") as images:
                files = {"floats": floats, "bytes": images}
                for piece in pieces:
                    for name, rows in layout.encode(piece).items():
                        files[name].write(rows.data)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise DiskFullError(
                    f"The rows of the data set do not fit in {temporary.parent} ({self.nbytes} bytes): {error.strerror}. "
                    "Free space there, or train without optimize_memory_usage."
                ) from error
            raise
        if path is None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            return temporary
        if path.exists() and not self._is_complete(path):
            # Files that were damaged are replaced
            shutil.rmtree(path, ignore_errors=True)
        try:
            temporary.rename(path)
        except OSError:
            # Another process has written them meanwhile
            shutil.rmtree(temporary, ignore_errors=True)
            if not self._is_complete(path):
                raise
        return path

    def gather(self, indices: th.Tensor) -> dict[str, th.Tensor]:
        gathered = self.new_buffers(len(indices))
        places = self.gather_sorted(indices, gathered)
        return {name: rows.index_select(0, places) for name, rows in gathered.items()}

    def new_buffers(self, n_transitions: int) -> dict[str, th.Tensor]:
        """:return: for each plane, room for what ``gather`` returns"""
        return {name: file.new_buffer(n_transitions) for name, file in self._files.items()}

    def gather_sorted(self, indices: th.Tensor, out: dict[str, th.Tensor]) -> th.Tensor:
        """
        :param indices: numbers of transitions
        :param out: see ``new_buffers``; gets the rows in the order of the files, each part of which is read once
        :return: the place of each index in ``out``
        """
        # Sorting the indices with their positions in the low bits is faster than argsort
        bits = len(indices).bit_length()
        packed = th.from_numpy(np.sort(((indices << bits) | th.arange(len(indices))).numpy()))
        ascending, order = packed >> bits, packed & (2**bits - 1)
        places = th.empty_like(order)
        places[order] = th.arange(len(order))
        n_per_episode = th.searchsorted(ascending, self._episode_ends).diff(prepend=th.zeros(1, dtype=th.int64))
        rows = ascending + th.repeat_interleave(n_per_episode)
        for name, file in self._files.items():
            file.gather(rows, out[name])
        return places


def _remove_abandoned(path: Path) -> None:
    """What processes that were killed have left of ``path``: files that nobody has written to for an hour."""
    for folder in path.parent.glob(f"{path.name}.*"):
        try:
            last_written = max(file.stat().st_mtime for file in (folder, *folder.glob("*")))
        except FileNotFoundError:
            # Its process has just finished
            continue
        if time.time() - last_written > 3600:
            shutil.rmtree(folder, ignore_errors=True)


class _RowFile:
    def __init__(self, path: Path, layout: Layout, name: str) -> None:
        self._arguments = path, layout, name
        self._file = open(path, "rb", buffering=0)
        dtype = th.float32 if name == "floats" else th.uint8
        self._row_nbytes = layout.widths[name] * dtype.itemsize
        # The last wanted row of a window needs the one after it
        self._window_rows = max(_WINDOW // self._row_nbytes, 1)
        self._buffer = memoryview(bytearray((self._window_rows + 1) * self._row_nbytes))
        window = th.frombuffer(self._buffer, dtype=dtype).view(-1, layout.widths[name])
        self._window = layout.overlapping(window, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _RowFile, self._arguments

    def _read(self, start: int, buffer: memoryview) -> int:
        """:return: number of bytes"""
        if hasattr(os, "preadv"):
            # After a fork, processes share the position in the file, which this does not use
            return os.preadv(self._file.fileno(), [buffer], start)
        self._file.seek(start)
        return self._file.readinto(buffer) or 0

    def new_buffer(self, n_transitions: int) -> th.Tensor:
        return self._window.new_empty((n_transitions, self._window.shape[1]))

    def gather(self, rows: th.Tensor, out: th.Tensor) -> None:
        """
        :param rows: ascending
        :param out: gets these rows, each with the columns of the next observation
        """
        apart = (rows // self._window_rows).diff() != 0
        apart |= rows.diff() * self._row_nbytes > _GAP
        starts = [0, *(apart.nonzero().squeeze(1) + 1).tolist()]
        firsts = rows[starts].tolist()
        lasts = rows[[*(start - 1 for start in starts[1:]), len(rows) - 1]].tolist()
        for start, stop, first, last in zip(starts, [*starts[1:], len(rows)], firsts, lasts, strict=True):
            nbytes = (last + 2 - first) * self._row_nbytes
            if self._read(first * self._row_nbytes, self._buffer[:nbytes]) != nbytes:
                raise CorruptDatasetError(f"{self._file.name} has become shorter while it was read.")
            th.index_select(self._window, 0, rows[start:stop] - first, out=out[start:stop])


def draw(n_transitions: int, batch_size: int, generator: th.Generator) -> th.Tensor:
    """
    :param n_transitions: how many there are
    :param batch_size: how many to draw, uniformly and with replacement
    :param generator: source of randomness, on any device
    :return: indices, on the device of the generator
    """
    return th.randint(n_transitions, (batch_size,), generator=generator, device=generator.device)


class ReadAhead:
    """
    Gathers the rows of many batches at once, which costs little more than those of one.

    The next batches are foreseen by drawing them from a copy of the generator. Where the caller's generator turns out not to
    be where it was foreseen, because it is used for something else too, less is foreseen: the batches are always those that
    the generator gives.

    :param rows: to gather from
    :param n_transitions: how many there are
    :param row_nbytes: bytes gathered per transition
    :param max_nbytes: upper bound of what is gathered at once and of the indices for it, unless one batch is more
    """

    def __init__(self, rows: DiskRows, n_transitions: int, row_nbytes: int, max_nbytes: int = 15 * 2**24) -> None:
        self._rows = rows
        self._n_transitions = n_transitions
        self._max_transitions = min(max_nbytes // (row_nbytes + _INDEX_NBYTES), n_transitions)
        self._batches: list[th.Tensor] = []
        # Room for everything that is ever read ahead; what is not used takes no memory
        self._buffers = rows.new_buffers(self._max_transitions)
        self._gathered: dict[str, th.Tensor] = {}
        self._places: list[th.Tensor] = []
        self._n_used = 0

    def next(self, batch_size: int, generator: th.Generator) -> dict[str, th.Tensor]:
        """
        :param batch_size: number of transitions
        :param generator: advanced by one draw
        :return: as ``Rows.gather``
        """
        batch = draw(self._n_transitions, batch_size, generator)
        if self._n_used == len(self._batches) or not th.equal(batch, self._batches[self._n_used]):
            foreseen_all = self._n_used == len(self._batches)
            n_batches = 8 * len(self._batches) if foreseen_all and self._batches else 1
            self._read(batch, min(n_batches, max(self._max_transitions // batch_size, 1)), generator)
        places = self._places[self._n_used]
        self._n_used += 1
        return {name: plane.index_select(0, places) for name, plane in self._gathered.items()}

    def _read(self, batch: th.Tensor, n_batches: int, generator: th.Generator) -> None:
        future = generator.clone_state()
        self._batches = [batch, *(draw(self._n_transitions, len(batch), future) for _ in range(n_batches - 1))]
        indices = th.cat(self._batches).cpu()
        if len(indices) > len(next(iter(self._buffers.values()))):
            self._buffers = self._rows.new_buffers(len(indices))
        self._gathered = {name: buffer[: len(indices)] for name, buffer in self._buffers.items()}
        self._places = list(self._rows.gather_sorted(indices, self._gathered).split(len(batch)))
        self._n_used = 0
