"""Installations of this package: a regular wheel and an editable one, made once for all tests."""

import shutil
from pathlib import Path

import pytest
import torch
from installation import Installation

PROJECT = Path(__file__).resolve().parent.parent

# The networks of the tests are too small for a second thread, which only waits for the first one when cores are busy
torch.set_num_threads(1)


def copy_project(folder: Path) -> Path:
    """setuptools builds in the folder that it is given, and what it leaves there would end up in later wheels."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "docs", "logs", "results", "tests", "*.egg-info")
    return shutil.copytree(PROJECT, folder, ignore=ignored)


@pytest.fixture(scope="session")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository holds, except for tests and documentation; the editable installation points to it."""
    return copy_project(tmp_path_factory.mktemp("project") / "sb3-ext")


@pytest.fixture(scope="session")
def wheel_installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("regular")
    return Installation(folder / "venv", copy_project(folder / "source"))


@pytest.fixture(scope="session")
def editable_installation(project_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("editable") / "venv", "--editable", project_copy)


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
