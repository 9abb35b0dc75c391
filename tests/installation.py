"""Installations of this package to run the zoo's commands in, as a user has them."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


class Installation:
    """
    A virtual environment that holds this package, and sees the packages of the environment that runs the tests.

    :param folder: Where to make it
    :param requirement: What to install, for pip; nothing if empty
    """

    def __init__(self, folder: Path, *requirement: str | Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        ask = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.site_packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
        # Entries of a .pth file are plain paths: the .pth files in there, such as this package's own, do not run.
        parents = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        self.site_packages.joinpath("parent.pth").write_text("\n".join(parents))
        if requirement:
            # The pip and the setuptools of the environment that runs the tests
            command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", f"--python={self.python}"]
            subprocess.run([*command, "install", "--no-deps", "--no-build-isolation", *requirement], check=True)

    def run(self, *command: str | Path, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """
        :param command: Arguments of the interpreter
        :param cwd: The folder to run it in
        :param check: Whether an exit status other than 0 fails the test
        :param env: Environment variables to change
        :return: The finished process, with its output as text
        """
        process = subprocess.run(
            [self.python, *command],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and process.returncode != 0:
            pytest.fail(f"{' '.join(map(str, command))}: {process.returncode}\n{process.stdout}\n{process.stderr}")
        return process

    def zoo(self, command: str, *arguments: str | Path, cwd: Path, **kwargs) -> subprocess.CompletedProcess[str]:
        """Run ``python -m rl_zoo3.<command>``."""
        return self.run("-m", f"rl_zoo3.{command}", *arguments, cwd=cwd, **kwargs)
