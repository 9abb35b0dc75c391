"""What is timed: one row per case. A later algorithm adds its rows, and the function that lists its matrix products."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

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
        return {**{key: getattr(self, key) for key in keys}, "threads": threads, "seed": seed, **more}


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
    n = case.batch_size
    convolutions: list[Product] = []
    gradients: list[Product] = []
    head: tuple[int, ...] = (case.observation_shape[0], 256, 256, case.n_actions)
    if case.image:
        channels, size, _ = case.observation_shape
        convolutions = [(n, channels, size, 32, 8, 4), (n, 32, 20, 64, 4, 2), (n, 64, 9, 64, 3, 1)]
        # Gradients of weights and, but for the first, of inputs: each as many operations as the convolution itself
        gradients, head = convolutions + convolutions[1:], (3136, 512, case.n_actions)
    online, target = convolutions + 2 * forward(n, *head), convolutions + forward(n, *head)
    return 2 * online + target + gradients + 2 * backward(n, *head, inputs=case.image)


# The paper's settings for Atari, as in hyperparams/bcq.yml
_ATARI = {"tau": 1.0, "target_update_interval": 8000}

CASES = [
    Case("bcq-continuous-b100", "bcq", (17,), 6, False, 100, bcq_continuous),
    Case("bcq-continuous-b256", "bcq", (17,), 6, False, 256, bcq_continuous),
    Case("bcq-discrete-b32", "bcq", (4,), 2, True, 32, bcq_discrete),
    Case("bcq-discrete-b64", "bcq", (4,), 2, True, 64, bcq_discrete),
    Case(
        "bcq-pixels-b32", "bcq", (4, 84, 84), 6, True, 32, bcq_discrete,
        ours=_ATARI, n_transitions=2_000, learning_rate=6.25e-5,
    ),
]  # fmt: skip


def synthetic(case: Case, path: Path, n_transitions: int | None = None) -> None:
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


def by_name(name: str) -> Case:
    """
    :param name: Of a case
    :return: The case
    :raises ValueError: if there is none, with the names that there are
    """
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"There is no case {name}, only {', '.join(case.name for case in CASES)}.")
