"""
The list of test cases that every algorithm joins with one line; ``test_algos.py`` runs all of its tests on each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_ext import BCQ, DDQN, NPG, REINFORCE, SACAE, TRPO, VPG, DuelingDDQN, OptionCritic, SACDiscrete
from sb3_ext.common.offline_algorithm import OfflineAlgorithm

DEVICE = os.environ.get("SB3_EXT_TEST_DEVICE", "cpu")


class Normalized(FlattenExtractor):
    """With statistics of what it has seen, and a layer that nothing uses."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm, self.unused = nn.BatchNorm1d(self.features_dim), nn.Linear(4, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


@dataclass(frozen=True)
class AlgoCase:
    """
    What the shared tests need to know of an algorithm with a kind of action.

    :param algo: The algorithm
    :param actions: ``spaces.Box`` or ``spaces.Discrete``
    :param kwargs: Constructor arguments that make the algorithm small and quick
    :param log_keys: Keys that must be in the log
    :param observations: Kinds of observations it learns from, keys of ``OBSERVATIONS``
    """

    algo: type[BaseAlgorithm]
    actions: type[spaces.Space]
    kwargs: dict[str, Any] = field(default_factory=dict)
    log_keys: frozenset[str] = frozenset()
    observations: tuple[str, ...] = ("vector", "image", "dict")

    def __str__(self) -> str:
        return f"{self.algo.__name__}-{self.actions.__name__}"

    def make(self, env: gym.Env | VecEnv, policy: str | None = None, **kwargs: Any) -> Any:
        policy = policy or self.policy
        kwargs = {"seed": 0, "device": DEVICE, **self.kwargs, **kwargs}
        model_env = self.algo._wrap_env(env)
        seed_observations(model_env, kwargs["seed"])
        if self.is_offline:
            kwargs.setdefault("dataset", random_replay_buffer(model_env))
        return self.algo(policy, model_env, **kwargs)

    @property
    def policy(self) -> str:
        """For the simplest observations it learns from."""
        return OBSERVATIONS[self.observations[0]][0]

    def env(self) -> gym.Env:
        """The simplest observations it learns from, episodes of 5 steps."""
        return OBSERVATIONS[self.observations[0]][1](self)

    @property
    def is_discrete(self) -> bool:
        return self.actions is spaces.Discrete

    @property
    def is_offline(self) -> bool:
        return issubclass(self.algo, OfflineAlgorithm)

    @property
    def is_recurrent(self) -> bool:
        """Whether ``predict`` has a state."""
        return self.algo is OptionCritic

    @property
    def is_off_policy(self) -> bool:
        return issubclass(self.algo, OffPolicyAlgorithm)

    def vector_env(self) -> gym.Env:
        """Vector observations, episodes of 5 steps that end by termination."""
        return ActionReward(IdentityEnv(dim=3, ep_length=5) if self.is_discrete else IdentityEnvBox(ep_length=5))

    def image_env(self) -> gym.Env:
        """Images, episodes of 5 steps that end by truncation."""
        env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=self.is_discrete)
        return TimeLimit(ActionReward(env), 5)

    def dict_env(self) -> gym.Env:
        """Vectors and images, episodes of 5 steps that end by truncation."""
        return TimeLimit(ActionReward(SimpleMultiObsEnv(discrete_actions=self.is_discrete, random_start=False)), 5)


class ActionReward(gym.Wrapper):
    """The reward is the action, so that there is something to learn in any environment."""

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, float(np.sum(action)), terminated, truncated, info


class TupleActionEnv(gym.Env):
    """An action space that no algorithm supports."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2)))  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}


def seed_observations(env: VecEnv, seed: int) -> None:
    """SB3's environments of images draw them from their spaces, which no algorithm seeds."""
    for space in env.get_attr("observation_space"):
        space.seed(seed)


def random_replay_buffer(env: VecEnv, n_steps: int = 100, seed: int = 0) -> ReplayBuffer:
    """Experience of random actions, as an SB3 replay buffer."""
    buffer_class = DictReplayBuffer if isinstance(env.observation_space, spaces.Dict) else ReplayBuffer
    buffer = buffer_class(n_steps * env.num_envs, env.observation_space, env.action_space, "cpu", env.num_envs)
    rng = np.random.default_rng(seed)
    env.seed(seed)
    # SB3's test environments draw from their spaces
    env.action_space.seed(seed)
    env.observation_space.seed(seed)
    obs = env.reset()
    for _ in range(n_steps):
        actions, stored_actions = _random_actions(env, rng)
        new_obs, rewards, dones, infos = env.step(actions)
        next_obs = _with_terminal_observations(new_obs, dones, infos)
        buffer.add(obs, next_obs, stored_actions, rewards, dones, infos)
        obs = new_obs
    return buffer


