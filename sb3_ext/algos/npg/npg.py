from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutBufferSamples, Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_ext.common.arguments import check_range
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.fisher import kl_divergence, linearize
from sb3_ext.common.natural_gradient import conjugate_gradients, natural_step
from sb3_ext.common.observations import map_observations
from sb3_ext.common.policy_gradient import PolicyGradientAlgorithm


class Outcome(NamedTuple):
    """
    What comes of a step of the actor.

    :param kl: Mean KL divergence of the new policy from the old one, KL(old || new), in nats
    :param objective: The surrogate objective
    """

    kl: float
    objective: float


class NPG(PolicyGradientAlgorithm):
    """
    Natural Policy Gradient (NPG): one step along the natural gradient per rollout, as long as ``target_kl`` allows.

    Paper: Kakade 2001, "A Natural Policy Gradient", with the length of the step from Rajeswaran et al. 2017, "Towards
    Generalization and Simplicity in Continuous Control" (https://arxiv.org/abs/1703.02660, equation 5). Where others
    multiply the natural gradient by a constant, this step moves the policy by the same KL divergence every time, to second
    order. The documentation lists where we differ from the papers.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critic, > 0; it can be a function of the current progress remaining (from 1 to
        0). The actor has none: ``target_kl`` says how far it moves.
    :param n_steps: Steps in each environment per update, >= 1: an update has ``n_steps * n_envs`` samples
    :param batch_size: Samples in one step of the critic, >= 1 (None: the whole rollout)
    :param gamma: Discount factor, in [0, 1]
    :param cg_max_steps: Largest number of steps of the conjugate gradients, >= 1
    :param cg_damping: Multiple of the identity that is added to the Fisher matrix, >= 0
    :param n_critic_updates: Passes of the critic over the rollout per update, >= 0
    :param gae_lambda: Trade-off of bias and variance in the advantage estimates, in [0, 1]; 1 is the discounted return
        minus the value
    :param use_sde: Whether to use generalized State Dependent Exploration (Box only)
    :param sde_sample_freq: Draw a new noise matrix every so many steps with gSDE (-1: once per rollout)
    :param rollout_buffer_class: Rollout buffer class to use (None: chosen by the observation space); its rollout is used
        whole, without its ``get``
    :param rollout_buffer_kwargs: Keyword arguments of the rollout buffer
    :param normalize_advantage: Whether to standardize the advantages of each rollout
    :param target_kl: KL divergence of an update, to second order, > 0; summed over action dimensions, averaged over
        samples, in nats; it can be a function of the current progress remaining
    :param sub_sampling_factor: Use one in so many samples, drawn at random, for the Fisher matrix, >= 1
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if a space is not supported, a number is out of range, or training diverges
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int | None = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            gamma=gamma,
            gae_lambda=gae_lambda,
            n_critic_updates=n_critic_updates,
            critic_learning_rate=None,
            ent_coef=0.0,
            max_grad_norm=None,
            normalize_advantage=normalize_advantage,
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
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        check_range(self, 1, float("inf"), "cg_max_steps", "sub_sampling_factor")
        check_range(self, 0, float("inf"), "cg_damping")
        if not callable(target_kl):
            check_range(self, sys.float_info.min, float("inf"), "target_kl")
        if _init_setup_model:
            self._setup_model()

    @without_denormals
    def train(self) -> None:
        """Update actor and critic once with the rollout."""
        self._prepare_update()
        rollout = self._rollout()
        # As while collecting: dropout would make the new policy differ from the old one without any step
        self.policy.set_training_mode(False)
        self._update_actor(rollout)
        self.policy.set_training_mode(True)
        self._update_critic(rollout.observations, rollout.returns)
        self._n_updates += 1
        self._record_policy()

    def policy_objective(
        self, distribution: Distribution, actions: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor
    ) -> th.Tensor:
        """
        The surrogate objective of TRPO, equation 14: ``mean(pi(a|s) / pi_old(a|s) * A)``.

        :param distribution: The policy's, for all samples
        :param actions: The actions taken, (n_samples, ...)
        :param old_log_prob: Their log-probabilities when they were taken, constants, (n_samples,)
        :param advantages: Constants, (n_samples,)
        :return: Scalar
        """
        return (th.exp(distribution.log_prob(actions) - old_log_prob) * advantages).mean()

    def _update_actor(self, rollout: RolloutBufferSamples) -> None:
        observations, actions, advantages = rollout.observations, rollout.actions, self._normalized(rollout.advantages)
        actor = linearize(self.policy, self.actor_parameters, observations)
        old_log_prob = actor.distribution.log_prob(actions).detach()
        objective = self.policy_objective(actor.distribution, actions, old_log_prob, advantages)
        gradient = actor.gradient(objective)

        fisher = actor
        if self.sub_sampling_factor > 1:
            n_samples = len(advantages)
            # At random, since the rows of each environment are evenly spaced
            rows = th.randperm(n_samples, device=advantages.device)[: math.ceil(n_samples / self.sub_sampling_factor)]
            some_observations = map_observations(lambda tensor: tensor[rows], observations)
            fisher = linearize(self.policy, self.actor_parameters, some_observations)

        def product(vector: th.Tensor) -> th.Tensor:
            return fisher.fisher_product(vector) + self.cg_damping * vector

        direction, image = conjugate_gradients(product, gradient, self.cg_max_steps)
        step = natural_step(direction, image, self._max_kl())

        parameters = self.actor_parameters.tensor.data
        old_parameters = parameters.clone()

        def move(step: th.Tensor) -> Outcome:
            th.add(old_parameters, step, out=parameters)
            with th.no_grad():
                try:
                    distribution = self.policy.get_distribution(observations)
                except ValueError:
                    # torch refuses parameters of a distribution that are not finite
                    return Outcome(kl=math.nan, objective=math.nan)
                return Outcome(
                    kl=kl_divergence(actor.distribution, distribution).mean().item(),
                    objective=self.policy_objective(distribution, actions, old_log_prob, advantages).item(),
                )

        stay = Outcome(kl=0.0, objective=objective.item())
        outcome = None if step is None else self._take_step(step, move, stay)
        if outcome is None:
            parameters.copy_(old_parameters)
        self.logger.record("train/is_step_taken", float(outcome is not None))
        self.logger.record("train/policy_objective", (outcome or stay).objective)
        self.logger.record("train/kl_divergence_loss", (outcome or stay).kl)

    def _max_kl(self) -> float:
        """:return: ``target_kl`` at this point of the training"""
        return FloatSchedule(self.target_kl)(self._current_progress_remaining)

    def _take_step(self, step: th.Tensor, move: Callable[[th.Tensor], Outcome], stay: Outcome) -> Outcome | None:
        """
        Move the actor.

        :param step: The natural step, (n_actor_parameters,)
        :param move: Puts the actor a step away from where it was, and says what came of it
        :param stay: What comes of no step
        :return: Of the step that was taken; None if the actor has to be put back
        """
        outcome = move(step)
        return outcome if math.isfinite(outcome.kl) else None
