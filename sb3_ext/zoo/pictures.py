"""Pictures of an agent in its model card."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sb3_ext.zoo.registry import ALGORITHMS

# What has been drawn in this process, by the folder that goes to the Hub
_drawn: dict[Path, list[str]] = {}


def draw(model: Any, env: Any, deterministic: bool, folder: Path) -> None:
    """
    Draw the pictures that the agent's algorithm has, if it has any.

    :param model: The agent
    :param env: Its environment, a VecEnv
    :param deterministic: Whether it acts deterministically
    :param folder: Where the pictures go, as PNG files
    """
    for algorithm in ALGORITHMS:
        if algorithm.pictures is not None and type(model) is resolve_name(algorithm.class_path):
            figures = resolve_name(algorithm.pictures)(model, env, deterministic)
            for name, figure in figures.items():
                figure.savefig(folder / f"{name}.png", dpi=120)
            _drawn[folder.resolve()] = list(figures)


def section(folder: Path) -> str:
    """
    :param folder: That goes to the Hub
    :return: What the model card says about the pictures that were drawn there; nothing, if there are none
    """
    links = [f"![{name}]({name}.png)\n" for name in _drawn.get(folder.resolve(), [])]
    return "\n".join(["\n## Pictures\n", *links]) if links else ""
