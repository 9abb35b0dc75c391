"""Networks of Double DQN: SB3's, with all parameters in one tensor."""

from __future__ import annotations

from typing import Any, cast

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

from sb3_ext.common.conv_features import ChannelsLastMixin
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.flat_parameters import FlatParameters, FlatParametersMixin
from sb3_ext.common.mlp import MLP


class DDQNQNetwork(ChannelsLastMixin, QNetwork):
    """
    SB3's Q-network, whose outputs can be differentiated without automatic differentiation.

    :param args: As of SB3's ``QNetwork``
    :param kwargs: As of SB3's ``QNetwork``
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_net = MLP(*self.q_net.children())

    @property
    def heads(self) -> Heads:
        """The networks whose outputs ``combine`` takes."""
        return Heads(self.extract_features_of, [cast(MLP, self.q_net)])

    def extract_features_of(self, obs: PyTorchObs) -> th.Tensor:
        return self.extract_features(obs, self.features_extractor)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        # SB3's counts the actions from 0
        return super()._predict(observation, deterministic) + int(self.action_space.start)

    def combine(self, *outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: Of ``heads``, (batch, ...)
        :return: Values of all actions, (batch, n_actions)
        """
        (q_values,) = outputs
        return q_values

    def split_gradient(self, gradient: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param gradient: Of a loss with respect to the values, (batch, n_actions)
        :return: Its gradient with respect to each of the outputs
        """
        return (gradient,)


class DDQNPolicy(FlatParametersMixin, DQNPolicy):
    """
    Policy of Double DQN. The parameters are SB3's, see ``DQNPolicy``; Adam is fused unless ``optimizer_kwargs`` say something
    else.
    """

    q_net: DDQNQNetwork
    q_net_target: DDQNQNetwork

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.q_net_target.requires_grad_(False)
        self.flat = FlatParameters(self.q_net)
        self.optimizer = self.flat.make_optimizer(self.optimizer_class, lr_schedule(1), self.optimizer_kwargs)

    def step(self, max_grad_norm: float) -> None:
        """
        One step of the optimizer along the gradient that is there.

        :param max_grad_norm: Largest Euclidean norm of the gradient
        """
        self.flat.step(self.optimizer, max_grad_norm)

    def make_q_net(self) -> DDQNQNetwork:
        # A features extractor of its own for each network
        return DDQNQNetwork(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


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
