"""
Contenders of online off-policy learning, see :mod:`benchmarks.workers`: updates on batches that each samples
from a buffer of its own, which holds the same transitions. Nobody acts.
"""

from typing import Any

import numpy as np

from benchmarks.workers import load, replay_buffer, spaces_env


class StableBaselines:
    """An algorithm of the zoo, ours or SB3's, driven by ``train``."""

    packages = ("sb3-ext", "stable-baselines3", "torch")

    def __init__(self, spec: dict[str, Any], algo: str | None = None) -> None:
        import torch as th

        from sb3_ext.zoo import register

        register()
        from rl_zoo3.utils import ALGOS
        from stable_baselines3.common.logger import configure

        th.set_num_threads(spec["threads"])
        env, algo = spaces_env(spec), algo or spec["algo"]
        settings = {"policy_kwargs": {} if spec["image"] else {"net_arch": [256, 256]}}
        # The buffer is replaced by a full one
        self.model: Any = ALGOS[algo](
            policy="CnnPolicy" if spec["image"] else "MlpPolicy",
            env=env,
            learning_rate=spec["learning_rate"],
            buffer_size=1,
            seed=spec["seed"],
            device="cpu",
            **{**settings, **(spec["ours"] if algo == spec["algo"] else {})},
        )
        self.model.set_logger(configure(None, []))
        buffer_class, space = type(self.model.replay_buffer), self.model.observation_space
        how = self.model.replay_buffer_kwargs
        self.model.replay_buffer = replay_buffer(load(spec), space, env.action_space, buffer_class, **how)
        self.batch_size = spec["batch_size"]

    def update(self, n: int) -> None:
        self.model.train(gradient_steps=n, batch_size=self.batch_size)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return self.model.predict(observations, deterministic=True)[0]


