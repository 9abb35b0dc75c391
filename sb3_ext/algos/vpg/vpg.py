from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule

from sb3_ext.common.actor_critic import action_distribution
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.fisher import kl_divergence
from sb3_ext.common.policy_gradient import PolicyGradientAlgorithm


class VPG(PolicyGradientAlgorithm):
    """
    Vanilla Policy Gradient (VPG): one step along the policy gradient per rollout, with a critic as baseline.

    Paper: Sutton et al. 1999, "Policy Gradient Methods for Reinforcement Learning with Function Approximation", with
    advantages from Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation"
    (https://arxiv.org/abs/1506.02438). The defaults are those of OpenAI's Spinning Up
    (https://spinningup.openai.com/en/latest/algorithms/vpg.html). The documentation lists where we differ.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate of the actor, > 0; it can be a function of the current progress remaining (from 1
        to 0)
    :param n_steps: Steps in each environment per update, >= 1: an update has ``n_steps * n_envs`` samples
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
    :raises ValueError: if a space is not supported, a number is out of range, or training diverges
    """

    actor_optimizer: th.optim.Optimizer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.97,
        n_critic_updates: int = 80,
        critic_learning_rate: float | Schedule | None = 1e-3,
        ent_coef: float = 0.0,
        max_grad_norm: float | None = None,
        normalize_advantage: bool = True,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
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
            critic_learning_rate=critic_learning_rate,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
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
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor_optimizer = self._make_optimizer(self.actor_parameters)

    @without_denormals
    def train(self) -> None:
        """Update actor and critic once with the rollout."""
        self.policy.set_training_mode(True)
        self._prepare_update()
        rollout = self._rollout()
        self._update_actor(rollout.observations, rollout.actions, rollout.advantages)
        self._update_critic(rollout.observations, rollout.returns)
        self._n_updates += 1
        self._record_policy()

    def policy_loss(self, log_prob: th.Tensor, advantages: th.Tensor) -> th.Tensor:
        """
        The loss whose gradient is the negative policy gradient: ``-mean(log pi(a|s) * A)``.

        :param log_prob: Log-probabilities of the actions taken, (n_samples,)
        :param advantages: Constants, (n_samples,)
        :return: Scalar
        """
        return -(log_prob * advantages.detach()).mean()

    def entropy_loss(self, distribution: Distribution, log_prob: th.Tensor) -> th.Tensor:
        """
        :param distribution: The policy's, for all samples
        :param log_prob: Log-probabilities of the actions taken, (n_samples,)
        :return: Negative mean entropy in nats, estimated from the actions where it has no closed form; scalar
        """
        entropy = distribution.entropy()
        return log_prob.mean() if entropy is None else -entropy.mean()

    def _update_actor(self, observations: PyTorchObs, actions: th.Tensor, advantages: th.Tensor) -> None:
        distribution = action_distribution(self.policy, observations)
        log_prob = distribution.log_prob(actions)
        policy_loss = self.policy_loss(log_prob, self._normalized(advantages))
        entropy_loss = self.entropy_loss(distribution, log_prob)
        loss = policy_loss + self.ent_coef * entropy_loss
        self.actor_parameters.minimize(loss, self.actor_optimizer, self.max_grad_norm)

        with th.no_grad():
            kl = kl_divergence(distribution, self.policy.get_distribution(observations)).mean().item()
        if not kl < float("inf"):
            raise ValueError(
                f"Training diverged: the policy moved by a KL divergence of {kl} in one update, after {self.num_timesteps} "
                "steps. Try a smaller learning rate."
            )
        self.logger.record("train/policy_loss", policy_loss.item())
        self.logger.record("train/entropy_loss", entropy_loss.item())
        self.logger.record("train/kl_divergence_loss", kl)

    def _optimizer_names(self) -> list[str]:
        return ["actor_optimizer", *super()._optimizer_names()]
