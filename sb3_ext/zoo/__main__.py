"""The zoo's commands with our algorithms, for interpreters that run no start-up hooks.

``python -m sb3_ext.zoo train --algo bcq`` is ``python -m rl_zoo3.train --algo bcq``, and so on for every command of the zoo.
"""

import runpy
import sys
from importlib.util import find_spec

from sb3_ext.zoo import register

USAGE = "usage: python -m sb3_ext.zoo {train,enjoy,record_video,push_to_hub,load_from_hub,benchmark,...} [arguments]"


def main() -> None:
    """Run the zoo's command that the first argument names with the arguments behind it."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if not command.isidentifier():
        sys.exit(USAGE)
    # Before find_spec, which imports rl_zoo3
    register()
    if find_spec(f"rl_zoo3.{command}") is None:
        sys.exit(USAGE)
    del sys.argv[1]
    runpy.run_module(f"rl_zoo3.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