class DQN(StableBaselines):
    """SB3's DQN, neither double nor dueling."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec, "dqn")


class D3rlpy:
    """https://github.com/takuseno/d3rlpy: DiscreteSAC, driven by ``update(sample_transition_batch())``."""

    packages = ("d3rlpy", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import d3rlpy
        import torch as th

        th.set_num_threads(spec["threads"])
        d3rlpy.seed(spec["seed"])
        data = load(spec)
        self.batch_size = spec["batch_size"]
        self.buffer = d3rlpy.dataset.MDPDataset(
            data["observations"],
            data["actions"].reshape(-1, 1),
            data["rewards"],
            data["terminals"].astype(np.float32),
            data["timeouts"].astype(np.float32),
            action_space=d3rlpy.constants.ActionSpace.DISCRETE,
            action_size=spec["n_actions"],
        )
        rates = {f"{part}_learning_rate": spec["learning_rate"] for part in ("actor", "critic", "temp")}
        if spec["image"]:
            networks: dict[str, Any] = {"observation_scaler": d3rlpy.preprocessing.PixelObservationScaler()}
        else:
            encoder = d3rlpy.models.VectorEncoderFactory([256, 256])
            networks = {"actor_encoder_factory": encoder, "critic_encoder_factory": encoder}
        config = d3rlpy.algos.DiscreteSACConfig(batch_size=self.batch_size, **rates, **networks)
        self.algo = config.create(device="cpu:0")
        self.algo.create_impl(tuple(spec["observation_shape"]), spec["n_actions"])

    def update(self, n: int) -> None:
        for _ in range(n):
            self.algo.update(self.buffer.sample_transition_batch(self.batch_size))

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return self.algo.predict(observations)


class Tianshou:
    """https://github.com/thu-ml/tianshou: DQN, which is double, with dueling streams, or DiscreteSAC."""

    packages = ("tianshou", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import ReplayBuffer

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        np.random.seed(spec["seed"])
        data = load(spec)
        self.batch_size = spec["batch_size"]
        self.buffer = ReplayBuffer.from_data(
            obs=data["observations"],
            act=data["actions"],
            rew=data["rewards"],
            terminated=data["terminals"],
            truncated=data["timeouts"],
            done=data["terminals"] | data["timeouts"],
            obs_next=data["next_observations"],
        )
        optim = AdamOptimizerFactory(lr=spec["learning_rate"])
        build = self._discrete_sac if spec["algo"] == "sac_discrete" else self._dueling_dqn
        self.algorithm = build(spec["observation_shape"], spec["n_actions"], optim)

    def _dueling_dqn(self, shape: list[int], n_actions: int, optim: Any) -> Any:
        import gymnasium as gym
        from tianshou.algorithm.modelfree.dqn import DQN, DiscreteQLearningPolicy
        from tianshou.utils.net.common import Net

        stream = {"hidden_sizes": [128]}
        model = Net(state_shape=shape, action_shape=n_actions, hidden_sizes=[256], dueling_param=(stream, stream))
        policy = DiscreteQLearningPolicy(model=model, action_space=gym.spaces.Discrete(n_actions))
        return DQN(policy=policy, optim=optim, target_update_freq=1000, huber_loss_delta=1.0)

    def _discrete_sac(self, shape: list[int], n_actions: int, optim: Any, entropy_ratio: float = 0.5, **settings: Any) -> Any:
        import gymnasium as gym
        from tianshou.algorithm.modelfree.discrete_sac import DiscreteSAC, DiscreteSACPolicy
        from tianshou.algorithm.modelfree.sac import AutoAlpha
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.env.atari.atari_network import DQNet
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

        def features() -> Any:
            if len(shape) == 3:
                return DQNet(*shape, action_shape=n_actions, features_only=True, output_dim_added_layer=512)
            return Net(state_shape=shape, hidden_sizes=[256, 256])

        actor = DiscreteActor(preprocess_net=features(), action_shape=n_actions, softmax_output=False)
        critics = [DiscreteCritic(preprocess_net=features(), last_size=n_actions) for _ in range(2)]
        return DiscreteSAC(
            policy=DiscreteSACPolicy(actor=actor, action_space=gym.spaces.Discrete(n_actions)),
            policy_optim=optim,
            critic=critics[0],
            critic_optim=optim,
            critic2=critics[1],
            # Its rate stays, AutoAlpha takes no schedule
            alpha=AutoAlpha(entropy_ratio * np.log(n_actions), 0.0, AdamOptimizerFactory(lr=optim.lr)),
            **settings,
        )

    def update(self, n: int) -> None:
        from tianshou.algorithm.algorithm_base import policy_within_training_step

        with policy_within_training_step(self.algorithm.policy):
            for _ in range(n):
                self.algorithm.update(buffer=self.buffer, sample_size=self.batch_size)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        import torch as th
        from tianshou.data import Batch

        with th.no_grad():
            return np.asarray(self.algorithm.policy(Batch(obs=observations, info=None)).act)


class TorchRL:
    """https://github.com/pytorch/rl: DiscreteSACLoss on vectors, one backward pass for all losses, as in its own script."""

    packages = ("torchrl", "tensordict", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th
        from tensordict import TensorDict
        from tensordict.nn import TensorDictModule
        from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer
        from torchrl.modules import MLP, ProbabilisticActor
        from torchrl.modules.distributions import OneHotCategorical
        from torchrl.objectives import DiscreteSACLoss, SoftUpdate

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        data, n_actions, n_inputs = load(spec), spec["n_actions"], spec["observation_shape"][0]
        n = len(data["rewards"])

        def column(name: str) -> Any:
            return th.as_tensor(data[name]).reshape(n, -1)

        rows = TensorDict(
            {
                "observation": column("observations"),
                "action": th.nn.functional.one_hot(th.as_tensor(data["actions"]), n_actions),
                ("next", "observation"): column("next_observations"),
                ("next", "reward"): column("rewards"),
                ("next", "terminated"): column("terminals"),
                ("next", "done"): column("terminals"),
            },
            batch_size=[n],
        )
        self.buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n), batch_size=spec["batch_size"])
        self.buffer.extend(rows)

        def perceptron() -> Any:
            return MLP(in_features=n_inputs, out_features=n_actions, num_cells=[256, 256], activation_class=th.nn.ReLU)

        self.actor = ProbabilisticActor(
            module=TensorDictModule(perceptron(), in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits"],
            spec=OneHot(n_actions),
            distribution_class=OneHotCategorical,
            return_log_prob=False,
        )
        critic = TensorDictModule(perceptron(), in_keys=["observation"], out_keys=["action_value"])
        self.loss = DiscreteSACLoss(self.actor, critic, num_actions=n_actions, loss_function="l2", target_entropy_weight=0.5)
        self.loss.make_value_estimator(gamma=0.99)
        self.target = SoftUpdate(self.loss, eps=0.995)
        self.optimizer = th.optim.Adam(self.loss.parameters(), lr=spec["learning_rate"])

    def update(self, n: int) -> None:
        for _ in range(n):
            losses = self.loss(self.buffer.sample())
            sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.target.step()

    def predict(self, observations: np.ndarray) -> np.ndarray:
        import torch as th
        from tensordict import TensorDict

        with th.no_grad():
            rows = TensorDict({"observation": th.as_tensor(observations)}, batch_size=[len(observations)])
            return self.actor.module[0](rows)["logits"].argmax(1).numpy()
