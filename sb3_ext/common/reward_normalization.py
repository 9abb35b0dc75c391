"""VecNormalize that normalizes rewards, around images."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm


class RewardNormalizationMixin(OffPolicyAlgorithm):
    """
    SB3 puts VecTransposeImage around VecNormalize, and stores what VecNormalize saw: images that are not transposed, which do
    not fit into the replay buffer. Where only rewards are normalized, the observations can be taken as they are.
    """

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        normalize = self._vec_normalize_env
        if normalize is not None and not normalize.norm_obs:
            reward, self._vec_normalize_env = normalize.get_original_reward(), None
        try:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        finally:
            self._vec_normalize_env = normalize
