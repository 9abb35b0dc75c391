"""
What one would try before BCQ, on the same data: behaviour cloning, and SB3's DQN and DDPG that never act.

All have the layers of BCQ's critics, its batches, learning rate, discount and target networks: the constraint is what differs.
"""

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from benchmarks.workers import load, replay_buffer, spaces_env


class BehaviourCloning:
    """Copies the data's actions (cross-entropy for Discrete, squared error for Box actions)."""

    packages = ("torch",)

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th
        from torch.nn import functional as F

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        self.discrete, self.batch_size = spec["discrete"], spec["batch_size"]
        widths = [int(np.prod(spec["observation_shape"])), *spec["net_arch"], spec["n_actions"]]
        layers: list[th.nn.Module] = []
        for n_inputs, n_outputs in pairwise(widths):
            layers += [th.nn.Linear(n_inputs, n_outputs), th.nn.ReLU()]
        layers[-1] = th.nn.Identity() if self.discrete else th.nn.Tanh()
        self.net = th.nn.Sequential(*layers)
        self.optimizer = th.optim.Adam(self.net.parameters(), lr=spec["learning_rate"], fused=True)
        self.loss = F.cross_entropy if self.discrete else F.mse_loss
        data = load(spec)
        self.observations = th.as_tensor(data["observations"], dtype=th.float32).flatten(1)
        self.actions = th.as_tensor(data["actions"])

    def update(self, n: int) -> None:
        import torch as th

        for _ in range(n):
            rows = th.randint(len(self.actions), (self.batch_size,))
            loss = self.loss(self.net(self.observations[rows]), self.actions[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def predict(self, observations: np.ndarray) -> np.ndarray:
        import torch as th

        with th.no_grad():
            outputs = self.net(th.as_tensor(observations, dtype=th.float32).flatten(1))
        return (outputs.argmax(dim=1) if self.discrete else outputs).numpy()


class OfflineSB3:
    """An off-policy algorithm of SB3 with the data set in its replay buffer, and no steps in the environment."""

    packages = ("stable-baselines3", "torch")
    name: ClassVar[str]

    def __init__(self, spec: dict[str, Any]) -> None:
        import stable_baselines3
        import torch as th
        from stable_baselines3.common.logger import configure

        th.set_num_threads(spec["threads"])
        self.batch_size = spec["batch_size"]
        env = spaces_env(spec)
        algorithm = getattr(stable_baselines3, self.name)
        self.model = algorithm(
            "MlpPolicy",
            env,
            learning_rate=spec["learning_rate"],
            batch_size=self.batch_size,
            tau=spec["tau"],
            gamma=spec["gamma"],
            policy_kwargs={"net_arch": spec["net_arch"]},
            buffer_size=1,
            seed=spec["seed"],
            device="cpu",
        )
        self.model.replay_buffer = replay_buffer(load(spec), env.observation_space, env.action_space)
        self.model.set_logger(configure(None, []))

    def update(self, n: int) -> None:
        self.model.train(gradient_steps=n, batch_size=self.batch_size)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return self.model.predict(observations, deterministic=True)[0]


class OfflineDQN(OfflineSB3):
    """Plain DQN."""

    name = "DQN"

    def update(self, n: int) -> None:
        from stable_baselines3.common.utils import polyak_update

        model = self.model
        for _ in range(n):
            super().update(1)
            # DQN does this while it acts
            polyak_update(model.q_net.parameters(), model.q_net_target.parameters(), model.tau)


class OfflineDDPG(OfflineSB3):
    """Plain DDPG."""

    name = "DDPG"
