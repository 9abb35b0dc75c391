"""The files of results: one JSON object per line and per finished measurement, in ``benchmarks/results/<page>.jsonl``."""

import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"

PACKAGES = (
    "sb3-ext", "stable-baselines3", "sb3-contrib", "rl-zoo3", "gymnasium", "minari", "mujoco", "numpy", "torch",
)  # fmt: skip
# Where and how fast to run is no part of what is measured
PRIVATE_OPTIONS = ("--dir", "--jobs")

#: Algorithms that are compared with each other share a page; any other has one of its own
PAGES = {
    **dict.fromkeys(("reinforce", "vpg", "npg", "trpo_fast", "trpo"), "policy_gradient"),
    **dict.fromkeys(("ddqn", "dueling_ddqn", "sac_discrete", "dqn", "qrdqn"), "q_learning"),
}

Row = dict[str, Any]


def page_of(algo: str) -> str:
    """
    :param algo: Key in the zoo
    :return: The page its results belong to
    """
    return PAGES.get(algo, algo)


def path_of(page: str) -> Path:
    """:return: the file of a page"""
    return FOLDER / f"{page}.jsonl"


def read(path: Path) -> list[Row]:
    """
    :param path: File of results
    :return: Its rows, oldest first; none if there is no file. A last line that a dying process left unfinished is no row.
    """
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def append(path: Path, row: Row) -> None:
    """
    Add one row, whole or not at all, also when several processes append to one file.

    :param path: File of results, made if need be
    :param row: What to add
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def stamp(**versions: str) -> Row:
    """
    :param versions: Of packages outside this environment
    :return: What belongs into every row: date, commit, machine, versions
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": machine(),
        "versions": {**found, **versions},
    }


def commit() -> str:
    """:return: abbreviated hash, with ``+`` where the code has changed since; ``unknown`` outside a repository"""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        code = ("sb3_ext", "hyperparams", "benchmarks/*.py", "benchmarks/*.yml")
        return head + ("+" if _git("status", "--porcelain", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """:return: processor, number of cores, operating system"""
    model = platform.processor() or platform.machine()
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        processor = {key.strip(): value.strip() for key, value in reversed(lines)}
        # Of virtual processors, the name says less than the numbers
        model = f"{processor['model name']} (family {processor['cpu family']}, model {processor['model']})"
    except (OSError, KeyError):
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def own_command() -> str:
    """:return: the command that this process runs, without what does not change the result"""
    arguments = sys.argv[1:]
    for option in PRIVATE_OPTIONS:
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks", *arguments])


def rounded(values: Any, digits: int = 3) -> Any:
    """:return: nested lists of floats, short enough for a file that people read"""
    return np.round(np.asarray(values, dtype=float), digits).tolist()
