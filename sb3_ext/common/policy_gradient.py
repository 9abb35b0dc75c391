"""Base class of the algorithms that follow the policy gradient of whole rollouts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, RolloutBufferSamples, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, update_learning_rate
from torch.nn import functional as F

from sb3_ext.common.actor_critic import critic_network, split_parameters
from sb3_ext.common.arguments import check_range
from sb3_ext.common.flat_parameters import FlatParameters
from sb3_ext.common.losses import standardized
from sb3_ext.common.mlp import MLP
from sb3_ext.common.observations import map_observations
from sb3_ext.common.progress import ProgressMixin
from sb3_ext.common.rollouts import ActorOnlyRollouts

SelfPolicyGradientAlgorithm = TypeVar("SelfPolicyGradientAlgorithm", bound="PolicyGradientAlgorithm")

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class PolicyGradientAlgorithm(ProgressMixin, ActorOnlyRollouts, OnPolicyAlgorithm):
    """
    Collects a rollout, improves the actor once with all of it, then fits the critic.

    Actor and critic are optimized apart. Which parameters are whose is found out from what the action distribution and the
    value depend on; what both depend on, such as a shared features extractor, is the actor's, and the critic leaves it as
    it is.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the optimizers, > 0; it can be a function of the current progress remaining (from
        1 to 0)
    :param n_steps: Steps in each environment per update, >= 1
    :param batch_size: Samples in one step of the critic, >= 1 (None: the whole rollout)
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Trade-off of bias and variance in the advantage estimates, in [0, 1]; 1 is the discounted return
        minus the value
    :param n_critic_updates: Passes of the critic over the rollout per update, >= 0
    :param critic_learning_rate: The critic's learning rate, > 0 (None: ``learning_rate``)
    :param ent_coef: Weight of the entropy in the actor's loss, >= 0
    :param max_grad_norm: Largest norm of the actor's gradient (None: no limit)
    :param normalize_advantage: Whether to standardize the advantages of each rollout
    :param use_sde: Whether to use generalized State Dependent Exploration (Box only)
    :param sde_sample_freq: Draw a new noise matrix every so many steps with gSDE (-1: once per rollout)
    :param rollout_buffer_class: Rollout buffer class to use (None: chosen by the observation space); its rollout is used
        whole, without its ``get``
    :param rollout_buffer_kwargs: Keyword arguments of the rollout buffer
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if a space is not supported or a number is out of range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }
    actor_parameters: FlatParameters
    critic_parameters: FlatParameters
    critic_optimizer: th.optim.Optimizer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule,
        n_steps: int,
        batch_size: int | None,
        gamma: float,
        gae_lambda: float,
        n_critic_updates: int,
        critic_learning_rate: float | Schedule | None,
        ent_coef: float,
        max_grad_norm: float | None,
        normalize_advantage: bool,
        use_sde: bool,
        sde_sample_freq: int,
        rollout_buffer_class: type[RolloutBuffer] | None,
        rollout_buffer_kwargs: dict[str, Any] | None,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
        _init_setup_model: bool,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,  # the critic has an optimizer of its own
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.n_critic_updates = n_critic_updates
        self.critic_learning_rate = critic_learning_rate
        self.normalize_advantage = normalize_advantage
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        name = type(self).__name__
        if not isinstance(self.action_space, ACTION_SPACES):
            supported = ", ".join(space.__name__ for space in ACTION_SPACES)
            raise ValueError(f"{name} supports {supported} action spaces, but got {self.action_space}.")
        if isinstance(self.action_space, spaces.Discrete) and self.action_space.start != 0:
            # SB3's actor-critic policies count from 0
            raise ValueError(f"{name} supports Discrete action spaces that start at 0, but got {self.action_space}.")
        check_range(self, 1, float("inf"), "n_steps", "batch_size")
        check_range(self, 0, float("inf"), "n_critic_updates", "ent_coef", "max_grad_norm")
        if not callable(self.critic_learning_rate):
            check_range(self, 0, float("inf"), "critic_learning_rate")
        check_range(self, 0, 1, "gamma", "gae_lambda")
        if self.normalize_advantage and self.n_steps * self.n_envs < 2:
            raise ValueError(
                "The advantages of a single sample cannot be standardized: n_steps * n_envs must be at least 2 with "
                f"normalize_advantage=True, but got n_steps={self.n_steps} and n_envs={self.n_envs}."
            )

    def _setup_model(self) -> None:
        self._check_arguments()
        super()._setup_model()
        actor, critic = split_parameters(self.policy)
        self.actor_parameters = FlatParameters(*actor)
        if self.n_critic_updates > 0:
            if not critic:
                raise ValueError(
                    f"The policy has no parameters that only its value depends on, so {type(self).__name__} cannot fit it "
                    "without changing the actor: give the critic layers of its own."
                )
            self.critic_parameters = FlatParameters(*critic)
            self.critic_optimizer = self._make_optimizer(self.critic_parameters)
        # SB3's optimizer over actor and critic together is not used
        vars(self.policy).pop("optimizer", None)

    def _make_optimizer(self, parameters: FlatParameters) -> th.optim.Optimizer:
        return parameters.make_optimizer(self.policy.optimizer_class, self.lr_schedule(1), self.policy.optimizer_kwargs)

    def _prepare_update(self) -> None:
        """Set the learning rates, and see to it that the optimizers move the parameters wherever they lie now."""
        for name in ("actor_parameters", "critic_parameters"):
            parameters = getattr(self, name, None)
            if parameters is not None:
                parameters.rebind()
        self._update_learning_rate([getattr(self, name) for name in self._optimizer_names()])
        if self.critic_learning_rate is not None and self.n_critic_updates > 0:
            critic_learning_rate = FloatSchedule(self.critic_learning_rate)(self._current_progress_remaining)
            update_learning_rate(self.critic_optimizer, critic_learning_rate)

    def _rollout(self) -> RolloutBufferSamples:
        """
        The rollout as tensors without copying it, in the order of collection: first the first step in every environment.

        :return: Each with n_steps * n_envs rows
        """
        buffer = self.rollout_buffer

        def rows(array: np.ndarray) -> th.Tensor:
            if buffer.generator_ready:
                # A callback has read the buffer, which then is in the order of the environments
                array = array.reshape(buffer.n_envs, buffer.buffer_size, *array.shape[1:]).swapaxes(0, 1)
            return th.as_tensor(array.reshape(-1, *array.shape[2:]), device=self.device)

        actions = rows(buffer.actions)
        # SB3 has another class for Dict observations, which differs from this one in name only
        return RolloutBufferSamples(
            map_observations(rows, buffer.observations),
            actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions.float(),
            *(rows(array).flatten() for array in (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)),
        )

    def _normalized(self, advantages: th.Tensor) -> th.Tensor:
        """
        :param advantages: (n_samples,)
        :return: With mean 0 and standard deviation 1 if ``normalize_advantage``; 0 if all are equal
        """
        return standardized(advantages) if self.normalize_advantage else advantages

    def critic_loss(self, observations: PyTorchObs, returns: th.Tensor) -> th.Tensor:
        """
        Mean squared error of the values.

        :param observations: (n_samples, ...)
        :param returns: The targets, (n_samples,)
        :return: Scalar
        """
        return F.mse_loss(self.policy.predict_values(observations).flatten(), returns)

    def _update_critic(self, observations: PyTorchObs, returns: th.Tensor) -> None:
        """
        Fit the critic by ``n_critic_updates`` passes.

        :param observations: (n_samples, ...)
        :param returns: The targets, (n_samples,)
        """
        if self.n_critic_updates == 0:
            return
        network = critic_network(self.policy)
        compute_gradient: Callable[[Any, th.Tensor], th.Tensor]
        has_this_loss = type(self).critic_loss is PolicyGradientAlgorithm.critic_loss
        if has_this_loss and network is not None and self.critic_parameters.consists_of(network.weights_and_biases()):
            # By hand, because a small batch keeps autograd busier than the processor
            assert isinstance(observations, th.Tensor)
            observations = observations.float().flatten(1)
            compute_gradient = partial(self._critic_gradient_by_hand, network, self.critic_parameters.gradient_views())
        else:
            compute_gradient = self._critic_gradient
        for _ in range(self.n_critic_updates):
            losses = []
            for batch_observations, batch_returns in self._minibatches(observations, returns):
                losses.append(compute_gradient(batch_observations, batch_returns))
                self.critic_parameters.step(self.critic_optimizer)
        value_loss = th.stack(losses).mean().item()
        if not np.isfinite(value_loss):
            raise ValueError(
                f"Training diverged: the loss of the values is {value_loss} after {self.num_timesteps} steps. Try a smaller "
                "learning rate, or normalize rewards with VecNormalize."
            )
        self.logger.record("train/value_loss", value_loss)

    def _critic_gradient(self, observations: PyTorchObs, returns: th.Tensor) -> th.Tensor:
        loss = self.critic_loss(observations, returns)
        self.critic_parameters.backward(loss)
        return loss.detach()

    @staticmethod
    def _critic_gradient_by_hand(network: MLP, gradient: list[th.Tensor], observations: Any, returns: th.Tensor) -> th.Tensor:
        activations = network.activations(observations)
        values, targets = activations[-1], returns.unsqueeze(1)
        network.gradients(activations, (values - targets).mul_(2 / len(targets)), out=gradient)
        return th.ops.aten.mse_loss(values, targets)

    def _minibatches(self, observations: PyTorchObs, returns: th.Tensor) -> Iterator[tuple[PyTorchObs, th.Tensor]]:
        """One pass over the rollout: all of it at once, or in batches of ``batch_size`` in random order."""
        if self.batch_size is None or self.batch_size >= len(returns):
            yield observations, returns
            return
        order = th.randperm(len(returns), device=returns.device)
        # Once for the whole pass: gathering each batch takes longer
        shuffled = map_observations(lambda tensor: tensor[order], observations)
        shuffled_returns = returns[order]
        for start in range(0, len(returns), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield map_observations(operator.itemgetter(rows), shuffled), shuffled_returns[rows]

    def _record_policy(self) -> None:
        """Record what all of these algorithms log about their policy."""
        if self.n_critic_updates > 0:
            # Of the values that the advantages were computed with
            explained = explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten())
            self.logger.record("train/explained_variance", explained)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfPolicyGradientAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPolicyGradientAlgorithm:
        """
        Return a trained model.

        :param total_timesteps: Steps to take in all environments together; whole rollouts are collected
        :param callback: Callback(s) called at every step
        :param log_interval: Number of rollouts between two writes of the log
        :param tb_log_name: The name of the run for TensorBoard logging (None: the name of the class)
        :param reset_num_timesteps: Whether or not to reset the count of steps (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        :raises ValueError: if training diverges
        """
        tb_log_name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _optimizer_names(self) -> list[str]:
        """:return: Attributes that hold the optimizers"""
        return ["critic_optimizer"] if self.n_critic_updates > 0 else []

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self._optimizer_names()], []

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor_parameters", "critic_parameters"]
