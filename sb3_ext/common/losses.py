"""Parts of losses."""

from __future__ import annotations

import torch as th
from torch.nn import functional as F


def huber_loss(q_values: th.Tensor, actions: th.Tensor, target_q_values: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Huber loss of the values of the actions taken: quadratic up to an error of 1, linear beyond (Mnih et al. 2015, "Human-level
    control through deep reinforcement learning", where it is called clipping of the error).

    :param q_values: (batch, n_actions)
    :param actions: Counted from 0, (batch, 1)
    :param target_q_values: (batch, 1)
    :return: Mean over the batch, and its gradient with respect to ``q_values``
    """
    current_q_values = q_values.gather(1, actions)
    slopes = (current_q_values - target_q_values).clamp_(-1.0, 1.0).div_(len(actions))
    return F.smooth_l1_loss(current_q_values, target_q_values), th.zeros_like(q_values).scatter_(1, actions, slopes)


def standardized(advantages: th.Tensor) -> th.Tensor:
    """
    :param advantages: (n_samples,), of at least 2 samples
    :return: With mean 0 and standard deviation 1; 0 if all are equal
    """
    # The mean of equal numbers is not always that number
    differ = advantages.max() > advantages.min()
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8) * differ


def clipped_surrogate_loss(
    log_probs: th.Tensor, old_log_probs: th.Tensor, advantages: th.Tensor, clip_range: float
) -> th.Tensor:
    """
    Loss of PPO (Schulman et al. 2017: "Proximal Policy Optimization Algorithms", equation 7, arXiv:1707.06347).

    :param log_probs: Logarithms of the probabilities or densities of the actions, (n_samples,)
    :param old_log_probs: Those of the policy that drew the actions, (n_samples,)
    :param advantages: (n_samples,)
    :param clip_range: How far from 1 the ratio of both counts, >= 0
    :return: Negative mean of the clipped objective
    """
    ratio = (log_probs - old_log_probs).exp()
    return -th.min(ratio * advantages, ratio.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages).mean()
