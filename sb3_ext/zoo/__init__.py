"""The algorithms of this package in the RL Zoo: what to register, how, and the gaps of the zoo that are closed on the way."""


def register() -> None:
    """
    Add the algorithms of this package to the zoo of this process.

    The start-up hook does this by itself when rl_zoo3 is imported; call it where hooks are switched off, before importing
    anything from rl_zoo3. Doing it again changes nothing, and a name that the zoo already has is left to the zoo.

    :raises ImportError: if rl_zoo3 or one of the algorithms cannot be imported
    """
    import sys
    from importlib import import_module

    from _sb3_ext_startup import ZooFinder
    from sb3_ext.zoo import patches

    # The zoo's modules take names from one another while they are imported, so they are patched one by one on the way.
    if ZooFinder not in sys.meta_path:
        sys.meta_path.insert(0, ZooFinder)
    for name in patches.PATCHES:
        patches.apply(import_module(name))
