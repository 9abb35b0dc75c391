"""The two files of a saved agent: ``agent.json`` and the tensors that it names by their hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch as th
from safetensors import SafetensorError, safe_open

from .allowed import shown
from .errors import SafeFormatError

CONFIG_NAME = "agent.json"
#: The tensors have the beginning of their hash in their name, so that a configuration never finds those of another save
WEIGHTS_PATTERN = "agent-*.safetensors"
_WEIGHTS_NAME = re.compile(r"agent-[0-9a-f]{16}\.safetensors")

MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
_MAX_DEPTH = 32
_CHUNK = 2**20
_AGAIN = "Download the files again, or save the agent again with save_safe."
_DTYPES = {
    th.float32: "F32",
    th.float64: "F64",
    th.float16: "F16",
    th.bfloat16: "BF16",
    th.int64: "I64",
    th.int32: "I32",
    th.int16: "I16",
    th.int8: "I8",
    th.uint8: "U8",
    th.bool: "BOOL",
}


def weights_name(sha256: str) -> str:
    """
    :param sha256: Hash of the tensors' file, in hexadecimal
    :return: Its name
    """
    return f"agent-{sha256[:16]}.safetensors"


# ---- Writing ----


def write_agent(folder: Path, config: dict[str, Any], tensors: Mapping[str, th.Tensor]) -> None:
    """
    Write both files. What was there before stays valid until the last step, which replaces ``agent.json``.

    :param folder: Created if it does not exist
    :param config: All of the configuration but the hash of the tensors
    :param tensors: By name
    :raises OSError: if the disk is full, or the folder cannot be written to
    :raises SafeFormatError: if a tensor is not finite, or the configuration is too long
    """
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    weights = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    sha256 = hashlib.sha256(weights).hexdigest()
    text = json.dumps({**config, "weights_sha256": sha256}, indent=1, allow_nan=False).encode()
    if len(text) > MAX_CONFIG_BYTES:
        raise SafeFormatError(
            f"The configuration has {len(text)} bytes, more than the limit of {MAX_CONFIG_BYTES}. Are there arrays in the "
            "arguments, or an observation space with different bounds for every number?"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / weights_name(sha256), weights)
    _write(folder / CONFIG_NAME, text)
    for path in folder.glob(WEIGHTS_PATTERN):
        if _WEIGHTS_NAME.fullmatch(path.name) and path.name != weights_name(sha256):
            path.unlink()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        message = f"Could not write the agent ({error.strerror}); what was saved there before is as it was"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- Reading ----


def read_config(folder: Path) -> dict[str, Any]:
    """
    :param folder: Of a saved agent
    :return: What ``agent.json`` holds: an object, nothing in it checked
    :raises SafeFormatError: if it is not there, or no plain JSON of a reasonable size
    """
    path = folder / CONFIG_NAME
    _check_regular(path, MAX_CONFIG_BYTES)
    try:
        return parse_config(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SafeFormatError(f"{path} is not valid: {error}. {_AGAIN}") from error


def parse_config(text: str) -> dict[str, Any]:
    """
    :param text: Of ``agent.json``
    :return: What it holds: an object, nothing in it checked
    :raises ValueError: if it is no JSON, has NaN, numbers that overflow or keys that occur twice, or is nested too deep
    :raises RecursionError: if it is nested much too deep
    """
    config = json.loads(
        text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_of_64_bits
    )
    if not isinstance(config, dict):
        raise ValueError("it must hold an object")
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        containers = [node for node in level if isinstance(node, (dict, list))]
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


def _of_64_bits(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the number {shown(text)} is too large")
    return int(text)


def _check_regular(path: Path, max_bytes: float = float("inf")) -> None:
    if path.is_symlink():
        raise SafeFormatError(
            f"{path} is a symbolic link, which could lead anywhere. Give a folder with the files themselves, such as "
            "huggingface_hub.snapshot_download(..., local_dir=...) makes."
        )
    if not path.is_file():
        raise SafeFormatError(f"There is no file {path}. Save the agent with save_safe, or download both of its files.")
    if path.stat().st_size > max_bytes:
        raise SafeFormatError(f"{path} is larger than the limit of {max_bytes} bytes. {_AGAIN}")


class Tensors:
    """
    The tensors of a file. They are read one by one; whoever reads them says what must be there.

    :param file: Open
    :param path: For messages
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        slices = {name: file.get_slice(name) for name in file.keys()}
        self.layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.layout

    def check(self, name: str, dtype: th.dtype, shape: tuple[int, ...]) -> None:
        """
        :param name: Of a tensor
        :param dtype: That it must have
        :param shape: That it must have
        :raises SafeFormatError: if it is missing or different
        """
        expected = (_DTYPES.get(dtype, str(dtype)), tuple(shape))
        if self.layout.get(name) != expected:
            found = self.layout.get(name, "missing")
            raise SafeFormatError(
                f"The configuration describes the tensor {shown(name)} as {expected}, but in {self._path.name} it is {found}. "
                f"The files do not belong together, or were changed. {_AGAIN}"
            )

    def read(self, name: str, dtype: th.dtype, shape: tuple[int, ...]) -> th.Tensor:
        """
        :param name: Of a tensor
        :param dtype: That it must have
        :param shape: That it must have
        :return: The tensor, in the memory of the file: copy what is kept
        :raises SafeFormatError: if it is missing or different, or its numbers are not finite
        """
        self.check(name, dtype, shape)
        self._used.add(name)
        tensor = self._file.get_tensor(name)
        _check_finite(name, tensor)
        return tensor

    def check_all_read(self) -> None:
        """
        :raises SafeFormatError: if the file has tensors that nobody has asked for
        """
        unknown = sorted(self.layout.keys() - self._used)
        if unknown:
            raise SafeFormatError(f"{self._path.name} has tensors that the agent does not have: {shown(unknown)}. {_AGAIN}")


@contextmanager
def open_tensors(folder: Path, sha256: str) -> Iterator[Tensors]:
    """
    :param folder: Of a saved agent
    :param sha256: Hash of the file
    :return: Its tensors, as long as the context lasts
    :raises SafeFormatError: if the file is missing, damaged, or another one
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise SafeFormatError(f"weights_sha256 must be 64 hexadecimal digits, but is {shown(sha256)}. {_AGAIN}")
    path = folder / weights_name(sha256)
    _check_regular(path)
    with open(path, "rb") as file:
        digest, header_size = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK):
            header_size = header_size or int.from_bytes(chunk[:8], "little")
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise SafeFormatError(f"{path} is damaged: its hash is not the one in {CONFIG_NAME}. {_AGAIN}")
    if header_size > _MAX_HEADER_BYTES:
        raise SafeFormatError(f"The header of {path} declares {header_size} bytes, more than {_MAX_HEADER_BYTES}. {_AGAIN}")
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise SafeFormatError(f"{path} is no valid safetensors file: {error}. {_AGAIN}") from error
    with opened as tensors:
        yield Tensors(tensors, path)


def _check_finite(name: str, tensor: th.Tensor) -> None:
    # In parts, because the check needs memory
    parts = tensor.reshape(-1).split(_CHUNK) if tensor.is_floating_point() else ()
    if not all(part.isfinite().all() for part in parts):
        raise SafeFormatError(
            f"The tensor {shown(name)} has numbers that are not finite: training has diverged, or the file is damaged."
        )
