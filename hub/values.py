"""Values of a saved agent's configuration as JSON, and back.

What JSON has stands for itself. The rest is an object with one key that begins with ``$``: ``$class`` (a name on the
allow-list), ``$tuple``, ``$float`` (infinite numbers), ``$schedule`` (linear in the progress) and ``$noise``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from .allowed import Classes, check_allowed, resolve, shown
from .errors import SafeFormatError

#: Numbers in one observation or action: a configuration of a few bytes can describe a space of any size
MAX_ELEMENTS = 2**20
_DTYPES = ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def check_object(node: Any, where: str, keys: Iterable[str]) -> dict[str, Any]:
    """
    :param node: Part of a configuration
    :param where: What to call it in a message
    :param keys: Those that it must have, and no others
    :return: The node
    :raises SafeFormatError: if it is no object or has other keys
    """
    expected = set(keys)
    if not isinstance(node, dict):
        raise SafeFormatError(f"{where} must be an object with the keys {sorted(expected)}, but is {shown(node)}.")
    unknown, missing = sorted(node.keys() - expected), sorted(expected - node.keys())
    if unknown or missing:
        raise SafeFormatError(f"{where} has unknown keys {shown(unknown)}, and lacks {missing}. Save the agent again.")
    return node


def check_type(value: Any, hint: Any, where: str) -> Any:
    """
    :param value: Part of a configuration, or what was made of it
    :param hint: Type annotation
    :param where: What to call it in a message
    :return: The value
    :raises SafeFormatError: if it is of another type
    """
    if not _fits(value, hint):
        name = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
        raise SafeFormatError(f"{where} must be of type {name}, but is {shown(value)}.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if origin is type:
        return isinstance(value, type) and issubclass(value, parts[0])
    if origin is tuple:
        # Lists, where SB3's own files have made them of tuples
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items())
    if origin is not None:
        # Functions: of those, only schedules are written
        return isinstance(value, LinearSchedule)
    return isinstance(value, hint)


# ---- Arguments ----


def encode(value: Any, classes: Classes, where: str, progress_remaining: float = 1.0) -> Any:
    """
    :param value: Of an argument
    :param classes: The classes allowed in it
    :param where: What to call it in a message
    :param progress_remaining: Where the training is, from 1 to 0, for schedules that cannot be written
    :return: JSON
    :raises SafeFormatError: if there is no way to write it
    """

    def inner(item: Any) -> Any:
        return encode(item, classes, where, progress_remaining)

    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _encode_float(value, where)
    if isinstance(value, type):
        return {"$class": check_allowed(value, classes, where)}
    if isinstance(value, ActionNoise):
        return _encode_noise(value, classes, where)
    if isinstance(value, tuple):
        # SB3's TrainFreq holds an enumeration of strings
        return {"$tuple": [inner(getattr(item, "value", item)) for item in value]}
    if isinstance(value, list):
        return [inner(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: inner(item) for key, item in value.items()}
    if callable(value):
        return _encode_schedule(value, where, progress_remaining)
    raise SafeFormatError(
        f"{where}: {shown(value)} cannot be saved. There are numbers, strings, lists, tuples, dictionaries with strings as "
        "keys, schedules, action noise and classes of the allow-list."
    )


def decode(node: Any, classes: Classes, where: str) -> Any:
    """
    :param node: JSON
    :param classes: The classes allowed in it
    :param where: What to call it in a message
    :return: The value
    :raises SafeFormatError: if it is not what ``encode`` writes
    """
    if isinstance(node, list):
        return [decode(item, classes, where) for item in node]
    if not isinstance(node, dict):
        return node
    tag, content = next(iter(node.items())) if len(node) == 1 else ("", None)
    if not tag.startswith("$"):
        if any(key.startswith("$") for key in node):
            raise SafeFormatError(f"{where} has a key that begins with $ beside others.")
        return {key: decode(item, classes, where) for key, item in node.items()}
    if tag == "$class":
        return resolve(content, classes, where)
    if tag == "$tuple":
        return tuple(decode(check_type(content, list[Any], where), classes, where))
    if tag == "$float" and content in ("inf", "-inf"):
        return float(content)
    if tag == "$schedule":
        return LinearSchedule(**check_type(check_object(content, where, _SCHEDULE), dict[str, float], where))
    if tag == "$noise":
        return _decode_noise(content, classes, where)
    raise SafeFormatError(f"{where}: {shown(node)} means nothing.")


def is_finite(value: Any) -> bool:
    """
    :param value: What ``decode`` returned
    :return: Whether there is no infinite number in it
    """
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _encode_float(value: float, where: str) -> Any:
    if math.isnan(value):
        raise SafeFormatError(f"{where} is not a number (NaN): give it a value before saving.")
    return value if math.isfinite(value) else {"$float": str(value)}


_SCHEDULE = ("start", "end", "end_fraction")


def _encode_schedule(schedule: Callable[[float], float], where: str, progress_remaining: float) -> Any:
    if isinstance(schedule, FloatSchedule):
        schedule = schedule.value_schedule
    if isinstance(schedule, ConstantSchedule):
        return _encode_float(float(schedule.val), where)
    if isinstance(schedule, LinearSchedule):
        return {"$schedule": {name: float(getattr(schedule, name)) for name in _SCHEDULE}}
    # The zoo's "lin_..."
    if (type(schedule).__module__, type(schedule).__name__) == ("rl_zoo3.utils", "SimpleLinearSchedule"):
        return {"$schedule": {"start": float(schedule.initial_value), "end": 0.0, "end_fraction": 1.0}}  # type: ignore[attr-defined]
    value = float(schedule(progress_remaining))
    warnings.warn(f"{where}: only linear schedules are saved; this one is saved as its present value, {value}.", stacklevel=2)
    return _encode_float(value, where)


def _encode_noise(noise: ActionNoise, classes: Classes, where: str) -> Any:
    if isinstance(noise, VectorizedActionNoise):
        # Learning makes it again
        noise = noise.base_noise
    described: dict[str, Any] = {"class": check_allowed(type(noise), classes, where)}
    if getattr(noise, "initial_noise", None) is not None:
        raise SafeFormatError(f"{where}: action noise with initial_noise cannot be saved. Leave initial_noise out.")
    if isinstance(noise, (NormalActionNoise, OrnsteinUhlenbeckActionNoise)):
        described.update(mean=np.asarray(noise._mu, float).tolist(), sigma=np.asarray(noise._sigma, float).tolist())
    if isinstance(noise, OrnsteinUhlenbeckActionNoise):
        described.update(theta=float(noise._theta), dt=float(noise._dt))
    return {"$noise": described}


def _decode_noise(node: Any, classes: Classes, where: str) -> ActionNoise:
    if not isinstance(node, dict):
        raise SafeFormatError(f"{where}: {shown(node)} describes no action noise.")
    cls = resolve(node.get("class"), classes, where)
    numbers = ("theta", "dt") if issubclass(cls, OrnsteinUhlenbeckActionNoise) else ()
    check_object(node, where, ("class", "mean", "sigma", *numbers))
    arrays = {name: np.array(check_type(node[name], float | list[float], where), float) for name in ("mean", "sigma")}
    return cls(**arrays, **{name: check_type(node[name], float, where) for name in numbers})


# ---- Spaces ----


def encode_space(space: spaces.Space, where: str) -> dict[str, Any]:
    """
    :param space: Of observations or actions
    :param where: What to call it in a message
    :return: JSON
    :raises SafeFormatError: if SB3 has no use for such a space
    """
    if isinstance(space, spaces.Box):
        bounds = {name: _encode_bounds(getattr(space, name)) for name in ("low", "high")}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        vectors = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete", **vectors, "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        # A single number and a shape of one number are different things to SB3
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: encode_space(part, f"{where}[{key!r}]") for key, part in space.items()}}
    raise SafeFormatError(f"{where}: {type(space).__name__} spaces cannot be saved, only those that SB3's algorithms support.")


def _encode_bounds(bounds: np.ndarray) -> Any:
    """:return: one number where all are the same, else all of them in a row; infinite ones as strings"""
    is_uniform = bounds.size > 0 and bool((bounds == bounds.flat[0]).all())
    # Those of Boxes of bool as 0 and 1
    numbers = (bounds.reshape(-1)[: 1 if is_uniform else None] + 0).tolist()
    written = [number if math.isfinite(number) else str(number) for number in numbers]
    return written[0] if is_uniform else written


def decode_space(node: Any, where: str, may_be_dict: bool = True) -> spaces.Space:
    """
    :param node: JSON
    :param where: What to call it in a message
    :param may_be_dict: Whether it can be a Dict space
    :return: The space
    :raises SafeFormatError: if it is not what ``encode_space`` writes
    """
    kind = node.get("type") if isinstance(node, dict) else None
    if kind == "Dict" and may_be_dict:
        parts = check_type(check_object(node, where, ("type", "spaces"))["spaces"], dict[str, Any], where)
        # In the order of the file, which is that of the networks' inputs
        return spaces.Dict([(key, decode_space(part, f"{where}[{shown(key)}]", False)) for key, part in parts.items()])
    if not isinstance(kind, str) or kind not in _SPACES:
        raise SafeFormatError(f"{where}: there is no space of type {shown(kind)} here. Supported: {', '.join(_SPACES)}, Dict.")
    try:
        return _SPACES[kind](node, where)
    except SafeFormatError:
        raise
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise SafeFormatError(f"{where}: gymnasium accepts no such {kind} space ({error}).") from error


def _decode_box(node: dict[str, Any], where: str) -> spaces.Space:
    check_object(node, where, ("type", "shape", "dtype", "low", "high"))
    shape, dtype = _decode_shape(node["shape"], where), _decode_dtype(node["dtype"], where)
    low, high = (_decode_bounds(node[name], shape, dtype, f"{where}.{name}") for name in ("low", "high"))
    return spaces.Box(low, high, shape, dtype.type)


def _decode_discrete(node: dict[str, Any], where: str) -> spaces.Space:
    check_object(node, where, ("type", "n", "start", "dtype"))
    n, start = (check_type(node[name], int, f"{where}.{name}") for name in ("n", "start"))
    return spaces.Discrete(n, start=start, dtype=_decode_dtype(node["dtype"], where).type)


def _decode_multi_discrete(node: dict[str, Any], where: str) -> spaces.Space:
    check_object(node, where, ("type", "nvec", "start", "dtype"))
    dtype = _decode_dtype(node["dtype"], where)
    nvec, start = (np.array(check_type(node[name], list[Any], where), dtype) for name in ("nvec", "start"))
    return spaces.MultiDiscrete(nvec, dtype=dtype.type, start=start)


def _decode_multi_binary(node: dict[str, Any], where: str) -> spaces.Space:
    n = check_object(node, where, ("type", "n"))["n"]
    shape = _decode_shape(n if isinstance(n, list) else [n], where)
    return spaces.MultiBinary(shape if isinstance(n, list) else shape[0])


_SPACES: dict[str, Callable[[dict[str, Any], str], spaces.Space]] = {
    "Box": _decode_box,
    "Discrete": _decode_discrete,
    "MultiDiscrete": _decode_multi_discrete,
    "MultiBinary": _decode_multi_binary,
}


def _decode_shape(node: Any, where: str) -> tuple[int, ...]:
    shape = check_type(node, list[int], f"{where}.shape")
    if len(shape) > 8 or any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise SafeFormatError(f"{where}: {shown(shape)} is no shape, or one of more than {MAX_ELEMENTS} numbers.")
    return tuple(shape)


def _decode_dtype(node: Any, where: str) -> np.dtype:
    if node not in _DTYPES:
        raise SafeFormatError(f"{where}: {shown(node)} is no supported dtype. Supported: {', '.join(_DTYPES)}.")
    return np.dtype(node)


def _decode_bounds(node: Any, shape: tuple[int, ...], dtype: np.dtype, where: str) -> np.ndarray:
    numbers = [
        float(number) if number in ("inf", "-inf") else number for number in (node if isinstance(node, list) else [node])
    ]
    check_type(numbers, list[float], where)
    if isinstance(node, list) and len(numbers) != math.prod(shape):
        raise SafeFormatError(f"{where} must be one number or {math.prod(shape)} of them, but there are {len(numbers)}.")
    return np.array(numbers, dtype).reshape(shape) if isinstance(node, list) else np.full(shape, numbers[0], dtype)
