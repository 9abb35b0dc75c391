"""Updates of SAC-AE on a GPU at the paper's settings, launched one kernel after the other and as a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from benchmarks import cases, results
from benchmarks.results import Row
from benchmarks.workers import spaces_env
from sb3_ext import SACAE

CASE = cases.by_name("sac-ae-b128")


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
    eager_model, eager_batch = make_model("cuda")
    graph_model, graph_batch = make_model("cuda")
    ways = {"eager": lambda: two_updates(eager_model, eager_batch), "graph": capture(graph_model, graph_batch)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        rate(way, 10)
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(rate(way, n))
    return {
        "kind": "gpu",
        "case": CASE.name,
        "gpu": th.cuda.get_device_name(),
        "updates_per_s": {name: results.rounded(of_way) for name, of_way in rates.items()},
        "peak_bytes": th.cuda.max_memory_allocated(),
        "command": results.own_command(),
        **results.stamp(),
    }


def summary(row: Row) -> str:
    """:return: one line about a row of ``measure``"""
    eager, graph = (statistics.median(row["updates_per_s"][name]) for name in ("eager", "graph"))
    return f"{row['gpu']}: {eager:.0f} updates/s, {graph:.0f} as a CUDA graph ({graph / eager:.2f} x)"
