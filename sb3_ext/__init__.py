"""Algorithms missing from Stable-Baselines3 and SB3-Contrib, registered with the RL Zoo.

Importing it costs nothing: names are looked up when they are asked for.
"""

from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sb3_ext.algos.bcq import BCQ
    from sb3_ext.algos.ddqn import DDQN
    from sb3_ext.algos.dueling_ddqn import DuelingDDQN
    from sb3_ext.algos.npg import NPG
    from sb3_ext.algos.option_critic import OptionCritic
    from sb3_ext.algos.reinforce import REINFORCE
    from sb3_ext.algos.sac_ae import SACAE
    from sb3_ext.algos.sac_discrete import SACDiscrete
    from sb3_ext.algos.trpo import TRPO
    from sb3_ext.algos.vpg import VPG
    from sb3_ext.common.conv_features import MinAtarFeatures
    from sb3_ext.common.frame_replay_buffer import FrameReplayBuffer
    from sb3_ext.common.offline_algorithm import OfflineAlgorithm

__all__ = [
    "BCQ",
    "DDQN",
    "NPG",
    "REINFORCE",
    "SACAE",
    "TRPO",
    "VPG",
    "DuelingDDQN",
    "FrameReplayBuffer",
    "MinAtarFeatures",
    "OfflineAlgorithm",
    "OptionCritic",
    "SACDiscrete",
    "__version__",
]

_MODULES = {
    "BCQ": "sb3_ext.algos.bcq",
    "DDQN": "sb3_ext.algos.ddqn",
    "DuelingDDQN": "sb3_ext.algos.dueling_ddqn",
    "NPG": "sb3_ext.algos.npg",
    "OptionCritic": "sb3_ext.algos.option_critic",
    "REINFORCE": "sb3_ext.algos.reinforce",
    "SACAE": "sb3_ext.algos.sac_ae",
    "SACDiscrete": "sb3_ext.algos.sac_discrete",
    "TRPO": "sb3_ext.algos.trpo",
    "VPG": "sb3_ext.algos.vpg",
    "FrameReplayBuffer": "sb3_ext.common.frame_replay_buffer",
    "MinAtarFeatures": "sb3_ext.common.conv_features",
    "OfflineAlgorithm": "sb3_ext.common.offline_algorithm",
}

# In a clone, some of the package's folders lie beside this one, and `python -m` finds the clone before what is installed
if not Path(__file__).with_name("hub").is_dir():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> object:
    if name == "__version__":
        return files(__name__).joinpath("version.txt").read_text().strip()
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
