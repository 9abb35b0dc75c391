"""Only what setup.cfg cannot say: everything else about the project stands there.

The start-up hook ``sb3_ext.pth`` has to lie in site-packages itself, beside the package. setuptools has no setting for that,
and regular and editable wheels are made by different commands.
"""

import os
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HOOK = "sb3_ext.pth"
# Top-level folders that ship inside the package (package_dir in setup.cfg), which find_packages cannot see.
MAPPED = ["sb3_ext.hyperparams", "sb3_ext.optuna_studies", "sb3_ext.hub"]


class BuildWithHook(build_py):
    """Regular wheels: what lies in build_lib is what goes into site-packages."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(HOOK, os.path.join(self.build_lib, HOOK))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, os.path.join(self.build_lib, HOOK)]


class EditableWheelWithHook(editable_wheel):
    """Editable wheels: this is the step in which setuptools itself writes the .pth files of namespace packages."""

    def _install_namespaces(self, installation_dir: str, pth_prefix: str) -> None:
        super()._install_namespaces(installation_dir, pth_prefix)
        shutil.copy(HOOK, installation_dir)


setup(
    packages=[*find_packages(include=["sb3_ext", "sb3_ext.*"]), *MAPPED],
    cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWheelWithHook},
)
