"""
Contenders that learn online and act in environments of their own, see :mod:`benchmarks.workers`: ``update(n)`` goes on until
n more steps have been taken. In the spec, ``settings`` are the zoo's hyperparameters, ``defaults`` what its algorithm has
where they say nothing, and ``n_timesteps`` is the length of the training.
"""

import functools
from typing import Any

import numpy as np

from benchmarks import off_policy

# All that can be handed on to its DiscreteSAC; the policy is one of layers of 256
_TIANSHOU_SETTINGS = {
    *("batch_size", "buffer_size", "gamma", "gradient_steps", "learning_rate", "learning_starts", "n_steps", "n_timesteps"),
    *("policy", "target_entropy_ratio", "tau", "train_freq"),
}


def learning_rate(setting: float | str) -> tuple[float, bool]:
    """
    :param setting: As in the zoo's hyperparameters, a number or ``lin_0.001``
    :return: The first learning rate, and whether it falls to zero over the training
    """
    text = str(setting)
    return float(text.removeprefix("lin_")), text.startswith("lin_")


class SBX:
    """https://github.com/araffin/sbx: DQN in JAX, driven by the loop of SB3's ``learn``."""

    packages = ("sbx-rl", "jax", "stable-baselines3", "gymnasium")

    def __init__(self, spec: dict[str, Any]) -> None:
        import gymnasium as gym
        import sbx
        from stable_baselines3.common.env_util import make_vec_env

        # With the id in its place, the environments would be made to render
        env = make_vec_env(functools.partial(gym.make, spec["env"], **spec["env_kwargs"]), seed=spec["seed"])
        self.model: Any = getattr(sbx, spec["algo"].upper())(env=env, seed=spec["seed"], **spec["settings"])
        _, self.callback = self.model._setup_learn(spec["n_timesteps"], None)
        self.n_timesteps = 0

    def update(self, n: int) -> None:
        model = self.model
        self.n_timesteps += n
        while model.num_timesteps < self.n_timesteps:
            rollout = model.collect_rollouts(
                model.env, self.callback, model.train_freq, model.replay_buffer, learning_starts=model.learning_starts
            )
            if model.num_timesteps > model.learning_starts:
                n_updates = model.gradient_steps if model.gradient_steps >= 0 else rollout.episode_timesteps
                model.train(batch_size=model.batch_size, gradient_steps=n_updates)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return self.model.predict(observations, deterministic=True)[0]


class Tianshou(off_policy.Tianshou):
    """https://github.com/thu-ml/tianshou: DiscreteSAC with one environment, its collector and ``update`` in turns."""

    packages = ("tianshou", "torch", "gymnasium")

    def __init__(self, spec: dict[str, Any]) -> None:
        import gymnasium as gym
        import torch as th
        from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
        from tianshou.data import Collector, ReplayBuffer
        from tianshou.env import DummyVectorEnv

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        np.random.seed(spec["seed"])
        unknown = spec["settings"].keys() - _TIANSHOU_SETTINGS
        if unknown:
            raise ValueError(f"Tianshou's DiscreteSAC cannot be given {sorted(unknown)}.")
        settings = {**spec["defaults"], **spec["settings"]}
        self.batch_size, self.learning_starts = settings["batch_size"], settings["learning_starts"]
        self.train_freq = settings["train_freq"]
        self.n_updates = settings["gradient_steps"] if settings["gradient_steps"] >= 0 else self.train_freq
        envs = DummyVectorEnv([functools.partial(gym.make, spec["env"], **spec["env_kwargs"])])
        envs.seed(spec["seed"])
        self.buffer = ReplayBuffer(settings["buffer_size"])
        rate, falls = learning_rate(settings["learning_rate"])
        optim = AdamOptimizerFactory(lr=rate)
        if falls:
            optim.with_lr_scheduler_factory(LRSchedulerFactoryLinear(1, spec["n_timesteps"] * self.n_updates, self.train_freq))
        self.algorithm = self._discrete_sac(
            envs.observation_space[0].shape,
            int(envs.action_space[0].n),
            optim,
            entropy_ratio=settings["target_entropy_ratio"],
            tau=settings["tau"],
            gamma=settings["gamma"],
            n_step_return_horizon=settings["n_steps"],
        )
        self.collector = Collector(self.algorithm, envs, self.buffer)
        self.collector.reset()
        self.n_timesteps = self.n_collected = 0

    def update(self, n: int) -> None:
        self.n_timesteps += n
        while self.n_collected < self.n_timesteps:
            random = self.n_collected < self.learning_starts
            self.n_collected += self.collector.collect(n_step=self.train_freq, random=random).n_collected_steps
            if self.n_collected > self.learning_starts:
                super().update(self.n_updates)
