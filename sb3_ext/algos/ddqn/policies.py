"""Networks of Double DQN: SB3's, with all parameters in one tensor."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy

from sb3_ext.common.flat_parameters import FlatParameters, FlatParametersMixin
from sb3_ext.common.mlp import MLP, layers_as_numpy, suits_numpy
from sb3_ext.common.q_network import QNetwork


class DDQNPolicy(FlatParametersMixin, DQNPolicy):
    """
    Policy of Double DQN. The parameters are SB3's, see ``DQNPolicy``; Adam is fused unless ``optimizer_kwargs`` say something
    else.
    """

    action_space: spaces.Discrete
    q_net: QNetwork
    q_net_target: QNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.q_net_target.requires_grad_(False)
        self.flat = FlatParameters(self.q_net)
        self.optimizer = self.flat.make_optimizer(self.optimizer_class, lr_schedule(1), self.optimizer_kwargs)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        As SB3's, and in numpy where that is faster: for a few observations that are vectors, on CPU.

        :param observation: One observation or a batch of them
        :param state: Not used
        :param episode_start: Not used
        :param deterministic: Not used
        :return: The best actions, and ``state``
        """
        if not self._acts_in_numpy(observation):
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        forward = layers_as_numpy(self.q_net.acting_layers(), cast(MLP, self.q_net.q_net).activation_fn)
        scores = forward(observation.astype(np.float32, copy=False).reshape(len(observation), -1))
        return scores.argmax(axis=1) + self.action_space.start, state

    def _acts_in_numpy(self, observation: np.ndarray | dict[str, np.ndarray]) -> TypeGuard[np.ndarray]:
        return (
            isinstance(observation, np.ndarray)
            and observation.shape[1:] == self.observation_space.shape
            and suits_numpy(len(observation), [self.flat.tensor])
            and type(self)._predict is DDQNPolicy._predict
            and self.q_net.is_perceptron
        )

    def set_training_mode(self, mode: bool) -> None:
        # Acting sets it at every step, and setting it visits every module
        if self.training != mode or self.q_net.training != mode:
            super().set_training_mode(mode)

    def make_q_net(self) -> QNetwork:
        # A features extractor of its own for each network
        return QNetwork(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


MlpPolicy = DDQNPolicy


class CnnPolicy(DDQNPolicy):
    """:class:`DDQNPolicy` for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(DDQNPolicy):
    """:class:`DDQNPolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
