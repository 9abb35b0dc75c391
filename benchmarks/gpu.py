"""Updates of SAC-AE on a GPU at the paper's settings, launched one kernel after the other and as a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from benchmarks import cases, results
from benchmarks.results import Row
from benchmarks.workers import spaces_env
from sb3_ext import SACAE

CASE = cases.by_name("sac-ae-b128")


@dataclass(frozen=True)
class Way:
    """
    How updates are launched, and what PyTorch may do for speed.

    :param graph: As one CUDA graph of two updates
    :param searches: cuDNN takes the fastest convolutions that it finds. With a seed SB3 forbids that, since some of them add
        in an order that differs from run to run.
    :param tf32: Products of matrices are in TF32, as those of convolutions are by default
    """

    graph: bool = True
    searches: bool = False
    tf32: bool = False

    def choose(self) -> None:
        """Set PyTorch's switches, which hold for all that is launched or captured after it."""
        th.backends.cudnn.benchmark = self.searches
        th.backends.cudnn.deterministic = not self.searches
        th.backends.cuda.matmul.allow_tf32 = self.tf32


# The first two as SB3 leaves the switches
WAYS = {"eager": Way(graph=False), "graph": Way(), "searched": Way(searches=True), "tf32": Way(searches=True, tf32=True)}


def make_model(device: str, **policy_kwargs: Any) -> tuple[SACAE, Any]:
    """
    :param device: Where the model lives
    :param policy_kwargs: Of the policy
    :return: The model, and a batch on its device
    """
    # Adam's count of steps has to live on the device, too, for a graph to replay it
    optimizer_kwargs = {"capturable": True} if device != "cpu" else {}
    model = SACAE(
        "CnnPolicy",
        spaces_env(CASE.spec()),
        buffer_size=CASE.batch_size,
        seed=0,
        device=device,
        policy_kwargs={"optimizer_kwargs": optimizer_kwargs, **policy_kwargs},
    )
    rng, shape = np.random.default_rng(0), model.observation_space.shape
    obs = rng.integers(0, 256, (CASE.batch_size + 1, 1, *shape), np.uint8)
    for index in range(CASE.batch_size):
        action, reward = rng.uniform(-1, 1, (1, CASE.n_actions)), rng.standard_normal(1)
        model.replay_buffer.add(obs[index], obs[index + 1], action, reward, np.zeros(1), [{}])
    return model, model.replay_buffer.sample(CASE.batch_size)


def two_updates(model: SACAE, batch: Any) -> None:
    """The shortest sequence that repeats itself: actor and targets have every other turn."""
    model._update(batch)
    model._update(batch)


def capture(model: SACAE, batch: Any) -> Callable[[], None]:
    """
    :param model: On a GPU
    :param batch: On a GPU; the graph reads what lies there when it is replayed
    :return: Does two updates by replaying a graph
    """
    stream = th.cuda.Stream()
    stream.wait_stream(th.cuda.current_stream())
    with th.cuda.stream(stream):
        for _ in range(3):
            two_updates(model, batch)
    th.cuda.current_stream().wait_stream(stream)
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        two_updates(model, batch)
    return graph.replay


def launcher(way: Way, model: SACAE, batch: Any) -> Callable[[], None]:
    """
    :param way: Of launching the updates
    :param model: On a GPU
    :param batch: On a GPU
    :return: Does two updates. A graph does not keep alive what it works on.
    """
    way.choose()
    return capture(model, batch) if way.graph else lambda: two_updates(model, batch)


def rate(double_update: Callable[[], None], n: int) -> float:
    """
    :param double_update: Does two updates
    :param n: Number of updates
    :return: Updates per second
    """
    th.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(n // 2):
        double_update()
    th.cuda.synchronize()
    return n // 2 * 2 / (time.perf_counter() - begin)


def measure(n: int, rounds: int) -> Row | None:
    """
    :param n: Updates in one measurement
    :param rounds: Number of measurements of each way
    :return: The row of results, or None without a GPU
    """
    if not th.cuda.is_available():
        return None
    models: dict[str, tuple[SACAE, Any]] = {}
    doubles: dict[str, Callable[[], None]] = {}
    peak = 0
    for name, way in WAYS.items():
        models[name] = make_model("cuda")
        doubles[name] = launcher(way, *models[name])
        rate(doubles[name], 10)
        if name == "graph":
            peak = th.cuda.max_memory_allocated()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            way.choose()
            rates[name].append(rate(doubles[name], n))
    return {
        "kind": "gpu",
        "case": CASE.name,
        "gpu": th.cuda.get_device_name(),
        "updates_per_s": {name: results.rounded(of_way) for name, of_way in rates.items()},
        # Of the first two
        "peak_bytes": peak,
        "command": results.own_command(),
        **results.stamp(),
    }


def summary(row: Row) -> str:
    """:return: one line about a row of ``measure``"""
    medians = {name: statistics.median(rates) for name, rates in row["updates_per_s"].items()}
    return f"{row['gpu']}, updates/s: " + ", ".join(f"{name} {median:.0f}" for name, median in medians.items())
