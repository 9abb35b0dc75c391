"""The start-up hook: what it costs, when it does nothing, and what happens when this package is broken."""

import json
import re
import sys

import pytest

import _sb3_ext_startup as startup
import sb3_ext
from sb3_ext.zoo.patches import PATCHES

LIST_MODULES = "import sys; print(*sorted(sys.modules))"
LIST_ALGOS = "from rl_zoo3.utils import ALGOS; print(*ALGOS)"


def test_start_imports_the_hook_and_nothing_else(breakable_installation, tmp_path):
    def modules() -> set[str]:
        return set(breakable_installation.run("-c", LIST_MODULES, cwd=tmp_path).stdout.split())

    with_hook = modules()
    (breakable_installation.site_packages / "sb3_ext.pth").unlink()
    assert with_hook - modules() == {"_sb3_ext_startup"}


def test_importing_the_package_imports_no_dependency(installation, tmp_path):
    code = "import sb3_ext; sb3_ext.__version__, dir(sb3_ext); " + LIST_MODULES
    imported = {name.partition(".")[0] for name in installation.run("-c", code, cwd=tmp_path).stdout.split()}
    assert "sb3_ext" in imported
    assert not imported & {"torch", "numpy", "gymnasium", "stable_baselines3", "rl_zoo3", "optuna", "minari"}


def test_exports():
    from sb3_ext.algos.bcq import BCQ

    assert sb3_ext.BCQ is BCQ
    assert re.fullmatch(r"\d+\.\d+\.\d+", sb3_ext.__version__)
    assert set(sb3_ext.__all__) <= set(dir(sb3_ext))
    for name in sb3_ext.__all__:
        assert getattr(sb3_ext, name) is not None
    with pytest.raises(AttributeError, match="Nothing"):
        sb3_ext.Nothing  # noqa: B018


def test_hook_and_patches_name_the_same_modules():
    assert startup.PATCHED_MODULES == set(PATCHES)


def test_arm_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not startup.ZooFinder])
    before = list(sys.meta_path)
    monkeypatch.setenv("SB3_EXT_AUTOLOAD", "0")
    startup.arm()
    assert sys.meta_path == before
    monkeypatch.delenv("SB3_EXT_AUTOLOAD")
    startup.arm()
    startup.arm()
    assert sys.meta_path == [startup.ZooFinder, *before]


def test_patched_module_keeps_its_loader_and_source(wheel_installation, tmp_path):
    code = """
import importlib.machinery, inspect, json, rl_zoo3.utils as utils
print(json.dumps({
    "registered": "bcq" in utils.ALGOS,
    "loaders": [type(utils.__loader__).__name__, type(utils.__spec__.loader).__name__],
    "source": "def get_wrapper_class" in inspect.getsource(utils),
}))
"""
    found = json.loads(wheel_installation.run("-c", code, cwd=tmp_path).stdout)
    assert found == {"registered": True, "loaders": ["SourceFileLoader"] * 2, "source": True}


def test_autoload_0_disarms_the_hook(installation, tmp_path):
    disarmed = installation.run("-c", LIST_ALGOS, cwd=tmp_path, SB3_EXT_AUTOLOAD="0")
    assert "ppo" in disarmed.stdout.split() and "bcq" not in disarmed.stdout.split()
    by_hand = installation.run(
        "-c", f"import sb3_ext.zoo as z; z.register(); {LIST_ALGOS}", cwd=tmp_path, SB3_EXT_AUTOLOAD="0"
    )
    assert "bcq" in by_hand.stdout.split()


BREAKAGES = {
    "an algorithm": "algos/bcq/__init__.py",
    "the patches": "zoo/patches.py",
    "the package": "__init__.py",
}


@pytest.mark.parametrize("path", BREAKAGES.values(), ids=BREAKAGES.keys())
def test_broken_package_leaves_the_zoo_working(breakable_installation, tmp_path, path):
    module = breakable_installation.site_packages / "sb3_ext" / path
    module.write_text("raise RuntimeError('broken on purpose')\n")
    process = breakable_installation.zoo(
        "train", "--algo", "ppo", "-n", "16", "-params", "n_steps:2", "n_envs:1", cwd=tmp_path
    )
    assert "rl_zoo3/hyperparams/ppo.yml" in process.stdout
    assert "broken on purpose" in process.stderr
    assert process.stderr.count("RuntimeError") == 1, process.stderr
    asked = breakable_installation.zoo("train", "--algo", "bcq", cwd=tmp_path, check=False)
    assert asked.returncode == 2 and "invalid choice: 'bcq'" in asked.stderr


def test_broken_algorithm_says_nothing_outside_the_zoo(breakable_installation, tmp_path):
    (breakable_installation.site_packages / "sb3_ext/algos/bcq/__init__.py").write_text("raise RuntimeError\n")
    process = breakable_installation.run("-c", "import stable_baselines3", cwd=tmp_path)
    assert process.stderr == ""
