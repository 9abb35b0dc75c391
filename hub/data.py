"""Statistics of data sets, for the cards of offline agents and of the data sets themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from minari import MinariDataset

from sb3_ext.offline.catalog import find_folder


@dataclass(frozen=True)
class DatasetStatistics:
    """
    :param name: Of the data set
    :param returns: Of its episodes, undiscounted
    :param lengths: Of its episodes, in steps
    """

    name: str
    returns: np.ndarray
    lengths: np.ndarray

    @property
    def n_episodes(self) -> int:
        return len(self.returns)

    @property
    def n_transitions(self) -> int:
        return int(self.lengths.sum())

    @property
    def mean(self) -> float:
        """Mean return of an episode."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the returns."""
        return float(self.returns.std())

    @property
    def min(self) -> float:
        """Smallest return."""
        return float(self.returns.min())

    @property
    def max(self) -> float:
        """Largest return."""
        return float(self.returns.max())


def statistics_of(source: str | Path) -> DatasetStatistics:
    """
    :param source: Id or folder of a Minari data set
    :return: Its statistics
    :raises DatasetNotFoundError: if there is none
    """
    dataset = MinariDataset(find_folder(source, None))
    rewards = [episode.rewards for episode in dataset.iterate_episodes()]
    name = Path(source).name if Path(source).is_absolute() else str(source)
    return DatasetStatistics(name, np.array([each.sum() for each in rewards]), np.array([len(each) for each in rewards]))
