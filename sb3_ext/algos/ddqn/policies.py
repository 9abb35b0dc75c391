"""Networks of Double DQN: SB3's, with all parameters in one tensor."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy

from sb3_ext.common.flat_parameters import FlatParameters, FlatParametersMixin
from sb3_ext.common.q_network import QNetwork


class DDQNPolicy(FlatParametersMixin, DQNPolicy):
    """
    Policy of Double DQN. The parameters are SB3's, see ``DQNPolicy``; Adam is fused unless ``optimizer_kwargs`` say something
    else.
    """

    q_net: QNetwork
    q_net_target: QNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.q_net_target.requires_grad_(False)
        self.flat = FlatParameters(self.q_net)
        self.optimizer = self.flat.make_optimizer(self.optimizer_class, lr_schedule(1), self.optimizer_kwargs)

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
