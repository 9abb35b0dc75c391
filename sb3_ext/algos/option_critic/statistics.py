"""What the options do, and whether they still deserve the name."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

# Steps, and options that have ended, of the log
WINDOW = 2000

# Below this fraction of the largest entropy of usage, one option does (nearly) everything; below this duration, options are
# (nearly) actions
COLLAPSED_USAGE, COLLAPSED_DURATION = 0.1, 1.1


class OptionStatistics:
    """
    Statistics of the latest steps.

    :param n_options: Number of options
    :param n_envs: Number of environments
    :param n_episodes: Episodes over which switches are averaged
    :param window: Steps over which usage is counted, and options of which durations are
    """

    def __init__(self, n_options: int, n_envs: int, n_episodes: int, window: int = WINDOW) -> None:
        self.n_options = n_options
        self.window = window
        self._used: deque[int] = deque(maxlen=window)
        self._terminations: deque[float] = deque(maxlen=window)
        self._durations: deque[int] = deque(maxlen=window)
        self._switches: deque[int] = deque(maxlen=n_episodes)
        self._last = np.zeros(n_envs, np.int64)
        self._ages, self._n_switches = np.zeros(n_envs, np.int64), np.zeros(n_envs, np.int64)
        self._is_running = np.zeros(n_envs, bool)

    def add(self, options: np.ndarray, is_chosen: np.ndarray, terminations: np.ndarray, is_start: np.ndarray) -> None:
        """
        :param options: In force in each environment, (n_envs,)
        :param is_chosen: Whether they were chosen in this step, (n_envs,)
        :param terminations: Probability that the option before had to end in this step, (n_envs,)
        :param is_start: Whether an episode starts, (n_envs,)
        """
        self._durations.extend(self._ages[is_chosen & self._is_running].tolist())
        self._switches.extend(self._n_switches[is_start & self._is_running].tolist())
        self._n_switches += options != self._last
        self._n_switches[is_start] = 0
        self._ages = np.where(is_chosen, 1, self._ages + 1)
        self._last, self._is_running = options, np.ones_like(self._is_running)
        self._used.extend(options.tolist())
        self._terminations.extend(terminations[~is_start].tolist())

    def usage_entropy(self) -> float:
        """:return: entropy of how often each option was in force, as a fraction of its largest value; 0 for a single option"""
        counts = np.bincount(np.array(self._used, np.int64), minlength=self.n_options)
        shares = counts[counts > 0] / max(counts.sum(), 1)
        # Of a single one it is 0, not -0
        return abs(float((shares * np.log(shares)).sum())) / math.log(max(self.n_options, 2))

    def summary(self) -> dict[str, float]:
        """:return: what to log, without what nothing is known of yet"""
        means: dict[str, deque[Any]] = {
            "duration": self._durations,
            "termination_probability": self._terminations,
            "switches_per_episode": self._switches,
        }
        known = {name: sum(values) / len(values) for name, values in means.items() if values}
        return {**known, "usage_entropy": self.usage_entropy()} if self._used else known

    def collapse(self) -> str | None:
        """:return: how the options have collapsed, once there is a full window of steps, or None"""
        if self.n_options == 1 or len(self._used) < self.window:
            return None
        if self.usage_entropy() < COLLAPSED_USAGE:
            return "one option is in force nearly all the time: try a smaller termination_regularization or more exploration"
        if self._durations and sum(self._durations) / len(self._durations) < COLLAPSED_DURATION:
            return "options end after nearly every step: try a larger termination_regularization"
        return None
