"""Denormal numbers, which are slow and of no use in training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch as th

P = ParamSpec("P")
R = TypeVar("R")


def flushes_denormals() -> bool:
    """
    :return: Whether numbers too small for a normal float count as zero in this thread
    """
    return bool(np.float32(1e-40) * np.float32(1) == 0)


def without_denormals(function: Callable[P, R]) -> Callable[P, R]:
    """
    A decorator that makes numbers too small for a normal float, below 1.2e-38, count as zero on CPU while a function runs.

    Where gradients stay zero, as those of units that no input activates, Adam's averages of them decay into such numbers and
    never leave them again, and operations on them take Intel's processors many times as long as others.

    The setting belongs to a thread. Threads that torch began earlier keep theirs.

    :param function: For example an algorithm's ``train``
    :return: The function with that setting, which is taken back at its end
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if flushes_denormals() or not th.set_flush_denormal(True):
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            th.set_flush_denormal(False)

    return wrapper
