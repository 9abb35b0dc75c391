"""Small data sets for the tests of offline data, and the transitions that they must give."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from gymnasium import spaces
from minari.serialization import serialize_space


class Transition(NamedTuple):
    observation: Any
    action: Any
    next_observation: Any
    reward: float
    terminated: bool


class RecordedEpisode(NamedTuple):
    """``observations`` is one array, or a dict of them, with one entry more than steps."""

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool = True

    def transitions(self) -> list[Transition]:
        """The definition, step by step."""

        def at(t: int) -> Any:
            if isinstance(self.observations, dict):
                return {key: array[t] for key, array in self.observations.items()}
            return self.observations[t]

        n = len(self.rewards)
        return [
            Transition(at(t), self.actions[t], at(t + 1), self.rewards[t], self.terminated and t == n - 1) for t in range(n)
        ]


def write_dataset(
    folder: Path,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    episodes: list[RecordedEpisode],
    **metadata: Any,
) -> Path:
    """Write a Minari data set, without compression so that single bytes of it can be found and damaged."""
    data = folder / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i, episode in enumerate(episodes):
            group = file.create_group(f"episode_{i}")
            last = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
            group["actions"], group["rewards"] = episode.actions, episode.rewards
            group["terminations"], group["truncations"] = last & episode.terminated, last & (not episode.terminated)
            if isinstance(episode.observations, dict):
                for key, array in episode.observations.items():
                    group[f"observations/{key}"] = array
            else:
                group["observations"] = episode.observations
    content = {
        "dataset_id": "test/data-v0",
        "minari_version": "0.5.4",
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode.rewards) for episode in episodes),
        "observation_space": serialize_space(observation_space),
        "action_space": serialize_space(action_space),
        **metadata,
    }
    (data / "metadata.json").write_text(json.dumps(content))
    return folder


PENDULUM_SPACES = (
    spaces.Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32)),
    spaces.Box(-2, 2, (1,), np.float32),
)


def pendulum_episodes() -> list[RecordedEpisode]:
    """Two episodes for ``PENDULUM_SPACES``; every value is different."""
    values = np.arange(40, dtype=np.float32) / 50
    return [
        RecordedEpisode(values[:12].reshape(4, 3), np.array([[-2], [0.5], [2]], np.float32), np.array([1.0, 2.0, 3.0])),
        RecordedEpisode(
            values[12:21].reshape(3, 3), np.array([[1], [-1]], np.float32), np.array([4.0, 5.0]), terminated=False
        ),
    ]
