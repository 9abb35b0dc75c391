"""Where rows lie: in memory, or in files that are read with bounded resident memory."""

import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch as th

from sb3_ext.offline.errors import DiskFullError
from sb3_ext.offline.layout import Layout, Piece

# Part of the name of the row files: changes whenever their content would
FORMAT = 1
# Linux maps 64 KiB around every page that is touched
_BLOCK = 2**16
# Resident memory of a mapped file while batches are gathered from it: 256 blocks are 16 MiB
_RESIDENT_BLOCKS = 256
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
        self._sizes = {
            "row_numbers": 8 * int(lengths.sum()),
            "floats": 4 * layout.widths["floats"] * n_rows,
            "bytes": layout.widths["bytes"] * n_rows,
        }
        path = None
        if folder is not None and identity is not None and os.access(folder, os.W_OK):
            key = hashlib.sha256(json.dumps([FORMAT, identity, self._sizes], sort_keys=True).encode()).hexdigest()[:16]
            path = folder / f".rows-{key}"
        if path is None or not self._is_complete(path):
            path = self._write(layout, lengths, pieces, path)
        self.path = path
        self.nbytes = sum(self._sizes.values())
        mapped = {name: _MappedFile(path / name) for name, size in self._sizes.items() if size}
        self._row_numbers = mapped.pop("row_numbers")
        self._row_numbers.tensor = self._row_numbers.tensor.view(th.int64).unsqueeze(1)
        for name, file in mapped.items():
            rows = file.tensor.view(th.float32 if name == "floats" else th.uint8).view(n_rows, layout.widths[name])
            file.tensor = layout.overlapping(rows, name)
        self._planes = mapped

    def _is_complete(self, path: Path) -> bool:
        return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in self._sizes.items())

    def _write(self, layout: Layout, lengths: np.ndarray, pieces: Iterator[Piece], path: Path | None) -> Path:
        temporary = Path(tempfile.mkdtemp(prefix=".rows-", dir=path.parent if path else None))
        try:
            with (
                open(temporary / "row_numbers", "wb") as numbers,
                open(temporary / "floats", "wb") as floats,
                open(temporary / "bytes", "wb") as images,
            ):
                files = {"floats": floats, "bytes": images}
                first_row = 0
                for length in lengths:
                    np.arange(first_row, first_row + length).tofile(numbers)
                    first_row += length + 1
                for piece in pieces:
                    for name, rows in layout.encode(piece).items():
                        files[name].write(rows.data)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise DiskFullError(
                    f"The rows of the data set do not fit in {temporary.parent} ({sum(self._sizes.values())} bytes): "
                    f"{error.strerror}. Free space there, or train without optimize_memory_usage."
                ) from error
            raise
        if path is None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            return temporary
        # Replaces files that were damaged; another process may have been faster, with the same content
        if path.exists() and not self._is_complete(path):
            shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError:
            shutil.rmtree(temporary)
        return path

    def gather(self, indices: th.Tensor) -> dict[str, th.Tensor]:
        gathered, places = self.gather_sorted(indices)
        return {name: plane.index_select(0, places) for name, plane in gathered.items()}

    def gather_sorted(self, indices: th.Tensor) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """
        :param indices: numbers of transitions
        :return: for each plane, the rows in the order of the files, each part of which is read once; and the place of each
            index among them
        """
        order = th.from_numpy(np.argsort(indices.numpy()))
        places = th.empty_like(order)
        places[order] = th.arange(len(order))
        rows = self._row_numbers.gather(indices[order]).squeeze(1)
        return {name: plane.gather(rows) for name, plane in self._planes.items()}, places


class _MappedFile:
    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # Private and never written: torch has no read-only tensors
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensor = th.frombuffer(self._map, dtype=th.uint8)

    def gather(self, rows: th.Tensor) -> th.Tensor:
        """
        :param rows: ascending
        :return: these rows of ``tensor``
        """
        gathered = self.tensor.new_empty((len(rows), self.tensor.shape[1]))
        blocks = rows * (self.tensor.stride(0) * self.tensor.element_size()) // _BLOCK
        n_before = th.cat([th.zeros(1, dtype=th.int64), th.cumsum(blocks.diff() != 0, 0)])
        starts = th.searchsorted(n_before, th.arange(0, int(n_before[-1]) + 1, _RESIDENT_BLOCKS)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            th.index_select(self.tensor, 0, rows[start:stop], out=gathered[start:stop])
            if hasattr(mmap, "MADV_DONTNEED"):
                # Else the whole file becomes resident, bit by bit
                self._map.madvise(mmap.MADV_DONTNEED)
        return gathered


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
    :param max_nbytes: upper bound of what is gathered at once, unless one batch is more
    """

    def __init__(self, rows: DiskRows, n_transitions: int, row_nbytes: int, max_nbytes: int = 2**26) -> None:
        self._rows = rows
        self._n_transitions = n_transitions
        self._max_transitions = max_nbytes // row_nbytes
        self._batches: list[th.Tensor] = []
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
            n_batches = 2 * len(self._batches) if foreseen_all and self._batches else 1
            self._read(batch, min(n_batches, max(self._max_transitions // batch_size, 1)), generator)
        places = self._places[self._n_used]
        self._n_used += 1
        return {name: plane.index_select(0, places) for name, plane in self._gathered.items()}

    def _read(self, batch: th.Tensor, n_batches: int, generator: th.Generator) -> None:
        future = generator.clone_state()
        self._batches = [batch, *(draw(self._n_transitions, len(batch), future) for _ in range(n_batches - 1))]
        # Release the old rows first, so that never both are held
        self._gathered = {}
        self._gathered, places = self._rows.gather_sorted(th.cat(self._batches).cpu())
        self._places = list(places.split(len(batch)))
        self._n_used = 0
