"""What the start-up hook adds to every start of the interpreter.

Pairs of ``python -c pass``, with the hook and without it (``sb3_ext.pth`` moved out of the way), in turns, in a scratch
environment that holds nothing but this package.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def start_ms(python: Path) -> float:
    """
    :param python: The interpreter to start
    :return: Wall time of ``python -c pass`` in milliseconds
    """
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return 1000 * (time.perf_counter() - begin)


def measure(python: Path, hook: Path, pairs: int) -> tuple[list[float], list[float]]:
    """
    :param python: The interpreter of an environment in which this package is installed
    :param hook: The installed ``sb3_ext.pth``
    :param pairs: Number of starts with the hook, and of starts without it
    :return: Milliseconds of the starts with the hook, and without it
    """
    with_hook, without = [], []
    disarmed = hook.with_suffix(".disarmed")
    for pair in range(pairs + 1):
        armed_ms = start_ms(python)
        hook.rename(disarmed)
        bare_ms = start_ms(python)
        disarmed.rename(hook)
        if pair > 0:  # the first pair compiles and fills the caches
            with_hook.append(armed_ms)
            without.append(bare_ms)
    return with_hook, without


def install(folder: Path) -> tuple[Path, Path]:
    """
    :param folder: Where to make a virtual environment with this package and none of its dependencies
    :return: Its interpreter, and the installed ``sb3_ext.pth``
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    # A copy, because setuptools builds in the folder it is given
    source = folder / "source"
    shutil.copytree(PROJECT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "logs", "*.egg-info"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return python, Path(purelib, "sb3_ext.pth")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the medians in milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="number of starts with the hook and without it")
    pairs = parser.parse_args(arguments).pairs
    with tempfile.TemporaryDirectory() as folder:
        with_hook, without = measure(*install(Path(folder)), pairs)
    added = statistics.median(a - b for a, b in zip(with_hook, without, strict=True))
    print(f"python -c pass, {pairs} pairs, medians: {statistics.median(with_hook):.2f} ms with the start-up hook, ", end="")
    print(f"{statistics.median(without):.2f} ms without it, {added:.2f} ms added")


if __name__ == "__main__":
    main()
