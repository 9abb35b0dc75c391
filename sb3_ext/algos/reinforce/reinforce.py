from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ext.algos.vpg import VPG
from sb3_ext.common.denormals import without_denormals
from sb3_ext.common.observations import map_observations

# Part of the running baseline that a rollout leaves as it was
BASELINE_DECAY = 0.9


def returns_to_go(
    rewards: np.ndarray, episode_starts: np.ndarray, last_dones: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    Discounted sums of the rewards from each step to the end of its episode. A time limit ends an episode as a terminal
    state does: nothing is added for what would have come.

    :param rewards: (n_steps, n_envs)
    :param episode_starts: Whether a step is the first of an episode, (n_steps, n_envs)
    :param last_dones: Whether the last step ended an episode, (n_envs,)
    :param gamma: Discount factor
    :return: The returns, and whether the step's episode ends within the rollout; both (n_steps, n_envs). Where it does not,
        the return is that of the steps that are there.
    """
    ends = np.concatenate([episode_starts[1:], last_dones[None]]).astype(bool)
    returns = np.zeros_like(rewards)
    is_complete = np.logical_or.accumulate(ends[::-1])[::-1].copy()
    following = np.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        following = rewards[step] + gamma * np.where(ends[step], 0.0, following)
        returns[step] = following
    return returns, is_complete


class REINFORCE(VPG):
    """
    REINFORCE: the policy gradient with Monte Carlo returns, without a critic.

    Paper: Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning"
    (https://doi.org/10.1007/BF00992696).
    An action is weighted by the discounted return-to-go of its own episode. Steps whose episode the rollout's end cuts have
    no such return; they are left out of the update, and the episode's remaining steps count in the next one. ``n_steps``
    should therefore be a few times the length of an episode.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``;
        its value network is not used
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: Learning rate, > 0; it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: Steps in each environment per update, >= 1: an update has at most ``n_steps * n_envs`` samples
    :param gamma: Discount factor, in [0, 1]
    :param running_baseline: Whether to subtract a running mean of the returns of earlier rollouts. Needs
        ``normalize_advantage=False``, which would take it out again.
    :param ent_coef: Weight of the entropy in the loss, >= 0
    :param max_grad_norm: Largest norm of the gradient (None: no limit)
    :param normalize_advantage: Whether to standardize the returns of each rollout
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

    #: There are no values that could stand for the rewards after a time limit
    bootstrap_truncated: ClassVar[bool] = False

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        gamma: float = 0.99,
        running_baseline: bool = False,
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
        if running_baseline and normalize_advantage:
            raise ValueError("running_baseline=True has no effect with normalize_advantage=True: set one of them to False.")
        self.running_baseline = running_baseline
        #: Running mean of the returns-to-go, if ``running_baseline``
        self.baseline = 0.0
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=1.0,
            n_critic_updates=0,
            critic_learning_rate=None,
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

    @without_denormals
    def train(self) -> None:
        """Update the policy once with the episodes that ended in the rollout."""
        self.policy.set_training_mode(True)
        self._prepare_update()
        buffer = self.rollout_buffer
        assert isinstance(self._last_episode_starts, np.ndarray)
        returns, is_complete = returns_to_go(buffer.rewards, buffer.episode_starts, self._last_episode_starts, self.gamma)
        self.logger.record("train/complete_fraction", float(is_complete.mean()))
        # A single return cannot be standardized
        if is_complete.sum() > int(self.normalize_advantage):
            self._update_with(returns, is_complete)
        else:
            warnings.warn(
                f"No update: no episode ended within n_steps={self.n_steps}, and REINFORCE needs the returns of whole ones. "
                "Use larger n_steps.",
                stacklevel=2,
            )
        self._record_policy()

    def _update_with(self, returns: np.ndarray, is_complete: np.ndarray) -> None:
        rows = th.as_tensor(is_complete.reshape(-1), device=self.device)
        rollout = self._rollout()
        observations = map_observations(lambda tensor: tensor[rows], rollout.observations)
        complete_returns = th.as_tensor(returns.reshape(-1), device=self.device)[rows]
        self._update_actor(observations, rollout.actions[rows], complete_returns - self.baseline)
        if self.running_baseline:
            mean_return = complete_returns.mean().item()
            is_first = self._n_updates == 0
            self.baseline = mean_return if is_first else self.baseline + (1 - BASELINE_DECAY) * (mean_return - self.baseline)
        self._n_updates += 1
