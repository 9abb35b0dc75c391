"""Agents and their model cards for the Hugging Face Hub. Installed as ``sb3_ext.hub``.

Importing it costs nothing: names are looked up when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .environment import SavedEnv
    from .errors import HubError, SafeFormatError
    from .loading import load
    from .safe import load_safe, save_safe

__all__ = ["HubError", "SafeFormatError", "SavedEnv", "load", "load_safe", "save_safe"]

_MODULES = {
    "HubError": "errors",
    "SafeFormatError": "errors",
    "SavedEnv": "environment",
    "load": "loading",
    "load_safe": "safe",
    "save_safe": "safe",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
