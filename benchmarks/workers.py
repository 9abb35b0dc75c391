"""One implementation of an algorithm in a process of its own, which obeys JSON lines on its standard input.

``python -m benchmarks.workers NAME``, with a name from ``CONTENDERS``, runs in the virtual environment of that
implementation, so this file needs no more than numpy and what the contender imports in its constructor. A contender has

- ``__init__(spec)``, with the keys of ``spec`` as :func:`benchmarks.cases.Case.spec` gives them and ``data``, an npz file,
- ``update(n)``: n gradient updates, each on a fresh batch,
- ``predict(observations)``: actions, one for each observation, Box actions in [-1, 1].

The contenders of on-policy learning are in :mod:`benchmarks.on_policy`, those of off-policy learning in
:mod:`benchmarks.off_policy` and, where they act themselves, in :mod:`benchmarks.online`.
"""

import functools
import importlib.metadata
import json
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Candidate actions of continuous BCQ, in the target and when acting; d3rlpy has one number for both
TARGET_CANDIDATES, ACTING_CANDIDATES = 10, 100


def load(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """
    :param spec: Its ``data`` is an npz file
    :return: ``observations``, ``actions``, ``rewards``, ``next_observations``, ``terminals``, ``timeouts``: one row per
        transition, episode after episode
    """
    with np.load(spec["data"]) as file:
        return dict(file)


class Ours:
    """An offline algorithm of this package, driven by ``learn``, as by every user."""

    packages = ("sb3-ext", "stable-baselines3", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th

        from sb3_ext.zoo.registry import ALGORITHMS

        class_path = next(algorithm.class_path for algorithm in ALGORITHMS if algorithm.key == spec["algo"])
        th.set_num_threads(spec["threads"])
        env = spaces_env(spec)
        self.model = pkgutil.resolve_name(class_path)(
            "CnnPolicy" if spec["image"] else "MlpPolicy",
            env,
            dataset=spec.get("dataset") or replay_buffer(load(spec), env.observation_space, env.action_space),
            learning_rate=spec["learning_rate"],
            batch_size=spec["batch_size"],
            seed=spec["seed"],
            device="cpu",
            **spec["ours"],
        )

    def update(self, n: int) -> None:
        self.model.learn(n, reset_num_timesteps=False)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        return self.model.predict(observations, deterministic=True)[0]


def spaces_env(spec: dict[str, Any]) -> Any:
    """:return: an environment that has the spaces of a spec and in which nobody acts"""
    import gymnasium as gym

    low, high, dtype = (0, 255, np.uint8) if spec["image"] else (-np.inf, np.inf, np.float32)
    n_actions = spec["n_actions"]

    class Spaces(gym.Env):
        observation_space: Any = gym.spaces.Box(low, high, spec["observation_shape"], dtype)
        action_space: Any = gym.spaces.Discrete(n_actions) if spec["discrete"] else gym.spaces.Box(-1.0, 1.0, (n_actions,))

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    return Spaces()


def replay_buffer(
    data: dict[str, np.ndarray], observation_space: Any, action_space: Any, buffer_class: type | None = None, **kwargs: Any
) -> Any:
    """
    :param data: See :func:`load`, with Box actions in [-1, 1], as SB3's buffers keep them
    :param observation_space: Of the buffer
    :param action_space: Of the buffer
    :param buffer_class: SB3's ReplayBuffer, if not given, or a subclass
    :param kwargs: Of the buffer
    :return: A full buffer
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    n = len(data["rewards"])
    buffer: Any = (buffer_class or ReplayBuffer)(n, observation_space, action_space, device="cpu", **kwargs)
    dones, timeouts = data["terminals"] | data["timeouts"], data["timeouts"].tolist()
    for row in range(n):
        one = slice(row, row + 1)
        infos = [{"TimeLimit.truncated": timeouts[row]}]
        transition = data["observations"][one], data["next_observations"][one], data["actions"][one].reshape(1, -1)
        buffer.add(*transition, data["rewards"][one], dones[one], infos)
    return buffer


class D3rlpy:
    """https://github.com/takuseno/d3rlpy, driven by ``update(sample_transition_batch())``: without the logs of ``fit``."""

    packages = ("d3rlpy", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import d3rlpy
        import torch as th

        th.set_num_threads(spec["threads"])
        d3rlpy.seed(spec["seed"])
        data, common = load(spec), {"batch_size": spec["batch_size"]}
        space = d3rlpy.constants.ActionSpace.DISCRETE if spec["discrete"] else d3rlpy.constants.ActionSpace.CONTINUOUS
        self.batch_size, self.continuous = spec["batch_size"], not spec["discrete"]
        self.buffer = d3rlpy.dataset.MDPDataset(
            data["observations"],
            data["actions"].reshape(len(data["rewards"]), -1),
            data["rewards"],
            data["terminals"].astype(np.float32),
            data["timeouts"].astype(np.float32),
            action_space=space,
            action_size=spec["n_actions"],
        )
        encoder = d3rlpy.models.VectorEncoderFactory
        rate = spec["learning_rate"]
        if self.continuous:
            config = d3rlpy.algos.BCQConfig(
                **common,
                actor_learning_rate=rate,
                critic_learning_rate=rate,
                imitator_learning_rate=rate,
                actor_encoder_factory=encoder([400, 300]),
                critic_encoder_factory=encoder([400, 300]),
                imitator_encoder_factory=encoder([750, 750]),
                n_action_samples=TARGET_CANDIDATES,
            )
        elif spec["image"]:
            # The heads share convolutions and hidden layer; ours, as the paper's, share the convolutions only
            scaler = d3rlpy.preprocessing.PixelObservationScaler()
            config = d3rlpy.algos.DiscreteBCQConfig(**common, learning_rate=rate, observation_scaler=scaler)
        else:
            config = d3rlpy.algos.DiscreteBCQConfig(
                **common, learning_rate=rate, encoder_factory=encoder([256, 256]), share_encoder=False
            )
        self.algo = config.create(device="cpu:0")
        self.algo.create_impl(tuple(spec["observation_shape"]), spec["n_actions"])

    def update(self, n: int) -> None:
        for _ in range(n):
            self.algo.update(self.buffer.sample_transition_batch(self.batch_size))

    def predict(self, observations: np.ndarray) -> np.ndarray:
        if self.continuous:
            self.algo.impl._n_action_samples = ACTING_CANDIDATES
        actions = self.algo.predict(observations)
        if self.continuous:
            self.algo.impl._n_action_samples = TARGET_CANDIDATES
        return actions


class Tianshou:
    """https://github.com/thu-ml/tianshou, networks as in its examples/offline, driven by ``algorithm.update``."""

    packages = ("tianshou", "torch")

    def __init__(self, spec: dict[str, Any]) -> None:
        import gymnasium as gym
        import torch as th
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import ReplayBuffer

        th.set_num_threads(spec["threads"])
        th.manual_seed(spec["seed"])
        np.random.seed(spec["seed"])
        self.batch_size, self.discrete = spec["batch_size"], spec["discrete"]
        n_actions, optim = spec["n_actions"], AdamOptimizerFactory(lr=spec["learning_rate"])
        data = load(spec)
        # BCQ takes `done` for terminal: with the time limits in it, it would learn that episodes are short
        self.buffer = ReplayBuffer.from_data(
            obs=data["observations"],
            act=data["actions"],
            rew=data["rewards"],
            terminated=data["terminals"],
            truncated=data["timeouts"],
            done=data["terminals"],
            obs_next=data["next_observations"],
        )
        action_space = gym.spaces.Discrete(n_actions) if self.discrete else gym.spaces.Box(-1.0, 1.0, (n_actions,))
        build = self._discrete if self.discrete else self._continuous
        self.algorithm = build(spec["observation_shape"], n_actions, action_space, optim)

    def _continuous(self, shape: list[int], n_actions: int, action_space: Any, optim: Any) -> Any:
        from tianshou.algorithm.imitation.bcq import BCQ, BCQPolicy
        from tianshou.utils.net.common import MLP, Net
        from tianshou.utils.net.continuous import VAE, ContinuousCritic, Perturbation

        n_inputs, latent_dim = shape[0] + n_actions, 2 * n_actions
        # Perturbation takes the first of what its network returns: of an MLP, as in the example, only the batch's first row
        residual = Net(state_shape=n_inputs, action_shape=n_actions, hidden_sizes=[400, 300])
        critics = [
            ContinuousCritic(
                preprocess_net=Net(state_shape=shape, action_shape=n_actions, hidden_sizes=[400, 300], concat=True)
            )
            for _ in range(2)
        ]
        vae = VAE(
            encoder=MLP(input_dim=n_inputs, hidden_sizes=[750, 750]),
            decoder=MLP(input_dim=shape[0] + latent_dim, output_dim=n_actions, hidden_sizes=[750, 750]),
            hidden_dim=750,
            latent_dim=latent_dim,
            max_action=1.0,
        )
        policy = BCQPolicy(
            actor_perturbation=Perturbation(preprocess_net=residual, max_action=1.0, phi=0.05),
            critic=critics[0],
            vae=vae,
            action_space=action_space,
            forward_sampled_times=ACTING_CANDIDATES,
        )
        return BCQ(
            policy=policy,
            actor_perturbation_optim=optim,
            critic_optim=optim,
            vae_optim=optim,
            critic2=critics[1],
            num_sampled_action=TARGET_CANDIDATES,
        )

    def _discrete(self, shape: list[int], n_actions: int, action_space: Any, optim: Any) -> Any:
        from tianshou.algorithm.imitation.discrete_bcq import DiscreteBCQ, DiscreteBCQPolicy
        from tianshou.env.atari.atari_network import DQNet
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.discrete import DiscreteActor

        if len(shape) == 3:
            features = DQNet(*shape, action_shape=n_actions, features_only=True)
            model, imitator = (
                DiscreteActor(preprocess_net=features, action_shape=n_actions, hidden_sizes=[512], softmax_output=False)
                for _ in range(2)
            )
        else:
            model, imitator = (Net(state_shape=shape, action_shape=n_actions, hidden_sizes=[256, 256]) for _ in range(2))
        policy = DiscreteBCQPolicy(model=model, imitator=imitator, action_space=action_space)
        return DiscreteBCQ(policy=policy, optim=optim)

    def update(self, n: int) -> None:
        from tianshou.algorithm.algorithm_base import policy_within_training_step

        with policy_within_training_step(self.algorithm.policy):
            for _ in range(n):
                self.algorithm.update(buffer=self.buffer, sample_size=self.batch_size)

    def predict(self, observations: np.ndarray) -> np.ndarray:
        import torch as th
        from tianshou.data import Batch

        with th.no_grad():
            actions = self.algorithm.policy(Batch(obs=observations, info=None)).act
        return np.asarray(actions)


class Arithmetic:
    """The matrix products and convolutions of one update of a case, and nothing else: what the machine allows."""

    packages = ("torch",)

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch as th

        th.set_num_threads(spec["threads"])
        self.products: list[Callable[[], Any]] = []
        for product in spec["products"]:
            if len(product) == 3:
                m, k, n = product
                left, right, out = th.randn(m, k), th.randn(k, n), th.empty(m, n)
                self.products.append(functools.partial(th.mm, left, right, out=out))
            else:
                n, n_inputs, size, n_outputs, kernel, stride = product
                images = th.randn(n, n_inputs, size, size).to(memory_format=th.channels_last)
                weights = th.randn(n_outputs, n_inputs, kernel, kernel).to(memory_format=th.channels_last)
                self.products.append(functools.partial(th.nn.functional.conv2d, images, weights, stride=stride))

    def update(self, n: int) -> None:
        for _ in range(n):
            for product in self.products:
                product()

    def predict(self, observations: np.ndarray) -> np.ndarray:
        raise NotImplementedError


CONTENDERS = {
    "ours": "benchmarks.workers.Ours",
    "d3rlpy": "benchmarks.workers.D3rlpy",
    "tianshou": "benchmarks.workers.Tianshou",
    "arithmetic": "benchmarks.workers.Arithmetic",
    "behaviour-cloning": "benchmarks.controls.BehaviourCloning",
    "offline-dqn": "benchmarks.controls.OfflineDQN",
    "offline-ddpg": "benchmarks.controls.OfflineDDPG",
}
# Those of a case of off-policy learning
OFF_POLICY_CONTENDERS = {
    "ours": "benchmarks.off_policy.StableBaselines",
    "sb3": "benchmarks.off_policy.DQN",
    "d3rlpy": "benchmarks.off_policy.D3rlpy",
    "tianshou": "benchmarks.off_policy.Tianshou",
    "torchrl": "benchmarks.off_policy.TorchRL",
    "arithmetic": "benchmarks.workers.Arithmetic",
}
# Those of a spec that has environments to learn in
ONLINE_CONTENDERS = {"sbx": "benchmarks.online.SBX", "tianshou": "benchmarks.online.Tianshou"}
# Those of a spec that says what is measured, see benchmarks.cases.OnPolicyCase
ON_POLICY_CONTENDERS = {
    "ours": "benchmarks.on_policy.StableBaselines",
    "sb3": "benchmarks.on_policy.StableBaselines",
    "sb3-contrib": "benchmarks.on_policy.StableBaselines",
    "tianshou": "benchmarks.on_policy.Tianshou",
}


def contenders_for(spec: dict[str, Any]) -> dict[str, str]:
    """
    :param spec: What a worker is built from
    :return: The classes that can be, by name
    """
    if "measured" in spec:
        return ON_POLICY_CONTENDERS
    if "n_timesteps" in spec:
        return ONLINE_CONTENDERS
    return OFF_POLICY_CONTENDERS if spec.get("off_policy") else CONTENDERS


def peak_memory() -> int:
    """:return: Largest resident size of this process so far (VmHWM) in bytes"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def serve(name: str) -> None:
    """
    Answer each line of standard input by one line: ``build`` (with ``spec``), ``update`` and ``act`` (with ``n``; the
    seconds, and the amount of work done), ``predict`` (with ``observations``), ``peak`` (bytes).

    :param name: A key of ``contenders_for`` the spec
    """
    # Libraries print; what they print must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Any = None
    observations = np.zeros(0)
    for line in sys.stdin:
        request = json.loads(line)
        verb = request["verb"]
        answer: dict[str, Any] = {}
        if verb == "build":
            contender = pkgutil.resolve_name(contenders_for(request["spec"])[name])(request["spec"])
            versions = {package: importlib.metadata.version(package) for package in contender.packages}
            answer["versions"] = {"python": platform.python_version(), **versions}
            if "act_batch" in request["spec"]:
                observations = load(request["spec"])["observations"][: request["spec"]["act_batch"]]
        elif verb == "predict":
            dtype = np.uint8 if request.get("image") else np.float32
            answer["actions"] = contender.predict(np.array(request["observations"], dtype=dtype)).tolist()
        elif verb == "peak":
            answer["bytes"] = peak_memory()
        else:
            answer["done"] = request["n"]
            begin = time.perf_counter()
            if verb == "update":
                # Whole rollouts can be more than was asked for
                answer["done"] = contender.update(request["n"]) or request["n"]
            else:
                for _ in range(request["n"]):
                    contender.predict(observations)
            answer["seconds"] = time.perf_counter() - begin
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
