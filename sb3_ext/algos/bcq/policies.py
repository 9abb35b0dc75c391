"""Networks of BCQ: the generative model of the data's actions, the constraint that it defines, and the critics."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ext.common.conv_features import ConvFeatures
from sb3_ext.common.evaluation import Heads
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.flat_policy import FlatPolicy
from sb3_ext.common.mlp import MLP, mlp
from sb3_ext.common.q_network import QNetwork

# Bounds of the log standard deviation in the authors' code
LOG_STD_MIN, LOG_STD_MAX = -4.0, 15.0


class ActionVAE(BaseModel):
    """
    Conditional variational autoencoder of the data's actions, p(a | s) (Fujimoto et al. 2019, Algorithm 1).

    Actions are scaled to [-1, 1].

    :param net_arch: Hidden layers of the encoder and of the decoder
    :param latent_dim: Size of the latent vector
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param kwargs: Arguments of ``BaseModel``: spaces, features extractor, whether images are normalized
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self, net_arch: list[int], latent_dim: int, features_dim: int, activation_fn: type[nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        action_dim = get_action_dim(self.action_space)
        self.encoder = mlp(features_dim + action_dim, 2 * latent_dim, net_arch, activation_fn)
        self.decoder = mlp(features_dim + latent_dim, action_dim, net_arch, activation_fn)

    def encode(self, features: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param features: (batch, features_dim)
        :param actions: (batch, action_dim), in [-1, 1]
        :return: Mean and log standard deviation of the latent vector, (batch, latent_dim) each
        """
        mean, log_std = self.encoder(th.cat([features, actions], dim=1)).chunk(2, dim=1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def decode(self, features: th.Tensor, latents: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :param latents: (batch, latent_dim)
        :return: Actions, (batch, action_dim), in [-1, 1]
        """
        return self.decoder(th.cat([features, latents], dim=1)).tanh()


class Perturbation(BaseModel):
    """
    Moves an action by at most ``scale`` in each dimension (Fujimoto et al. 2019, Algorithm 1).

    :param net_arch: Hidden layers
    :param scale: Largest change of an action, in units of half the action range
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param kwargs: Arguments of ``BaseModel``: spaces, features extractor, whether images are normalized
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self, net_arch: list[int], scale: float, features_dim: int, activation_fn: type[nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        action_dim = get_action_dim(self.action_space)
        self.net = mlp(features_dim + action_dim, action_dim, net_arch, activation_fn)

    def forward(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, features_dim)
        :param actions: (batch, action_dim), in [-1, 1]
        :return: Perturbed actions, (batch, action_dim), in [-1, 1]
        """
        return (actions + self.scale * self.net(th.cat([features, actions], dim=1)).tanh()).clamp(-1.0, 1.0)


class BCQPolicy(FlatPolicy):
    """What the policies for continuous and for discrete actions have in common, see :class:`FlatPolicy` for the parameters."""

    #: Names of the optimizers, each over one of the policy's :class:`FlatParameters`
    optimizer_names: ClassVar[list[str]]

    def _set_targets(self, *pairs: tuple[nn.Module, nn.Module]) -> None:
        """
        :param pairs: Networks and their target networks
        """
        self._targets = [target.requires_grad_(False).train(False) for _, target in pairs]
        layers = (zip(online.modules(), target.modules(), strict=True) for online, target in pairs)
        self._normalizations = [pair for pairs in layers for pair in pairs if hasattr(pair[0], "running_mean")]

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)
        # Targets have no dropout, and do not take statistics of batches
        for target in self._targets:
            target.train(False)

    def copy_running_statistics(self) -> None:
        """As SB3's algorithms: those of batch normalization are not averaged."""
        for online, target in self._normalizations:
            for statistic, of_target in zip(online.buffers(recurse=False), target.buffers(recurse=False), strict=True):
                of_target.copy_(statistic)


class ContinuousBCQPolicy(BCQPolicy):
    """
    Policy of BCQ for ``Box`` actions (Fujimoto et al. 2019).

    Inside, actions are scaled from the bounds of the action space to [-1, 1], dimension by dimension. Each network has a
    features extractor of its own.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers of the critics and of the perturbation network
    :param vae_net_arch: Hidden layers of the encoder and of the decoder of the generative model
    :param n_critics: Number of critics, >= 1
    :param latent_dim: Size of the latent vector (None: twice the number of action dimensions)
    :param latent_clip: Latent samples are clipped to [-latent_clip, latent_clip], > 0
    :param perturbation_scale: Largest perturbation of an action, in units of half the action range, in [0, 1]
    :param n_acting_candidates: Number of candidate actions when acting, >= 1
    """

    optimizer_names: ClassVar[list[str]] = ["vae_optimizer", "critic_optimizer", "perturbation_optimizer"]
    action_space: spaces.Box
    acting_latents: th.Tensor
    action_low: th.Tensor
    action_high: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        vae_net_arch: list[int] | None = None,
        n_critics: int = 2,
        latent_dim: int | None = None,
        latent_clip: float = 0.5,
        perturbation_scale: float = 0.05,
        n_acting_candidates: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(observation_space, action_space, [400, 300] if net_arch is None else net_arch, **kwargs)
        self._squash_output = True
        self.vae_net_arch = [750, 750] if vae_net_arch is None else vae_net_arch
        self.n_critics = n_critics
        self.latent_dim = 2 * get_action_dim(action_space) if latent_dim is None else latent_dim
        self.latent_clip = latent_clip
        self.perturbation_scale = perturbation_scale
        self.n_acting_candidates = n_acting_candidates
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.vae = ActionVAE(
            net_arch=self.vae_net_arch, latent_dim=self.latent_dim, **self._update_features_extractor(self._net_kwargs())
        )
        self.critic = self._make_critic()
        self.perturbation = Perturbation(
            net_arch=self.net_arch, scale=self.perturbation_scale, **self._update_features_extractor(self._net_kwargs())
        )
        self.critic_target = deepcopy(self.critic)
        self.perturbation_target = deepcopy(self.perturbation)
        self._set_targets((self.critic, self.critic_target), (self.perturbation, self.perturbation_target))

        self.flat_vae = FlatParameters(self.vae)
        self.flat_critic = FlatParameters(self.critic)
        self.flat_perturbation = FlatParameters(self.perturbation)
        self.flat_critic_target = FlatParameters(self.critic_target)
        self.flat_perturbation_target = FlatParameters(self.perturbation_target)
        self.vae_optimizer = self.make_optimizer(self.flat_vae, lr_schedule)
        self.critic_optimizer = self.make_optimizer(self.flat_critic, lr_schedule)
        self.perturbation_optimizer = self.make_optimizer(self.flat_perturbation, lr_schedule)

        # Acting deterministically means choosing among the same latent vectors every time
        self.register_buffer("acting_latents", self.clip_latents(th.randn(self.n_acting_candidates, self.latent_dim)))
        self.register_buffer("action_low", th.as_tensor(self.action_space.low.reshape(-1), dtype=th.float32))
        self.register_buffer("action_high", th.as_tensor(self.action_space.high.reshape(-1), dtype=th.float32))

    def _make_critic(self) -> ContinuousCritic:
        critic = ContinuousCritic(
            net_arch=self.net_arch,
            n_critics=self.n_critics,
            share_features_extractor=False,
            **self._update_features_extractor(self._net_kwargs()),
        )
        for index, q_network in enumerate(critic.q_networks):
            critic.q_networks[index] = MLP(*q_network.children())
            critic.add_module(f"qf{index}", critic.q_networks[index])
        return critic

    def clip_latents(self, latents: th.Tensor) -> th.Tensor:
        return latents.clamp_(-self.latent_clip, self.latent_clip)

    def scale_actions(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: (batch, action_dim), in the units of the environment
        :return: (batch, action_dim), in [-1, 1]
        """
        return 2.0 * (actions - self.action_low) / (self.action_high - self.action_low) - 1.0

    @staticmethod
    def q_values(critic: ContinuousCritic, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param critic: The critics
        :param features: (batch, features_dim), from the critics' own features extractor
        :param actions: (batch, action_dim), in [-1, 1]
        :return: (n_critics, batch)
        """
        inputs = th.cat([features, actions], dim=1)
        return th.stack([q_network(inputs).squeeze(1) for q_network in critic.q_networks])

    def candidate_actions(
        self, obs: PyTorchObs, latents: th.Tensor, perturbation: Perturbation, n_candidates: int
    ) -> th.Tensor:
        """
        Actions that the data make likely, each moved by the perturbation network.

        :param obs: Batch of observations
        :param latents: (batch * n_candidates, latent_dim), already clipped
        :param perturbation: The online or the target network
        :param n_candidates: Candidates for each observation
        :return: (batch * n_candidates, action_dim), in [-1, 1]; the candidates of one observation are consecutive
        """
        features = self.vae.extract_features(obs, self.vae.features_extractor).repeat_interleave(n_candidates, dim=0)
        actions = self.vae.decode(features, latents)
        features = perturbation.extract_features(obs, perturbation.features_extractor)
        return perturbation(features.repeat_interleave(n_candidates, dim=0), actions)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        features = self.critic.extract_features(observation, self.critic.features_extractor)
        n_obs, n_candidates = len(features), self.n_acting_candidates
        if deterministic:
            latents = self.acting_latents.repeat(n_obs, 1)
        else:
            latents = self.clip_latents(th.randn(n_obs * n_candidates, self.latent_dim, device=self.device))
        actions = self.candidate_actions(observation, latents, self.perturbation, n_candidates)
        inputs = th.cat([features.repeat_interleave(n_candidates, dim=0), actions], dim=1)
        best = self.critic.q_networks[0](inputs).view(n_obs, n_candidates).argmax(dim=1)
        # (n_obs * n_candidates, action_dim) -> (n_obs, action_dim)
        return actions.view(n_obs, n_candidates, -1)[th.arange(n_obs, device=self.device), best]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "vae_net_arch": self.vae_net_arch,
            "n_critics": self.n_critics,
            "latent_dim": self.latent_dim,
            "latent_clip": self.latent_clip,
            "perturbation_scale": self.perturbation_scale,
            "n_acting_candidates": self.n_acting_candidates,
        }


class DiscreteBCQPolicy(BCQPolicy):
    """
    Policy of BCQ for ``Discrete`` actions (Fujimoto et al. 2019b).

    The value and the imitation head share the features extractor.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers of each head (None: 256-256 for vectors, 512 behind the convolutions for images)
    :param action_threshold: An action is allowed if the imitation head gives it at least this fraction of the
        probability of the most likely action, in [0, 1]
    """

    optimizer_names: ClassVar[list[str]] = ["optimizer"]
    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        action_threshold: float = 0.3,
        **kwargs: Any,
    ) -> None:
        if net_arch is None:
            net_arch = [512] if issubclass(kwargs.get("features_extractor_class", FlattenExtractor), NatureCNN) else [256, 256]
        super().__init__(observation_space, action_space, net_arch, **kwargs)
        self.action_threshold = action_threshold
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        net_kwargs = self._update_features_extractor(self._net_kwargs())
        self.q_net = QNetwork(net_arch=self.net_arch, **net_kwargs)
        self.imitation_net = mlp(net_kwargs["features_dim"], int(self.action_space.n), self.net_arch, self.activation_fn)
        self.q_net_target = deepcopy(self.q_net)
        self._set_targets((self.q_net, self.q_net_target))
        # The target has no imitation head: its parameters are the first of the online ones
        self.flat = FlatParameters(self.q_net, self.imitation_net)
        self.flat_target = FlatParameters(self.q_net_target)
        self.optimizer = self.make_optimizer(self.flat, lr_schedule)

    @property
    def heads(self) -> Heads:
        """Values and imitation logits on features that they share."""
        return Heads(self.q_net.features_extractor, [cast(MLP, self.q_net.q_net), self.imitation_net])

    def forward(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: Batch of observations
        :return: Values and imitation logits, (batch, n_actions) each
        """
        q_values, logits = self.heads(self.q_net.preprocess(obs))
        return q_values, logits

    def constrained_argmax(self, q_values: th.Tensor, logits: th.Tensor) -> th.Tensor:
        """
        The best of the actions that the data make likely (Fujimoto et al. 2019b, Algorithm 1).

        The comparison is made between log-probabilities, whose differences are those of the logits.

        :param q_values: (batch, n_actions)
        :param logits: (batch, n_actions)
        :return: (batch, 1), counted from 0
        """
        log_threshold = math.log(self.action_threshold) if self.action_threshold > 0 else -math.inf
        unlikely = logits - logits.max(dim=1, keepdim=True).values < log_threshold
        return q_values.masked_fill(unlikely, th.finfo(q_values.dtype).min).argmax(dim=1, keepdim=True)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        # Greedy either way: the method acts greedily, and the data are fixed
        actions = self.constrained_argmax(*self(observation)).squeeze(1)
        return actions + int(self.action_space.start)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "action_threshold": self.action_threshold}


class ContinuousCnnPolicy(ContinuousBCQPolicy):
    """:class:`ContinuousBCQPolicy` for images."""

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class ContinuousMultiInputPolicy(ContinuousBCQPolicy):
    """:class:`ContinuousBCQPolicy` for Dict observations."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class DiscreteCnnPolicy(DiscreteBCQPolicy):
    """:class:`DiscreteBCQPolicy` for images."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = ConvFeatures, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class DiscreteMultiInputPolicy(DiscreteBCQPolicy):
    """:class:`DiscreteBCQPolicy` for Dict observations."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)
