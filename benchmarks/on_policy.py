"""Contenders of on-policy learning, see :mod:`benchmarks.workers`; what ``update`` does depends on ``measured`` in the spec.

- ``collect``: at least n steps in the environments without learning; it returns how many
- ``learn``: at least n steps of learning, end to end; it returns how many
- ``train``: n updates on one rollout, each from the same parameters, so that each is the same work
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.workers import load, spaces_env


class Snapshot:
    """
    Parameters as they are now.

    :param parameters: Tensors, or the objects of torch that hold them
    """

    def __init__(self, parameters: Iterable[Any]) -> None:
        self.saved = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def restore(self) -> None:
        """Write the values back, in place, because optimizers and algorithms hold on to the tensors."""
        for parameter, value in self.saved:
            parameter.data.copy_(value)


class StableBaselines:
    """An algorithm of the zoo: ours, SB3's or sb3-contrib's, driven by ``learn``, as by every user, or by ``train``."""

    packages = ("sb3-ext", "stable-baselines3", "sb3-contrib", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th

        from sb3_ext.zoo import register

        register()
        from rl_zoo3.utils import ALGOS
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

        th.set_num_threads(spec["threads"])
        settings = dict(spec["settings"])
        if isinstance(settings.get("learning_rate"), str):
            # "lin_0.005" in a yml. Its first value: the measurement has no end that a schedule could lead to.
            settings["learning_rate"] = float(settings["learning_rate"].removeprefix("lin_"))
        if isinstance(settings.get("policy_kwargs"), str):
            # Python in a yml, as in the zoo
            settings["policy_kwargs"] = eval(settings["policy_kwargs"])
        if spec["measured"] == "train":
            env, settings["n_steps"] = spaces_env(spec), spec["n_transitions"]
        else:
            env = make_vec_env(spec["env"], spec["n_envs"], spec["seed"])
        algorithm: Any = ALGOS[spec["algo"]]
        self.model = algorithm(env=env, seed=spec["seed"], device="cpu", **settings)
        if spec["sb3_collector"]:
            self.model.collect_rollouts = functools.partial(OnPolicyAlgorithm.collect_rollouts, self.model)
        if spec["measured"] == "collect":
            self.model.train = lambda: None
        if spec["measured"] == "train":
            self._fill_rollout(load(spec))
            self.start = Snapshot(self.model.policy.parameters())
        self.update: Callable[[int], int] = self._train if spec["measured"] == "train" else self._learn

    def _learn(self, n: int) -> int:
        before = self.model.num_timesteps
        self.model.learn(n, reset_num_timesteps=False)
        return self.model.num_timesteps - before

    def _train(self, n: int) -> int:
        for _ in range(n):
            self.start.restore()
            self.model.train()
        return n

    def _fill_rollout(self, data: dict[str, np.ndarray]) -> None:
        """Take the actions of the untrained policy, and leave the buffer as the collectors do."""
        import torch as th
        from stable_baselines3.common.logger import configure

        buffer, ends = self.model.rollout_buffer, data["terminals"] | data["timeouts"]
        with th.no_grad():
            actions, values, log_probs = self.model.policy(th.as_tensor(data["observations"]))
        buffer.observations[:, 0], buffer.actions[:, 0] = data["observations"], actions
        buffer.values[:, 0], buffer.log_probs[:, 0] = values.flatten(), log_probs
        buffer.rewards[:, 0], buffer.episode_starts[:, 0] = data["rewards"], np.roll(ends, 1)
        buffer.pos, buffer.full = buffer.buffer_size, True
        buffer.compute_returns_and_advantage(last_values=values[-1:], dones=ends[-1:])
        self.model.set_logger(configure(None, []))


class Tianshou:
    """
    https://github.com/thu-ml/tianshou, driven by its collector and ``update`` without its trainer's logs and tests.

    Networks as SB3's: layers of 64 with tanh, and a standard deviation that does not depend on the state.
    """

    packages = ("tianshou", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        np.random.seed(spec["seed"])
        self.settings = dict(spec["settings"])
        self.update: Callable[[int], int]
        if spec["measured"] == "train":
            self._prepare_training(spec)
            self.update = self._train
        else:
            self._prepare_learning(spec)
            self.update = self._learn

    def _prepare_learning(self, spec: dict[str, Any]) -> None:
        import gymnasium as gym
        from tianshou.algorithm import Reinforce
        from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
        from tianshou.data import Collector, VectorReplayBuffer
        from tianshou.env import DummyVectorEnv

        envs = DummyVectorEnv([functools.partial(gym.make, spec["env"]) for _ in range(spec["n_envs"])])
        envs.seed(spec["seed"])
        action_space = envs.action_space[0]
        self.n_episodes = self.settings.pop("n_episodes")
        policy = DiscreteActorPolicy(
            actor=_net(envs.observation_space[0].shape, int(action_space.n)), action_space=action_space
        )
        self.algorithm = Reinforce(policy=policy, optim=self._optimizer(), **self.settings)
        self.collector = Collector(self.algorithm, envs, VectorReplayBuffer(20_000, spec["n_envs"]))
        self.collector.reset()

    def _learn(self, n: int) -> int:
        from tianshou.utils.torch_utils import policy_within_training_step

        n_steps = 0
        with policy_within_training_step(self.algorithm.policy):
            while n_steps < n:
                n_steps += self.collector.collect(n_episode=self.n_episodes).n_collected_steps
                self.algorithm.update(buffer=self.collector.buffer, batch_size=None, repeat=1)
                self.collector.reset_buffer(keep_statistics=True)
        return int(n_steps)

    def _prepare_training(self, spec: dict[str, Any]) -> None:
        import gymnasium as gym
        import tianshou.algorithm
        import torch as th
        from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
        from tianshou.data import Batch, ReplayBuffer
        from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic

        shape, n_actions, data = spec["observation_shape"], spec["n_actions"], load(spec)
        policy = ProbabilisticActorPolicy(
            actor=ContinuousActorProbabilistic(preprocess_net=_net(shape), action_shape=n_actions, unbounded=True),
            dist_fn=lambda mean_and_std: th.distributions.Independent(th.distributions.Normal(*mean_and_std), 1),
            action_space=gym.spaces.Box(-1.0, 1.0, (n_actions,)),
        )
        make = getattr(tianshou.algorithm, spec["algo"])
        critic = ContinuousCritic(preprocess_net=_net(shape))
        self.algorithm = make(policy=policy, critic=critic, optim=self._optimizer(), **self.settings)
        with th.no_grad():
            actions = policy(Batch(obs=data["observations"], info=None)).act.numpy()
        buffer = ReplayBuffer.from_data(
            obs=data["observations"],
            act=actions,
            rew=data["rewards"],
            terminated=data["terminals"],
            truncated=data["timeouts"],
            done=data["terminals"] | data["timeouts"],
            obs_next=data["next_observations"],
        )
        # Values, advantages and log-probabilities, which SB3 computes while it collects
        batch, indices = buffer.sample(0)
        self.batch = self.algorithm._preprocess_batch(batch, buffer, indices)
        self.start = Snapshot(self.algorithm.parameters())

    def _train(self, n: int) -> int:
        from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode

        with policy_within_training_step(self.algorithm.policy), torch_train_mode(self.algorithm):
            for _ in range(n):
                self.start.restore()
                self.algorithm._update_with_batch(self.batch, batch_size=None, repeat=1)
        return n

    def _optimizer(self) -> Any:
        from tianshou.algorithm.optim import AdamOptimizerFactory

        return AdamOptimizerFactory(lr=self.settings.pop("learning_rate"))


def _net(observation_shape: Any, n_actions: int = 0) -> Any:
    import torch as th
    from tianshou.utils.net.common import Net

    return Net(state_shape=observation_shape, action_shape=n_actions, hidden_sizes=[64, 64], activation=th.nn.Tanh)
