"""Records the episodes that are played in vectorised environments."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_ext.offline.errors import AgentError
from sb3_ext.offline.layout import Observations


@dataclass(frozen=True)
class Episode:
    """
    ``observations`` has one entry more than the other arrays: what was observed after the last step. Float64 is kept as
    float32, as it is read again.
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass
class _Steps:
    """One environment's episode while it is being played."""

    observations: list[Any]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def finish(self, terminated: bool) -> Episode:
        keys = self.observations[0].keys() if isinstance(self.observations[0], dict) else [""]
        observations = {key: _stack([obs[key] if key else obs for obs in self.observations]) for key in keys}
        n_steps = len(self.rewards)
        last = np.arange(n_steps) == n_steps - 1
        return Episode(
            observations, _stack(self.actions), np.array(self.rewards, np.float32), last & terminated, last & (not terminated)
        )


def _stack(values: list[Any]) -> np.ndarray:
    array = np.stack(values)
    return array.astype(np.float32) if array.dtype == np.float64 else array


class EpisodeRecorder(VecEnvWrapper):
    """
    Passes everything through and hands over each episode when it is finished.

    :param venv: environments whose observations and actions are recorded as they are, and rewards as they are before
        ``VecNormalize``
    :param on_episode: called with the number of the environment and its episode
    """

    def __init__(self, venv: VecEnv, on_episode: Callable[[int, Episode], None]) -> None:
        super().__init__(venv)
        self.on_episode = on_episode
        self._normalize = unwrap_vec_normalize(venv)
        self._steps: list[_Steps] = []
        self._actions: np.ndarray

    def reset(self) -> VecEnvObs:
        observations = self.venv.reset()
        self._steps = [_Steps([_pick(observations, i)]) for i in range(self.num_envs)]
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.array(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, dones, infos = self.venv.step_wait()
        raw_rewards = rewards if self._normalize is None else self._normalize.get_original_reward()
        for i, steps in enumerate(self._steps):
            steps.actions.append(self._actions[i])
            steps.rewards.append(float(raw_rewards[i]))
            if dones[i]:
                # The environment has been reset already
                steps.observations.append(infos[i]["terminal_observation"])
                self.on_episode(i, steps.finish(terminated=not infos[i].get("TimeLimit.truncated", False)))
                self._steps[i] = _Steps([])
            self._steps[i].observations.append(_pick(observations, i))
        return observations, rewards, dones, infos

    def finish(self) -> None:
        """Hand over what has been played of unfinished episodes, as truncated ones."""
        for i, steps in enumerate(self._steps):
            if steps.rewards:
                self.on_episode(i, steps.finish(terminated=False))
                self._steps[i] = _Steps(steps.observations[-1:])


def _pick(observations: VecEnvObs, index: int) -> Any:
    """:return: a copy of one environment's observation"""
    if isinstance(observations, dict):
        return {key: np.array(array[index]) for key, array in observations.items()}
    return np.array(observations[index])


def insert_recorder(env: VecEnv, on_episode: Callable[[int, Episode], None]) -> tuple[VecEnv, EpisodeRecorder]:
    """
    Record what an agent that learns from the data will see: after all wrappers, but before observations are normalised and
    images are transposed.

    :param env: environments, as the behaviour agent sees them
    :param on_episode: see ``EpisodeRecorder``
    :return: the environments, with the recorder in them; the recorder
    :raises AgentError: when frames are stacked after they were normalised, so that no raw stack exists
    """
    wrappers: list[VecEnvWrapper] = []
    inner = env
    while isinstance(inner, VecEnvWrapper):
        wrappers.append(inner)
        inner = inner.venv
    below = [i for i, wrapper in enumerate(wrappers) if isinstance(wrapper, VecNormalize) and wrapper.norm_obs]
    if below and any(isinstance(wrapper, VecFrameStack) for wrapper in wrappers[: below[0]]):
        raise AgentError("Agents with both normalised observations and frame_stack cannot record raw observations.")
    below += [i for i, wrapper in enumerate(wrappers) if isinstance(wrapper, VecTransposeImage)]
    if not below:
        recorder = EpisodeRecorder(env, on_episode)
        return recorder, recorder
    outer = wrappers[max(below)]
    outer.venv = recorder = EpisodeRecorder(outer.venv, on_episode)
    return env, recorder