def _random_actions(env: VecEnv, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Actions in the units of the environment, and as replay buffers hold them: scaled to [-1, 1]."""
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        actions = space.start + rng.integers(space.n, size=env.num_envs)
        return actions, actions.reshape(-1, 1)
    assert isinstance(space, spaces.Box)
    scaled = rng.uniform(-1, 1, (env.num_envs, *space.shape)).astype(np.float32)
    return space.low + 0.5 * (scaled + 1) * (space.high - space.low), scaled


def _with_terminal_observations(obs: Any, dones: np.ndarray, infos: list[dict[str, Any]]) -> Any:
    obs = {key: value.copy() for key, value in obs.items()} if isinstance(obs, dict) else obs.copy()
    for index in np.flatnonzero(dones):
        terminal = infos[index]["terminal_observation"]
        if isinstance(obs, dict):
            for key in obs:
                obs[key][index] = terminal[key]
        else:
            obs[index] = terminal
    return obs


SMALL_BCQ_BOX = {"batch_size": 8, "policy_kwargs": {"net_arch": [16], "vae_net_arch": [16]}}
SMALL_BCQ_DISCRETE = {"batch_size": 8, "policy_kwargs": {"net_arch": [16]}}
BCQ_BOX_KEYS = frozenset({"train/vae_loss", "train/critic_loss", "train/perturbation_loss"})
BCQ_DISCRETE_KEYS = frozenset({"train/q_loss", "train/imitation_loss"})

SMALL_ACTOR_CRITIC = {"n_steps": 6, "policy_kwargs": {"net_arch": [16]}}
SMALL_VPG = {**SMALL_ACTOR_CRITIC, "n_critic_updates": 2, "learning_rate": 1e-2}
SMALL_REINFORCE = {**SMALL_ACTOR_CRITIC, "learning_rate": 1e-2}
SMALL_TRPO = {**SMALL_ACTOR_CRITIC, "n_critic_updates": 2, "batch_size": 4}
VPG_KEYS = frozenset({"train/policy_loss", "train/entropy_loss", "train/kl_divergence_loss", "train/value_loss"})
REINFORCE_KEYS = VPG_KEYS - {"train/value_loss"} | {"train/complete_fraction"}
TRPO_KEYS = frozenset({"train/policy_objective", "train/kl_divergence_loss", "train/value_loss", "train/is_step_taken"})

SMALL_DDQN = {
    "buffer_size": 60,
    "learning_starts": 3,
    "batch_size": 8,
    "train_freq": 1,
    "target_update_interval": 4,
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [16, 8]},
}
DDQN_KEYS = frozenset({"train/loss", "rollout/exploration_rate"})

SMALL_SAC = {"buffer_size": 60, "learning_starts": 3, "batch_size": 8, "policy_kwargs": {"net_arch": [16]}}
SAC_KEYS = frozenset({f"train/{key}" for key in ("actor_loss", "critic_loss", "ent_coef_loss", "ent_coef", "entropy")})

SMALL_SAC_AE = {
    "buffer_size": 60,
    "learning_starts": 3,
    "batch_size": 8,
    "initial_gradient_steps": 2,
    "policy_kwargs": {
        "net_arch": [16],
        "features_extractor_kwargs": {"features_dim": 8, "n_layers": 2, "n_filters": 4},
    },
}
SAC_AE_KEYS = frozenset(
    f"train/{key}" for key in ("actor_loss", "critic_loss", "ent_coef", "reconstruction_loss", "latent_loss")
)

SMALL_OPTION_CRITIC = {
    "buffer_size": 60,
    "learning_starts": 3,
    "batch_size": 8,
    "train_freq": 2,
    "target_update_interval": 4,
    "policy_kwargs": {"net_arch": [16]},
}
OPTION_CRITIC_KEYS = frozenset({"train/actor_loss", "train/critic_loss", "train/termination_loss", "options/usage_entropy"})

CASES: list[AlgoCase] = [
    AlgoCase(BCQ, spaces.Box, SMALL_BCQ_BOX, BCQ_BOX_KEYS),
    AlgoCase(BCQ, spaces.Discrete, SMALL_BCQ_DISCRETE, BCQ_DISCRETE_KEYS),
    AlgoCase(VPG, spaces.Box, SMALL_VPG, VPG_KEYS),
    AlgoCase(VPG, spaces.Discrete, SMALL_VPG, VPG_KEYS),
    AlgoCase(REINFORCE, spaces.Box, SMALL_REINFORCE, REINFORCE_KEYS),
    AlgoCase(REINFORCE, spaces.Discrete, SMALL_REINFORCE, REINFORCE_KEYS),
    AlgoCase(NPG, spaces.Box, SMALL_TRPO, TRPO_KEYS),
    AlgoCase(NPG, spaces.Discrete, SMALL_TRPO, TRPO_KEYS),
    AlgoCase(TRPO, spaces.Box, SMALL_TRPO, TRPO_KEYS),
    AlgoCase(TRPO, spaces.Discrete, SMALL_TRPO, TRPO_KEYS),
    AlgoCase(DDQN, spaces.Discrete, SMALL_DDQN, DDQN_KEYS),
    AlgoCase(DuelingDDQN, spaces.Discrete, SMALL_DDQN, DDQN_KEYS),
    AlgoCase(OptionCritic, spaces.Box, SMALL_OPTION_CRITIC, OPTION_CRITIC_KEYS),
    AlgoCase(OptionCritic, spaces.Discrete, SMALL_OPTION_CRITIC, OPTION_CRITIC_KEYS),
    AlgoCase(SACDiscrete, spaces.Discrete, SMALL_SAC, SAC_KEYS),
    AlgoCase(SACAE, spaces.Box, SMALL_SAC_AE, SAC_AE_KEYS, ("image",)),
]

COMMON_LOG_KEYS = frozenset({"time/fps", "time/total_timesteps", "train/learning_rate", "train/n_updates"})

MakeEnv = Callable[[AlgoCase], gym.Env]
OBSERVATIONS: dict[str, tuple[str, MakeEnv]] = {
    "vector": ("MlpPolicy", AlgoCase.vector_env),
    "image": ("CnnPolicy", AlgoCase.image_env),
    "dict": ("MultiInputPolicy", AlgoCase.dict_env),
}
