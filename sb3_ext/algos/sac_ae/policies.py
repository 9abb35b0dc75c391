"""Networks of SAC-AE: SAC's actor and critics on the features of one autoencoder."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from torch.distributions import Normal

from sb3_ext.algos.sac_ae.autoencoder import ConvDecoder, ConvEncoder, init_weights
from sb3_ext.common.adam import fused_unless
from sb3_ext.common.conv_features import normalized


class Actor(SACActor):
    """
    SAC's actor with bounds on the logarithm of the standard deviation that it approaches smoothly.

    :param log_std_min: Lower bound
    :param log_std_max: Upper bound
    :param kwargs: As of SB3's actor
    """

    features_extractor: ConvEncoder

    def __init__(self, log_std_min: float, log_std_max: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        for network in (self.latent_pi, self.mu, self.log_std):
            network.apply(init_weights)  # type: ignore[union-attr]

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        return *self._dist_params(self.extract_features(obs, self.features_extractor)), {}

    def action_log_prob_of_maps(self, maps: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param maps: Of the convolutions, (batch, filters, height, width)
        :return: Sampled actions in [-1, 1], (batch, action_dim), and the logarithms of their densities, (batch, 1)
        """
        mean_actions, log_std = self._dist_params(self.features_extractor.project(maps))
        # Not `action_dist`, which would keep the graph and with it the activations
        squashed = SquashedDiagGaussianDistribution(mean_actions.shape[1])
        # A GPU would have to wait for each validation, and a CUDA graph cannot
        squashed.distribution = Normal(mean_actions, log_std.exp(), validate_args=False)
        actions = squashed.sample()
        return actions, squashed.log_prob(actions, squashed.gaussian_actions).reshape(-1, 1)

    def _dist_params(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        latent_pi = self.latent_pi(features)
        fraction = 0.5 * (self.log_std(latent_pi).tanh() + 1)  # type: ignore[operator]
        return self.mu(latent_pi), self.log_std_min + (self.log_std_max - self.log_std_min) * fraction

    def _get_constructor_parameters(self) -> dict[str, Any]:
        bounds = {"log_std_min": self.log_std_min, "log_std_max": self.log_std_max}
        return {**super()._get_constructor_parameters(), **bounds}


class Critic(ContinuousCritic):
    """
    SAC's critics, which share their encoder.

    :param kwargs: As of SB3's critic
    """

    features_extractor: ConvEncoder

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for q_network in self.q_networks:
            q_network.apply(init_weights)

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: Latent vectors, (batch, features_dim)
        :param actions: In [-1, 1], (batch, action_dim)
        :return: Of each critic, (batch, n_critics)
        """
        inputs = th.cat([features, actions], dim=1)
        return th.cat([q_network(inputs) for q_network in self.q_networks], dim=1)

    def head_parameters(self) -> list[nn.Parameter]:
        """
        :return: All that does not belong to the encoder
        """
        return [param for q_network in self.q_networks for param in q_network.parameters()]


class SACAEPolicy(SACPolicy):
    """
    Policy of SAC-AE. The convolutions of actor and critic are the same modules; the linear layers behind them are not.

    :param observation_space: Images
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers of actor and critics, ``dict(pi=[...], qf=[...])`` if they differ (None: 1024-1024)
    :param activation_fn: Activation function
    :param features_extractor_class: The encoder, :class:`ConvEncoder` or a subclass with the same ``forward``
    :param features_extractor_kwargs: Keyword arguments of the encoder: ``features_dim``, ``n_layers``, ``n_filters``
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizers of actor,
        critic and autoencoder. Adam is fused unless they say something else.
    :param n_critics: Number of critics, >= 1
    :param log_std_min: Lower bound of the logarithm of the actor's standard deviation
    :param log_std_max: Upper bound of it
    :param actor_trains_convolutions: Whether the actor's gradient goes through the convolutions, which the paper found harmful
    :param decoder_weight_decay: L2 penalty on the decoder's weights, >= 0
    :raises ValueError: if the encoder is of another kind, or the images are too small for it
    """

    actor: Actor
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = ConvEncoder,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        log_std_min: float = -10.0,
        log_std_max: float = 2.0,
        actor_trains_convolutions: bool = False,
        decoder_weight_decay: float = 1e-7,
    ) -> None:
        if not issubclass(features_extractor_class, ConvEncoder):
            raise ValueError(f"features_extractor_class must be a ConvEncoder, but got {features_extractor_class.__name__}.")
        if features_extractor_class.forward is not ConvEncoder.forward:
            raise ValueError(
                f"{features_extractor_class.__name__} has a `forward` of its own, but the losses call its parts: change "
                "`convolutions` and `project` instead."
            )
        # SACPolicy builds the networks at the end of its constructor
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.actor_trains_convolutions = actor_trains_convolutions
        self.decoder_weight_decay = decoder_weight_decay
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [1024, 1024] if net_arch is None else net_arch,
            activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.critic = self.make_critic()
        self.critic_target = deepcopy(self.critic)
        self.critic_target.set_training_mode(False)
        self.actor = self.make_actor()
        encoder = self.critic.features_extractor
        self.actor.features_extractor.convolutions = encoder.convolutions
        self.decoder = ConvDecoder(encoder)

        learning_rate = lr_schedule(1)
        of_actor = dict(self.actor.named_parameters())
        if not self.actor_trains_convolutions:
            of_actor = {name: param for name, param in of_actor.items() if "convolutions" not in name}
        self.actor.optimizer = self._make_optimizer(list(of_actor.values()), learning_rate)
        # The encoder learns from the critic's loss and from the autoencoder's, each with an optimizer of its own
        self.critic.optimizer = self._make_optimizer(list(self.critic.parameters()), learning_rate)
        self.encoder_optimizer = self._make_optimizer(list(encoder.parameters()), learning_rate)
        # Not every optimizer has one
        has_weight_decay = self.decoder_weight_decay > 0 or "weight_decay" in self.optimizer_kwargs
        weight_decay = {"weight_decay": self.decoder_weight_decay} if has_weight_decay else {}
        self.decoder_optimizer = self._make_optimizer(list(self.decoder.parameters()), learning_rate, **weight_decay)

    def _make_optimizer(self, params: list[nn.Parameter], learning_rate: float, **kwargs: float) -> th.optim.Optimizer:
        given = fused_unless(self.optimizer_kwargs) if self.optimizer_class is th.optim.Adam else self.optimizer_kwargs
        return self.optimizer_class(params, lr=learning_rate, **{**given, **kwargs})  # type: ignore

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return Actor(log_std_min=self.log_std_min, log_std_max=self.log_std_max, **actor_kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        return Critic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def parameters_to_vector(self) -> np.ndarray:
        # SB3's needs weights that are not laid out channels-last
        return th.cat([param.detach().reshape(-1) for param in self.parameters()]).cpu().numpy()

    def preprocess(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: Observations, uint8, (batch, channels, height, width)
        :return: What the encoders take
        """
        return normalized(images) if self.normalize_images else images.float()

    def reconstruct(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: Observations, uint8, (batch, channels, height, width)
        :return: What the decoder makes of their latent vectors, around 0, of the same shape
        """
        return self.decoder(self.critic.features_extractor(self.preprocess(images)))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("use_sde", "log_std_init", "use_expln", "clip_mean"):
            del data[name]
        own = ("normalize_images", "log_std_min", "log_std_max", "actor_trains_convolutions", "decoder_weight_decay")
        return {**data, **{name: getattr(self, name) for name in own}}


CnnPolicy = SACAEPolicy
