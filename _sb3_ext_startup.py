"""What runs at every start of the interpreter: it arms the registration with the RL Zoo, and does nothing else.

rl-zoo3 has no plugin mechanism, so ``sb3_ext.pth`` calls :func:`arm`, which puts a finder on ``sys.meta_path``. When one of
the zoo's modules is imported, the finder lets the real loader run it and then has it patched (``sb3_ext.zoo.patches``). A
process that never imports the zoo pays for this file only: keep it short, and import nothing that the interpreter has not
imported already.

It lies outside the package because it has to work when the package does not: site.py prints a traceback for a start-up line
that fails, at every start, and in virtual environments twice.
"""

import os
import sys

# The keys of sb3_ext.zoo.patches.PATCHES, repeated because importing that table at every start would cost too much.
PATCHED_MODULES = frozenset(
    {
        "huggingface_hub.repocard",
        "huggingface_sb3.load_from_hub",
        "huggingface_sb3.push_to_hub",
        "rl_zoo3.exp_manager",
        "rl_zoo3.hyperparams_opt",
        "rl_zoo3.import_envs",
        "rl_zoo3.utils",
    }
)

_reported: list[str] = []


class PatchingLoader:
    """Behaves as the loader it is given, and patches the module after that one has run it."""

    def __init__(self, loader) -> None:  # type: ignore[no-untyped-def] # its type would cost an import
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            from sb3_ext.zoo import patches

            patches.apply(module)
        except Exception as error:  # whatever is wrong with this package, the zoo goes on without it
            if not _reported:
                _reported.append(module.__name__)
                reason = f"{type(error).__name__}: {error}"
                print(f"sb3-ext: warning: its algorithms are not available in rl_zoo3 ({reason})", file=sys.stderr)


class ZooFinder:
    """Finds the modules named in ``PATCHED_MODULES`` by asking the finders behind it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in PATCHED_MODULES:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not cls and hasattr(finder, "find_spec") else None
            if spec is not None:
                spec.loader = PatchingLoader(spec.loader)
                return spec
        return None


def arm() -> None:
    """
    Have the algorithms of this package registered as soon as rl_zoo3 is imported.

    Calling it again changes nothing. With ``SB3_EXT_AUTOLOAD=0`` in the environment it does nothing.
    """
    if os.environ.get("SB3_EXT_AUTOLOAD") != "0" and ZooFinder not in sys.meta_path:
        sys.meta_path.insert(0, ZooFinder)
