"""Networks of Option-Critic: values of the options, when each of them ends, and how each of them acts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ext.common.conv_features import PreprocessingMixin
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.flat_policy import FlatPolicy
from sb3_ext.common.mlp import ACTIVATIONS, MLP, mlp, suits_numpy


class Step(NamedTuple):
    """
    What is decided in a batch of states.

    :param options: The option in force, counted from 0, (batch,)
    :param actions: As drawn: Discrete actions counted from 0, (batch,), or Box actions in units of half the action range,
        which can leave [-1, 1], (batch, action_dim)
    :param is_chosen: Whether the option was chosen in this state, (batch,)
    :param terminations: Probability that the option in force before ends in this state, (batch,)
    :param survivals: Probability that the option in force would have lasted until now since it was chosen, (batch,)
    """

    options: np.ndarray
    actions: np.ndarray
    is_chosen: np.ndarray
    terminations: np.ndarray
    survivals: np.ndarray


class Outputs(NamedTuple):
    """
    What the networks say about a batch of states.

    :param values: Of the options, (batch, n_options)
    :param terminations: Probability of each option to end, (batch, n_options)
    :param actions: Parameters of the options' distributions: logits or means, (batch, n_options, action_dim)
    """

    values: np.ndarray
    terminations: np.ndarray
    actions: np.ndarray


class OptionValues(PreprocessingMixin, BaseModel):
    """
    Features, shared layers, and the values of the options.

    :param n_options: Number of options
    :param net_arch: Shared layers
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param head_arch: Hidden layers of the values
    :param head_bias: Whether the values have biases
    :param kwargs: Arguments of ``BaseModel``: spaces, features extractor, whether images are normalized
    """

    def __init__(
        self,
        n_options: int,
        net_arch: list[int],
        features_dim: int,
        activation_fn: type[nn.Module],
        head_arch: list[int],
        head_bias: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.trunk: nn.Module = nn.Identity()
        self.hidden_dim = net_arch[-1] if net_arch else features_dim
        if net_arch:
            self.trunk = nn.Sequential(mlp(features_dim, net_arch[-1], net_arch[:-1], activation_fn), activation_fn())
        self.values = _head(self.hidden_dim, n_options, head_arch, activation_fn, head_bias)

    def hidden(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Batch of observations
        :return: What all heads see, (batch, hidden_dim)
        """
        return self.trunk(self.extract_features(obs, self.features_extractor))

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Batch of observations
        :return: Values of all options, (batch, n_options)
        """
        return self.values(self.hidden(obs))


class OptionCriticPolicy(FlatPolicy):
    """
    Policy of Option-Critic.

    The option in force is its recurrent state, see :meth:`predict`. Box actions are scaled from the bounds of the action space
    to [-1, 1], dimension by dimension, and clipped before they are used.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param n_options: Number of options, >= 1
    :param net_arch: Shared layers (None: 64-64 for vectors, none behind the Nature CNN for images)
    :param activation_fn: Activation function
    :param temperature: The preferences for Discrete actions are divided by it, > 0
    :param log_std_init: Initial logarithm of the standard deviations of Box actions, in units of half the action range
    :param head_arch: Hidden layers of each head: of the values, of the terminations, and of the actions (None: none). All
        options share them.
    :param head_bias: Whether the heads have biases. Without them and without layers, one-hot observations give tables.
    :param features_extractor_class: Features extractor to use
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizers.
        Adam is fused unless they say something else.
    :raises ValueError: if a number is out of range
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box | spaces.Discrete,
        lr_schedule: Schedule,
        n_options: int = 4,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        temperature: float = 1.0,
        log_std_init: float = 0.0,
        head_arch: list[int] | None = None,
        head_bias: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if n_options < 1:
            raise ValueError(f"n_options must be at least 1, but got {n_options}.")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, but got {temperature}.")
        if net_arch is None:
            net_arch = [] if issubclass(features_extractor_class, NatureCNN) else [64, 64]
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
            # Actions come out of _predict in [-1, 1]
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.n_options = n_options
        self.temperature = temperature
        self.log_std_init = log_std_init
        self.head_arch = head_arch or []
        self.head_bias = head_bias
        is_box = isinstance(action_space, spaces.Box)
        self.action_dim = get_action_dim(action_space) if is_box else int(action_space.n)  # type: ignore[union-attr]
        # What predict() was given, for _predict(), and the state after this
        self._given: tuple[Any, Any] = (None, None)
        self._state: tuple[np.ndarray, ...] = ()
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        net_kwargs = self._update_features_extractor(self._net_kwargs())
        self.critic = OptionValues(
            self.n_options, self.net_arch, head_arch=self.head_arch, head_bias=self.head_bias, **net_kwargs
        )
        self.critic_target = deepcopy(self.critic)
        self.critic_target.requires_grad_(False)
        self.critic_target.set_training_mode(False)
        head = partial(_head, head_arch=self.head_arch, activation_fn=self.activation_fn, bias=self.head_bias)
        self.termination_net = head(self.critic.hidden_dim, self.n_options)
        self.actor = head(self.critic.hidden_dim, self.n_options * self.action_dim)
        self.log_std = None
        if isinstance(self.action_space, spaces.Box):
            self.log_std = nn.Parameter(th.full((self.n_options, self.action_dim), self.log_std_init))

        self.flat_critic = FlatParameters(self.critic)
        self.flat_termination = FlatParameters(self.termination_net)
        self.flat_actor = FlatParameters(self.actor, *([] if self.log_std is None else [self.log_std]))
        self.critic_optimizer = self.make_optimizer(self.flat_critic, lr_schedule)
        self.termination_optimizer = self.make_optimizer(self.flat_termination, lr_schedule)
        self.actor_optimizer = self.make_optimizer(self.flat_actor, lr_schedule)

    def terminations(self, hidden: th.Tensor) -> th.Tensor:
        """
        :param hidden: Of states, (batch, hidden_dim)
        :return: Probability of each option to end there, (batch, n_options)
        """
        return self.termination_net(hidden).sigmoid()

    def distribution(self, hidden: th.Tensor, options: th.Tensor) -> Distribution:
        """
        :param hidden: Of states, (batch, hidden_dim)
        :param options: One for each state, counted from 0, (batch,)
        :return: The options' distributions of actions
        """
        outputs = self._option_outputs(hidden, options)
        if self.log_std is None:
            return CategoricalDistribution(self.action_dim).proba_distribution(action_logits=outputs)
        return DiagGaussianDistribution(self.action_dim).proba_distribution(outputs, self.log_std[options])

    def evaluate_options(self, hidden: th.Tensor, options: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param hidden: Of states, (batch, hidden_dim)
        :param options: One for each state, counted from 0, (batch,)
        :param actions: As drawn, (batch, action_dim), or (batch, 1) if they are Discrete
        :return: Logarithms of their probabilities or densities, and entropies of the options' distributions, (batch,) each
        """
        if self.log_std is not None:
            distribution = self.distribution(hidden, options)
            return distribution.log_prob(actions), cast(th.Tensor, distribution.entropy())
        # As SB3's distribution, which checks its arguments
        log_probs = self._option_outputs(hidden, options).log_softmax(dim=1)
        return log_probs.gather(1, actions).squeeze(1), -(log_probs.exp() * log_probs).sum(dim=1)

    def _option_outputs(self, hidden: th.Tensor, options: th.Tensor) -> th.Tensor:
        outputs = self.actor(hidden).unflatten(1, (self.n_options, -1))[th.arange(len(options)), options]
        return outputs / self.temperature if self.log_std is None else outputs

    @th.no_grad()
    def outputs(self, obs: PyTorchObs) -> Outputs:
        """
        :param obs: Batch of observations
        :return: What the networks say
        """
        hidden = self.critic.hidden(obs)
        arrays = (self.critic.values(hidden), self.terminations(hidden), self.actor(hidden).unflatten(1, (self.n_options, -1)))
        return Outputs(*(array.cpu().numpy() for array in arrays))

    def outputs_in_numpy(self, n_rows: int) -> Callable[[np.ndarray], Outputs] | None:
        """
        :param n_rows: Rows of the arrays to come
        :return: As ``outputs``, for arrays of vectors, with the parameters as they are when it is called; None if these
            networks cannot be computed so, or if torch is faster
        """
        trunk = cast(MLP, self.critic.trunk[0]) if isinstance(self.critic.trunk, nn.Sequential) else None
        networks = [cast(MLP, self.critic.values), self.termination_net, self.actor, *([] if trunk is None else [trunk])]
        is_vector = isinstance(self.observation_space, spaces.Box) and not is_image_space(self.observation_space)
        is_flat = is_vector and type(self.critic.features_extractor) is FlattenExtractor
        is_plain = self.activation_fn in ACTIVATIONS and all(network.is_plain for network in networks)
        parameters = chain.from_iterable(network.weights_and_biases() for network in networks)
        if not (is_flat and is_plain and suits_numpy(n_rows, parameters)):
            return None
        values, terminations, actor, *hidden = (network.as_numpy() for network in networks)
        activate = ACTIVATIONS[self.activation_fn].numpy_in_place

        def outputs(obs: np.ndarray) -> Outputs:
            inputs = obs.reshape(len(obs), -1).astype(np.float32, copy=False)
            for layers in hidden:
                inputs = activate(layers(inputs))
            # numpy has no sigmoid
            ends = th.from_numpy(terminations(inputs)).sigmoid_().numpy()
            return Outputs(values(inputs), ends, actor(inputs).reshape(len(obs), self.n_options, -1))

        return outputs

    def decide(
        self,
        outputs: Outputs,
        options: np.ndarray,
        is_start: np.ndarray,
        deterministic: bool,
        epsilon: float = 0.0,
        survivals: np.ndarray | float = 1.0,
    ) -> Step:
        """
        Call and return: the option in force ends or goes on, where it has ended another one is chosen, and the option acts.

        :param outputs: Of the networks for a batch of states
        :param options: The option in force before, counted from 0, (batch,); of no meaning at the start of an episode
        :param is_start: Whether an episode starts, (batch,)
        :param deterministic: Whether to end options at the median of their duration, and to take the most likely action,
            instead of drawing both
        :param epsilon: Probability that the chosen option is drawn at random instead of being the one of the highest value
        :param survivals: Probability that the option in force before would have lasted until then, (batch,); of no meaning
            unless deterministic
        :return: What is decided
        """
        n, rows = len(options), np.arange(len(options))
        terminations = outputs.terminations[rows, options]
        survivals = survivals * (1.0 - terminations)
        has_ended = survivals < 0.5 if deterministic else np.random.random(n) < terminations
        is_chosen = has_ended | is_start
        best = outputs.values.argmax(axis=1)
        if epsilon > 0.0:
            best = np.where(np.random.random(n) < epsilon, np.random.randint(self.n_options, size=n), best)
        options = np.where(is_chosen, best, options)
        actions = self._draw(outputs.actions[rows, options], options, deterministic)
        return Step(options, actions, is_chosen, terminations, np.where(is_chosen, 1.0, survivals))

    def _draw(self, outputs: np.ndarray, options: np.ndarray, deterministic: bool) -> np.ndarray:
        """:return: actions of the options"""
        if self.log_std is not None:
            std = np.exp(self.log_std.detach().cpu().numpy()[options])
            return outputs if deterministic else outputs + std * np.random.standard_normal(outputs.shape).astype(np.float32)
        # The largest of logits plus Gumbel noise is a draw from their softmax
        noise = 0.0 if deterministic else np.random.gumbel(size=outputs.shape)
        return (outputs / self.temperature + noise).argmax(axis=1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: As drawn
        :return: Discrete actions as the environment counts them, Box actions clipped to [-1, 1]
        """
        if isinstance(self.action_space, spaces.Box):
            return actions.clip(-1.0, 1.0)
        return actions + int(self.action_space.start)  # type: ignore[attr-defined]

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        :param observation: One observation or a batch
        :param state: What the last call returned; None at the start
        :param episode_start: Where it is True, the option is chosen anew, (batch,); None: nowhere
        :param deterministic: Whether to end options at the median of their duration, as soon as it is more likely than not
            that they would have ended, and to take the most likely action, instead of drawing both. The option that is
            chosen is always the one of the highest value.
        :return: The actions, and the state: a tuple of the options in force, counted from 0, and of the probabilities that
            they would have lasted until now, (batch,) each
        :raises ValueError: if the state is none for these observations
        """
        self._given = (state, episode_start)
        actions, _ = super().predict(observation, deterministic=deterministic)
        return actions, self._state

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        state, episode_start = self._given
        any_observation = next(iter(observation.values())) if isinstance(observation, dict) else observation
        options, survivals, is_start = self._unpack(state, episode_start, len(any_observation))
        step = self.decide(self.outputs(observation), options, is_start, deterministic, survivals=survivals)
        self._given, self._state = (None, None), (step.options, step.survivals)
        return th.as_tensor(self.to_env(step.actions))

    def _unpack(self, state: Any, episode_start: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """:return: options, survivals and episode starts of ``n`` observations"""
        if state is None:
            return np.zeros(n, np.int64), np.ones(n), np.ones(n, bool)
        is_start = np.zeros(n, bool) if episode_start is None else np.asarray(episode_start, bool)
        shapes = [np.shape(array) for array in (*(state if isinstance(state, tuple) else (state,)), is_start)]
        if shapes != 3 * [(n,)]:
            raise ValueError(
                f"For {n} observations, the state must be a tuple of two arrays with {n} numbers each, and episode_start must "
                f"have the same shape, but got {shapes[:-1]} and {shapes[-1]}. Pass on what predict() returned, or None."
            )
        options, survivals = map(np.asarray, state)
        if not np.issubdtype(options.dtype, np.integer) or (options < 0).any() or (options >= self.n_options).any():
            raise ValueError(f"The state must hold options, integers from 0 to {self.n_options - 1}, but got {options}.")
        return options, survivals, is_start

    def set_training_mode(self, mode: bool) -> None:
        # Acting sets it at every step, and setting it visits every module
        if self.training != mode or self.critic.training != mode:
            self.critic.set_training_mode(mode)
            self.training = mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "n_options": self.n_options,
            "temperature": self.temperature,
            "log_std_init": self.log_std_init,
            "head_arch": self.head_arch,
            "head_bias": self.head_bias,
        }


def _head(input_dim: int, output_dim: int, head_arch: list[int], activation_fn: type[nn.Module], bias: bool) -> MLP:
    head = mlp(input_dim, output_dim, head_arch, activation_fn, with_bias=bias)
    # Nearly zero, as the last layer of SB3's policies: options begin undecided
    last = cast(nn.Linear, head[-1])
    nn.init.orthogonal_(last.weight, gain=0.01)
    if bias:
        nn.init.zeros_(last.bias)
    return head


MlpPolicy = OptionCriticPolicy


class CnnPolicy(OptionCriticPolicy):
    """:class:`OptionCriticPolicy` for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(OptionCriticPolicy):
    """:class:`OptionCriticPolicy` for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
