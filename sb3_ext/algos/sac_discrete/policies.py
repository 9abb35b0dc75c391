"""Networks of SAC-Discrete: a categorical actor, and critics that value all actions at once."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ext.common.conv_features import ConvFeatures, PreprocessingMixin
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.flat_policy import FlatPolicy
from sb3_ext.common.mlp import MLP, mlp


class HeadsModel(PreprocessingMixin, BaseModel):
    """
    Perceptrons on the same features, each with one output for each action.

    :param n_heads: Number of perceptrons
    :param net_arch: Hidden layers of each
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param kwargs: Arguments of ``BaseModel``: spaces, features extractor, whether images are normalized
    """

    action_space: spaces.Discrete

    def __init__(
        self, n_heads: int, net_arch: list[int], features_dim: int, activation_fn: type[nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        n_actions = int(self.action_space.n)
        self.networks = nn.ModuleList([mlp(features_dim, n_actions, net_arch, activation_fn) for _ in range(n_heads)])

    @property
    def heads(self) -> Heads:
        """The networks whose outputs ``forward`` returns."""
        return Heads(self.features_extractor, cast("list[MLP]", list(self.networks)))


class Actor(HeadsModel):
    """
    The policy, a categorical distribution.

    :param kwargs: As of :class:`HeadsModel`, but for the number of perceptrons
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_heads=1, **kwargs)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Batch of observations
        :return: Logits, (batch, n_actions)
        """
        (logits,) = self.heads(self.preprocess(obs))
        return logits


class Critic(HeadsModel):
    """
    The values of all actions, from several networks.

    :param kwargs: As of :class:`HeadsModel`
    """

    def forward(self, obs: PyTorchObs) -> list[th.Tensor]:
        """
        :param obs: Batch of observations
        :return: Values of each network, (batch, n_actions)
        """
        return self.heads(self.preprocess(obs))


class SACDiscretePolicy(FlatPolicy):
    """
    Policy of SAC-Discrete. Actor and critics have features extractors of their own; the critics share theirs.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers of actor and critics, ``dict(pi=[...], qf=[...])`` if they differ (None: 256-256 for
        vectors, 512 behind the convolutions for images)
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor to use
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer.
        Adam is fused unless they say something else.
    :param n_critics: Number of critics, >= 1
    """

    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
    ) -> None:
        if n_critics < 1:
            raise ValueError(f"n_critics must be at least 1, but got {n_critics}.")
        if net_arch is None:
            net_arch = [512] if issubclass(features_extractor_class, NatureCNN) else [256, 256]
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            activation_fn,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.n_critics = n_critics
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        net_kwargs = self._net_kwargs()
        self.actor = Actor(net_arch=actor_arch, **self._update_features_extractor(net_kwargs))
        self.critic = Critic(n_heads=self.n_critics, net_arch=critic_arch, **self._update_features_extractor(net_kwargs))
        self.critic_target = deepcopy(self.critic)
        self.critic_target.requires_grad_(False)
        self.critic_target.set_training_mode(False)
        self.flat_actor = FlatParameters(self.actor)
        self.flat_critic = FlatParameters(self.critic)
        self.flat_critic_target = FlatParameters(self.critic_target)
        self.actor_optimizer = self.make_optimizer(self.flat_actor, lr_schedule)
        self.critic_optimizer = self.make_optimizer(self.flat_critic, lr_schedule)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: Batch of observations
        :param deterministic: Whether to take the most likely action
        :return: Actions, (batch,)
        """
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        logits = self.actor(observation)
        actions = logits.argmax(dim=1) if deterministic else th.multinomial(logits.softmax(dim=1), 1).squeeze(1)
        return actions + int(self.action_space.start)

    def set_training_mode(self, mode: bool) -> None:
        # Acting sets it at every step, and setting it visits every module
        if self.training != mode or self.actor.training != mode or self.critic.training != mode:
            self.actor.set_training_mode(mode)
            self.critic.set_training_mode(mode)
            self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "n_critics": self.n_critics}


MlpPolicy = SACDiscretePolicy


class CnnPolicy(SACDiscretePolicy):
    """:class:`SACDiscretePolicy` for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", ConvFeatures)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(SACDiscretePolicy):
    """:class:`SACDiscretePolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
