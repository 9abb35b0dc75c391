from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ext.algos.npg.npg import NPG, Outcome
from sb3_ext.common.arguments import check_range


class TRPO(NPG):
    """
    Trust Region Policy Optimization (TRPO): the natural step, shortened until the policy is better and near enough.

    Paper: Schulman et al. 2015, "Trust Region Policy Optimization" (https://arxiv.org/abs/1502.05477), appendix C. The
    constructor is that of sb3-contrib's TRPO, and ``target_kl`` bounds the joint KL divergence of all action dimensions,
    where sb3-contrib's bounds their mean. The documentation lists where we differ from the paper.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the critic, > 0; it can be a function of the current progress remaining (from 1 to
        0). The actor has none: ``target_kl`` says how far it moves.
    :param n_steps: Steps in each environment per update, >= 1: an update has ``n_steps * n_envs`` samples
    :param batch_size: Samples in one step of the critic, >= 1 (None: the whole rollout)
    :param gamma: Discount factor, in [0, 1]
    :param cg_max_steps: Largest number of steps of the conjugate gradients, >= 1
    :param cg_damping: Multiple of the identity that is added to the Fisher matrix, >= 0
    :param line_search_shrinking_factor: What a rejected step is multiplied by, in (0, 1)
    :param line_search_max_iter: Largest number of steps that are tried, >= 1
    :param n_critic_updates: Passes of the critic over the rollout per update, >= 0
    :param gae_lambda: Trade-off of bias and variance in the advantage estimates, in [0, 1]; 1 is the discounted return
        minus the value
    :param use_sde: Whether to use generalized State Dependent Exploration (Box only)
    :param sde_sample_freq: Draw a new noise matrix every so many steps with gSDE (-1: once per rollout)
    :param rollout_buffer_class: Rollout buffer class to use (None: chosen by the observation space); its rollout is used
        whole, without its ``get``
    :param rollout_buffer_kwargs: Keyword arguments of the rollout buffer
    :param normalize_advantage: Whether to standardize the advantages of each rollout
    :param target_kl: Largest KL divergence of an update, > 0; summed over action dimensions, averaged over samples, in
        nats; it can be a function of the current progress remaining
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
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
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
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            n_critic_updates=n_critic_updates,
            gae_lambda=gae_lambda,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            sub_sampling_factor=sub_sampling_factor,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        check_range(self, 1, float("inf"), "line_search_max_iter")
        check_range(self, 0, 1, "line_search_shrinking_factor")
        if line_search_shrinking_factor in (0, 1):
            raise ValueError(
                f"line_search_shrinking_factor must be above 0 and below 1, but got {line_search_shrinking_factor}."
            )

    def _take_step(self, step: th.Tensor, move: Callable[[th.Tensor], Outcome], stay: Outcome) -> Outcome | None:
        """
        Backtracking line search: the first of ever shorter steps within ``target_kl`` that improves the objective.

        :param step: The natural step, (n_actor_parameters,)
        :param move: Puts the actor a step away from where it was, and says what came of it
        :param stay: What comes of no step
        :return: Of the step that was taken; None if there was none
        """
        for iteration in range(self.line_search_max_iter):
            outcome = move(self.line_search_shrinking_factor**iteration * step)
            # A comparison with NaN is false
            if outcome.kl <= self._max_kl() and outcome.objective > stay.objective:
                return outcome
        return None
