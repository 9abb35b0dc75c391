"""Installations of this package to run the zoo's commands in, as a user has them: a regular wheel and an editable one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


class Installation:
    """
    A virtual environment that holds this package, and sees the packages of the environment that runs the tests.

    :param folder: Where to make it
    :param requirement: What to install, for pip; nothing if empty
    """

    def __init__(self, folder: Path, *requirement: str | Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
        self.python = Path(paths["scripts"], "python")
        self.site_packages = Path(paths["purelib"])
        # Entries of a .pth file are plain paths: the .pth files in there, such as this package's own, do not run.
        parents = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        self.site_packages.joinpath("parent.pth").write_text("\n".join(parents))
        if requirement:
            pip(f"--python={self.python}", "install", "--no-deps", "--no-build-isolation", *requirement)

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


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def copy_project(folder: Path) -> Path:
    """setuptools builds in the folder that it is given, and what it leaves there would end up in later wheels."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "docs", "logs", "results", "tests", "*.egg-info")
    return shutil.copytree(PROJECT, folder, ignore=ignored)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this package."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_project(folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheel_installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("regular") / "venv", wheel)


@pytest.fixture(scope="session")
def editable_installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("editable")
    return Installation(folder / "venv", "--editable", copy_project(folder / "source"))


@pytest.fixture(scope="session", params=["regular", "editable"])
def installation(request: pytest.FixtureRequest) -> Installation:
    """Each of the two ways to install this package."""
    return request.getfixturevalue("wheel_installation" if request.param == "regular" else "editable_installation")


@pytest.fixture
def breakable_installation(wheel_installation: Installation, tmp_path: Path) -> Installation:
    """An installation of one test's own, whose files it may change."""
    copy = Installation(tmp_path / "venv")
    for path in wheel_installation.site_packages.glob("*sb3_ext*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy.site_packages / path.name)
    return copy
