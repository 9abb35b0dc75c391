"""What is timed: one row per case. A later algorithm adds its rows, and the function that lists its matrix products."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.workers import TARGET_CANDIDATES

#: (rows, inner, columns) of a matrix product, or (images, channels, size, output channels, kernel, stride) of a convolution
Product = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """
    One configuration in which an implementation is timed.

    :param name: In the results
    :param algo: Key in the zoo
    :param observation_shape: Images channel-first
    :param n_actions: Number of actions, or of action dimensions
    :param discrete: Whether actions are Discrete
    :param batch_size: Transitions in one update
    :param products: Gives the matrix products that one update cannot do without
    :param contenders: Keys of ``benchmarks.workers.CONTENDERS`` to compare with
    :param ours: Constructor arguments of our class
    :param n_transitions: Size of the buffer
    :param learning_rate: Of every optimizer
    :param off_policy: Whether the algorithm is an online one, whose buffer is filled for it
    """

    name: str
    algo: str
    observation_shape: tuple[int, ...]
    n_actions: int
    discrete: bool
    batch_size: int
    products: Callable[["Case"], list[Product]]
    contenders: tuple[str, ...] = ("d3rlpy", "tianshou")
    ours: dict[str, Any] = field(default_factory=dict)
    n_transitions: int = 20_000
    learning_rate: float = 1e-3
    off_policy: bool = False

    @property
    def image(self) -> bool:
        """Whether observations are images."""
        return len(self.observation_shape) == 3

    def spec(self, threads: int = 1, seed: int = 0, **more: Any) -> dict[str, Any]:
        """
        :param threads: Of torch
        :param seed: Of all generators
        :param more: Further keys
        :return: What a worker is built from, fit for JSON
        """
        keys = ("algo", "observation_shape", "n_actions", "discrete", "batch_size", "ours", "learning_rate", "image")
        spec = {**{key: getattr(self, key) for key in keys}, "threads": threads, "seed": seed, **more}
        return {**spec, "off_policy": True} if self.off_policy else spec


@dataclass(frozen=True)
class Contender:
    """
    One implementation in a case of on-policy learning.

    :param algo: Key in the zoo, or the name of Tianshou's class
    :param settings: Constructor arguments
    :param like_zoo: Whether the settings of the zoo for the environment hold wherever ``settings`` says nothing
    :param sb3_collector: Whether to collect with SB3's collector instead of the algorithm's own
    :param n_envs: Number of environments, if not that of the case
    """

    algo: str
    settings: dict[str, Any] = field(default_factory=dict)
    like_zoo: bool = False
    sb3_collector: bool = False
    n_envs: int | None = None


@dataclass(frozen=True)
class OnPolicyCase:
    """
    One configuration in which on-policy learning is timed, or any learning end to end (``learn``).

    :param name: In the results
    :param measured: ``collect``, ``learn`` or ``train``, see :mod:`benchmarks.on_policy`
    :param contenders: By key of ``benchmarks.workers.ON_POLICY_CONTENDERS``; ``ours`` is compared with the others
    :param env: Environment id, to collect and learn in
    :param n_envs: Number of environments
    :param n_transitions: Samples of the rollout to train on: episodes of random numbers
    :param observation_shape: Of the rollout to train on
    :param n_actions: Number of action dimensions of the rollout to train on
    """

    name: str
    measured: str
    contenders: dict[str, Contender]
    env: str = ""
    n_envs: int = 1
    n_transitions: int = 0
    # Those of HalfCheetah
    observation_shape: tuple[int, ...] = (17,)
    n_actions: int = 6
    discrete: bool = False
    image: bool = False

    @property
    def algo(self) -> str:
        """Ours, as a key in the zoo."""
        return self.contenders["ours"].algo

    def spec(self, name: str, threads: int = 1, seed: int = 0) -> dict[str, Any]:
        """
        :param name: Of a contender
        :param threads: Of torch
        :param seed: Of all generators
        :return: What its worker is built from, fit for JSON
        """
        contender = self.contenders[name]
        of_env, of_rollout = ("env", "n_envs"), ("n_transitions", "observation_shape", "n_actions", "discrete", "image")
        return {
            "measured": self.measured,
            **{key: getattr(self, key) for key in (of_rollout if self.measured == "train" else of_env)},
            **({} if contender.n_envs is None else {"n_envs": contender.n_envs}),
            "algo": contender.algo,
            "settings": self._settings(contender),
            "sb3_collector": contender.sb3_collector,
            "threads": threads,
            "seed": seed,
        }

    def _settings(self, contender: Contender) -> dict[str, Any]:
        if not contender.like_zoo:
            return contender.settings
        zoo = data.settings(contender.algo, self.env, [])
        if zoo.pop("n_envs", 1) != self.n_envs:
            raise ValueError(f"The zoo has another number of environments for {contender.algo} than {self.name}.")
        del zoo["n_timesteps"]
        return {**zoo, **contender.settings}


def gflop(products: list[Product]) -> float:
    """:return: 1e9 floating-point operations, two per multiplication"""
    total = 0.0
    for product in products:
        if len(product) == 6:
            n, n_inputs, size, n_outputs, kernel, stride = product
            product = (n * ((size - kernel) // stride + 1) ** 2, n_inputs * kernel**2, n_outputs)
        total += 2e-9 * float(np.prod(product))
    return total


def forward(rows: int, *widths: int) -> list[Product]:
    """
    :param rows: Batch size
    :param widths: Of the input and of each layer
    :return: Matrix products of applying a multilayer perceptron
    """
    return [(rows, k, n) for k, n in pairwise(widths)]


def backward(rows: int, *widths: int, weights: bool = True, inputs: bool = False) -> list[Product]:
    """
    :param rows: Batch size
    :param widths: Of the input and of each layer
    :param weights: With the gradient of the weights
    :param inputs: With the gradient of the input of the first layer
    :return: Matrix products of differentiating a multilayer perceptron
    """
    layers = list(pairwise(widths))
    products: list[Product] = [(k, rows, n) for k, n in layers] if weights else []
    return products + [(rows, n, k) for k, n in (layers if inputs else layers[1:])]


def bcq_continuous(case: Case) -> list[Product]:
    """Fujimoto et al. 2019, Algorithm 1, with its two critics."""
    n, obs, act = case.batch_size, case.observation_shape[0], case.n_actions
    many = n * TARGET_CANDIDATES
    encoder, decoder = (obs + act, 750, 750, 4 * act), (obs + 2 * act, 750, 750, act)
    perturbation, critic = (obs + act, 400, 300, act), (obs + act, 400, 300, 1)
    vae = forward(n, *encoder) + forward(n, *decoder) + backward(n, *encoder) + backward(n, *decoder, inputs=True)
    target = forward(many, *decoder) + forward(many, *perturbation) + 2 * forward(many, *critic)
    critics = 2 * (forward(n, *critic) + backward(n, *critic))
    actor = forward(n, *decoder) + forward(n, *perturbation) + forward(n, *critic)
    actor += backward(n, *critic, weights=False, inputs=True) + backward(n, *perturbation)
    return vae + target + critics + actor


def bcq_discrete(case: Case) -> list[Product]:
    """Fujimoto et al. 2019b, Algorithm 1: two heads, on shared convolutions for images; the target has no imitation head."""
    n, head = case.batch_size, _head(case)
    convolutions, gradients = _convolutions(case)
    online, target = convolutions + 2 * forward(n, *head), convolutions + forward(n, *head)
    return 2 * online + target + gradients + 2 * backward(n, *head, inputs=case.image)


def _head(case: Case) -> tuple[int, ...]:
    """:return: the widths of a network with one output for each action, behind the convolutions for images"""
    return (3136, 512, case.n_actions) if case.image else (case.observation_shape[0], 256, 256, case.n_actions)


def _convolutions(case: Case) -> tuple[list[Product], list[Product]]:
    """:return: those of the Nature CNN, and those of its gradient; none on vectors"""
    if not case.image:
        return [], []
    n, (channels, size, _) = case.batch_size, case.observation_shape
    forwards: list[Product] = [(n, channels, size, 32, 8, 4), (n, 32, 20, 64, 4, 2), (n, 64, 9, 64, 3, 1)]
    # Gradients of weights and, but for the first, of inputs: each as many operations as the convolution itself
    return forwards, forwards + forwards[1:]


def dueling_ddqn(case: Case) -> list[Product]:
    """Wang et al. 2016: the online network in both states, the target network in the next one; streams share a layer."""
    n, (*inner, n_actions) = case.batch_size, _head(case)
    convolutions, gradients = _convolutions(case)
    # By default, on images, each stream has the 512 units of the network without streams
    last = [2 * inner[-1]] if case.image else inner[-1:]
    (width,) = case.ours.get("policy_kwargs", {}).get("net_arch", last)
    trunk, streams = (*inner[:-1], width), [(width // 2, 1), (width // 2, n_actions)]
    network = convolutions + forward(n, *trunk) + [product for stream in streams for product in forward(n, *stream)]
    backwards = [product for stream in streams for product in backward(n, *stream, inputs=True)]
    return 3 * network + gradients + backward(n, *trunk, inputs=case.image) + backwards


def sac_discrete(case: Case) -> list[Product]:
    """
    Christodoulou 2019: the actor in both states, the target critics in the next one, the critics before and after their step.
    """
    n, head = case.batch_size, _head(case)
    convolutions, gradients = _convolutions(case)
    actor, critics = convolutions + forward(n, *head), convolutions + 2 * forward(n, *head)
    return 2 * actor + 3 * critics + 2 * gradients + 3 * backward(n, *head, inputs=case.image)


def sac_ae(case: Case) -> list[Product]:
    """
    Yarats et al. 2019: the actor's and the target's encoder in the next state, the critics' before and after their step, and
    the decoder. Every other update is the actor's turn, too, which counts as half a batch in each.
    """
    n, (channels, size, _), act = case.batch_size, case.observation_shape, case.n_actions
    sides = [(size - 3) // 2 + 1 - 2 * layer for layer in range(4)]
    convolutions: list[Product] = [(n, channels, size, 32, 3, 2), *((n, 32, side, 32, 3, 1) for side in sides[:-1])]
    # Gradients of weights and, but for the first, of inputs
    gradients = convolutions + convolutions[1:]
    projection, critic = (32 * sides[-1] ** 2, 50), (50 + act, 1024, 1024, 1)
    encoder = convolutions + forward(n, *projection)
    target = encoder + forward(n, 50, 1024, 1024, 2 * act) + encoder + 2 * forward(n, *critic)
    critics = encoder + 2 * (forward(n, *critic) + backward(n, *critic, inputs=True))
    critics += backward(n, *projection, inputs=True) + gradients
    # A transposed convolution takes as many operations as the convolution that it mirrors
    decoder = forward(n, *projection[::-1]) + backward(n, *projection[::-1], inputs=True) + 3 * convolutions
    policy = (*projection, 1024, 1024, 2 * act)
    actor = forward(n // 2, *policy) + forward(n // 2, *projection) + backward(n // 2, *policy)
    actor += 2 * (forward(n // 2, *critic) + backward(n // 2, *critic, weights=False, inputs=True))
    return target + critics + actor + encoder + decoder + backward(n, *projection, inputs=True) + gradients


# The paper's settings for Atari, as in hyperparams/bcq.yml
_ATARI = {"tau": 1.0, "target_update_interval": 8000}

_MIXED = {"policy_kwargs": {"features_extractor_kwargs": {"mixed_precision": True}}}

CASES = [
    Case("bcq-continuous-b100", "bcq", (17,), 6, False, 100, bcq_continuous),
    Case("bcq-continuous-b256", "bcq", (17,), 6, False, 256, bcq_continuous),
    Case("bcq-discrete-b32", "bcq", (4,), 2, True, 32, bcq_discrete),
    Case("bcq-discrete-b64", "bcq", (4,), 2, True, 64, bcq_discrete),
    Case(
        "bcq-pixels-b32", "bcq", (4, 84, 84), 6, True, 32, bcq_discrete,
        ours=_ATARI, n_transitions=2_000, learning_rate=6.25e-5,
    ),
    Case(
        "bcq-pixels-mixed-b32", "bcq", (4, 84, 84), 6, True, 32, bcq_discrete,
        ours={**_ATARI, **_MIXED}, n_transitions=2_000, learning_rate=6.25e-5,
    ),
    Case("dueling-ddqn-b64", "dueling_ddqn", (4,), 2, True, 64, dueling_ddqn, ("sb3", "tianshou"), off_policy=True),
    Case(
        "dueling-ddqn-pixels-b32", "dueling_ddqn", (4, 84, 84), 6, True, 32, dueling_ddqn, ("sb3",),
        n_transitions=2_000, learning_rate=1e-4, off_policy=True,
    ),
    Case(  # With the units of the network without streams
        "dueling-ddqn-pixels-512-b32", "dueling_ddqn", (4, 84, 84), 6, True, 32, dueling_ddqn, ("sb3",),
        ours={"policy_kwargs": {"net_arch": [512]}}, n_transitions=2_000, learning_rate=1e-4, off_policy=True,
    ),
    Case(
        "dueling-ddqn-pixels-mixed-b32", "dueling_ddqn", (4, 84, 84), 6, True, 32, dueling_ddqn, ("sb3",),
        ours=_MIXED, n_transitions=2_000, learning_rate=1e-4, off_policy=True,
    ),
    Case(
        "sac-discrete-b256", "sac_discrete", (8,), 4, True, 256, sac_discrete, ("tianshou", "d3rlpy", "torchrl"),
        learning_rate=3e-4, off_policy=True,
    ),
    Case(
        "sac-discrete-pixels-b64", "sac_discrete", (4, 84, 84), 6, True, 64, sac_discrete, ("tianshou", "d3rlpy"),
        n_transitions=2_000, learning_rate=3e-4, off_policy=True,
    ),
    Case(
        "sac-discrete-pixels-mixed-b64", "sac_discrete", (4, 84, 84), 6, True, 64, sac_discrete, ("tianshou", "d3rlpy"),
        ours=_MIXED, n_transitions=2_000, learning_rate=3e-4, off_policy=True,
    ),
    Case(
        "sac-ae-b128", "sac_ae", (9, 84, 84), 6, False, 128, sac_ae, (),
        ours={"initial_gradient_steps": 0}, n_transitions=1_000, off_policy=True,
    ),
]  # fmt: skip

_MLP = {"policy": "MlpPolicy"}
# What ours and sb3-contrib's have for defaults
_TRPO = {**_MLP, "n_steps": 2048, "batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 15}
_BOTH_TRPO = {"ours": Contender("trpo_fast", _TRPO), "sb3-contrib": Contender("trpo", _TRPO)}
# Tianshou's conjugate gradients take 10 steps, and its critic sees the whole rollout at once
_FULL = {**_MLP, "batch_size": None, "n_critic_updates": 10, "cg_max_steps": 10, "learning_rate": 1e-3}
_TIANSHOU_FULL = {"optim_critic_iters": 10, "learning_rate": 1e-3}
_REINFORCE = Contender("Reinforce", {"n_episodes": 8, "learning_rate": 5e-3})


def _collect(n_envs: int) -> OnPolicyCase:
    settings = {**_MLP, "n_steps": 2048 // n_envs}
    contenders = {"ours": Contender("vpg", settings), "sb3": Contender("vpg", settings, sb3_collector=True)}
    return OnPolicyCase(f"collect-cartpole-{n_envs}", "collect", contenders, "CartPole-v1", n_envs)


def _cartpole(name: str, ours: Contender) -> OnPolicyCase:
    contenders = {"ours": ours, "sb3": Contender("a2c", like_zoo=True), "tianshou": _REINFORCE}
    return OnPolicyCase(f"learn-cartpole-{name}", "learn", contenders, "CartPole-v1", 8)


def _option_critic(n_envs: int) -> OnPolicyCase:
    settings = {**_MLP, "n_options": 2, "batch_size": 32, "train_freq": 4 // min(n_envs, 4)}
    contenders = {"ours": Contender("option_critic", settings, n_envs=n_envs), "sb3": Contender("dqn", like_zoo=True)}
    return OnPolicyCase(f"learn-cartpole-option-critic-{n_envs}", "learn", contenders, "CartPole-v1")


def _cartpole_dqn(algo: str) -> OnPolicyCase:
    contenders = {"ours": Contender(algo, like_zoo=True), "sb3": Contender("dqn", like_zoo=True)}
    return OnPolicyCase(f"learn-cartpole-{algo.replace('_', '-')}", "learn", contenders, "CartPole-v1")


def _train(name: str, contenders: dict[str, Contender]) -> list[OnPolicyCase]:
    return [OnPolicyCase(f"train-{name}-{n}", "train", contenders, n_transitions=n) for n in (2_048, 25_000)]


ON_POLICY_CASES = [
    _collect(1),
    _collect(8),
    # 4000 samples in an update, as in Spinning Up, and as in hyperparams/vpg.yml
    _cartpole("vpg-4000", Contender("vpg", {"n_steps": 500}, like_zoo=True)),
    _cartpole("vpg", Contender("vpg", like_zoo=True)),
    _cartpole("npg", Contender("npg", like_zoo=True)),
    _cartpole_dqn("ddqn"),
    _cartpole_dqn("dueling_ddqn"),
    _option_critic(1),
    _option_critic(8),
    OnPolicyCase("learn-halfcheetah-trpo", "learn", _BOTH_TRPO, "HalfCheetah-v5"),
    *_train("trpo", _BOTH_TRPO),
    *_train("npg-full", {"ours": Contender("npg", _FULL), "tianshou": Contender("NPG", _TIANSHOU_FULL)}),
    *_train("trpo-full", {"ours": Contender("trpo_fast", _FULL), "tianshou": Contender("TRPO", _TIANSHOU_FULL)}),
]

ALL_CASES: list[Case | OnPolicyCase] = [*CASES, *ON_POLICY_CASES]


def synthetic(case: Case | OnPolicyCase, path: Path, n_transitions: int | None = None) -> None:
    """
    Write random transitions, in episodes of 200 steps of which every other one is cut off by a time limit.

    :param case: Gives the shapes
    :param path: npz file to write, see :func:`benchmarks.workers.load`
    :param n_transitions: Instead of the case's
    """
    n, length = n_transitions or case.n_transitions, 200
    rng = np.random.default_rng(0)
    if case.image:
        steps = rng.integers(0, 256, (n + 1, *case.observation_shape), np.uint8)
    else:
        steps = rng.standard_normal((n + 1, *case.observation_shape), np.float32)
    ends = np.arange(1, n + 1) % length == 0
    ends[-1] = True
    odd = np.arange(n) // length % 2 == 1
    actions = rng.integers(0, case.n_actions, n) if case.discrete else rng.uniform(-1, 1, (n, case.n_actions))
    np.savez(
        path,
        observations=steps[:-1],
        next_observations=steps[1:],
        actions=actions.astype(np.int64 if case.discrete else np.float32),
        rewards=rng.standard_normal(n, np.float32),
        terminals=ends & ~odd,
        timeouts=ends & odd,
    )


def by_name(name: str) -> Case | OnPolicyCase:
    """
    :param name: Of a case
    :return: The case
    :raises ValueError: if there is none, with the names that there are
    """
    for case in ALL_CASES:
        if case.name == name:
            return case
    raise ValueError(f"There is no case {name}, only {', '.join(case.name for case in ALL_CASES)}.")
