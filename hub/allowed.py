"""The classes that the configuration of a saved agent may name.

They are looked up in tables that are made from the classes themselves: a name that is not in the table that belongs to its
place is refused, and nothing is ever imported because a file names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_ext.zoo.registry import ALGORITHMS

from .errors import SafeFormatError

Classes = Mapping[str, type]

_ALGORITHMS = [
    "stable_baselines3: A2C DDPG DQN PPO SAC TD3",
    # Not ARS, which keeps its weights outside of its policy
    "sb3_contrib: CrossQ MaskablePPO QRDQN RecurrentPPO TQC TRPO",
]
_EXTRACTORS = [
    "stable_baselines3.common.torch_layers: CombinedExtractor FlattenExtractor NatureCNN",
    "sb3_ext.common.conv_features: ConvFeatures MinAtarFeatures",
    "sb3_ext.algos.sac_ae.autoencoder: ConvEncoder",
]
# Optimizers whose state is made of numbers and of tensors of their parameters' shapes
_OPTIMIZERS = [
    "torch.optim: ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like: RMSpropTFLike",
]
_ACTIVATIONS = [
    "torch.nn: CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid "
    "Softplus Softsign Tanh Tanhshrink"
]
_BUFFERS = [
    "stable_baselines3.common.buffers: DictReplayBuffer DictRolloutBuffer NStepReplayBuffer ReplayBuffer RolloutBuffer",
    "stable_baselines3.her: HerReplayBuffer",
    "sb3_contrib.common.maskable.buffers: MaskableDictRolloutBuffer MaskableRolloutBuffer",
    "sb3_ext.common.replay_buffer: FastReplayBuffer",
    "sb3_ext.common.frame_replay_buffer: FrameReplayBuffer",
]
_NOISES = ["stable_baselines3.common.noise: NormalActionNoise OrnsteinUhlenbeckActionNoise"]
_WRAPPERS = [
    "stable_baselines3.common.atari_wrappers: AtariWrapper ClipRewardEnv EpisodicLifeEnv FireResetEnv MaxAndSkipEnv "
    "NoopResetEnv StickyActionEnv WarpFrame",
    "gymnasium.wrappers: ClipAction ClipReward DelayObservation DtypeObservation FilterObservation FlattenObservation "
    "FrameStackObservation GrayscaleObservation MaxAndSkipObservation RescaleAction RescaleObservation ReshapeObservation "
    "ResizeObservation StickyAction TimeAwareObservation TimeLimit",
    "sb3_contrib.common.wrappers: TimeFeatureWrapper",
    "sb3_ext.envs.pixels: ActionRepeat PixelObservation",
    "rl_zoo3.wrappers: ActionNoiseWrapper ActionSmoothingWrapper DelayedRewardWrapper HistoryWrapper HistoryWrapperObsDict "
    "MaskVelocityWrapper",
]


def path_of(cls: type) -> str:
    """
    :param cls: A class
    :return: Its name in a configuration, ``module:qualname``
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def table(classes: Iterable[type]) -> dict[str, type]:
    """
    :param classes: Classes
    :return: The same by name
    """
    return {path_of(cls): cls for cls in classes}


def _listed(lines: Iterable[str]) -> dict[str, type]:
    """:return: table of lines of this module, ``module: names``"""
    pairs = (line.split(":") for line in lines)
    return table(getattr(import_module(module), name) for module, names in pairs for name in names.split())


@lru_cache(maxsize=1)
def algorithms() -> Classes:
    """
    :return: The algorithms that can be saved and loaded
    """
    ours = (row.class_path.split(":") for row in ALGORITHMS)
    return {**_listed(_ALGORITHMS), **table(getattr(import_module(module), name) for module, name in ours)}


def policies(algorithm: type[BaseAlgorithm]) -> Classes:
    """
    :param algorithm: The algorithm
    :return: The policies that it has names for
    """
    # BCQ has others for Discrete actions
    aliases: list[Mapping[str, type[BasePolicy]]]
    aliases = [algorithm.policy_aliases, getattr(algorithm, "discrete_policy_aliases", {})]
    return table(policy for names in aliases for policy in names.values())


@lru_cache(maxsize=1)
def policy_parts() -> Classes:
    """
    :return: What ``policy_kwargs`` may name: features extractors, optimizers, activation functions
    """
    return _listed([*_EXTRACTORS, *_OPTIMIZERS, *_ACTIVATIONS])


@lru_cache(maxsize=1)
def buffers() -> Classes:
    """
    :return: Replay and rollout buffers
    """
    return _listed(_BUFFERS)


@lru_cache(maxsize=1)
def noises() -> Classes:
    """
    :return: Kinds of action noise
    """
    return _listed(_NOISES)


@lru_cache(maxsize=1)
def wrappers() -> Classes:
    """
    :return: Wrappers of environments
    """
    return _listed(_WRAPPERS)


def shown(value: object) -> str:
    """
    :param value: From a file, of any size
    :return: How a message shows it
    """
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def resolve(path: object, classes: Classes, where: str) -> type:
    """
    :param path: What a configuration has in the place of a class
    :param classes: The table for this place
    :param where: What to call the place in a message
    :return: The class
    :raises SafeFormatError: if it is not in the table
    """
    if not isinstance(path, str) or path not in classes:
        raise SafeFormatError(
            f"{where}: {shown(path)} is not on the list of classes allowed here. If it is a class of yours, or of somebody "
            "you trust, import it and pass it as allow=[TheClass]."
        )
    return classes[path]


def check_allowed(cls: type, classes: Classes, where: str) -> str:
    """
    :param cls: A class that is to be saved
    :param classes: The table for its place
    :param where: What to call the place in a message
    :return: Its name
    :raises SafeFormatError: if it is not in the table
    """
    # Two classes of one name are not the same
    if resolve(path_of(cls), classes, where) is not cls:
        raise SafeFormatError(f"{where}: there are two classes {path_of(cls)}. Give one of them another name.")
    return path_of(cls)
