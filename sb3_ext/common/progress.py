"""The progress that schedules are functions of."""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm


class ProgressMixin(BaseAlgorithm):
    """
    SB3's last rollout may go past the end of the training, and the progress remaining below 0, where a learning rate that
    falls to zero turns negative, so that the last updates climb. Here it ends at 0.
    """

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
