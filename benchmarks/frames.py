"""The replay buffer that stores every frame once, against SB3's: memory, and the time to add and to sample."""

import statistics
import time
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from benchmarks import results
from benchmarks.results import Row
from benchmarks.speed import paired_ratio
from sb3_ext import FrameReplayBuffer

SPACE, ACTIONS = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)
EPISODE, BATCH = 500, 32


def resident_bytes() -> int:
    """:return: Resident size of this process (VmRSS)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def fill(buffers: list[Any], n: int) -> list[float]:
    """
    :param buffers: To which a stream of stacks of random frames is added, in episodes
    :param n: Number of transitions
    :return: For each of them, the seconds that this took
    """
    rng, seconds = np.random.default_rng(0), [0.0] * len(buffers)
    frames = rng.integers(0, 256, (64, 84, 84), np.uint8)
    for step in range(n):
        if step % EPISODE == 0:
            obs = np.zeros((1, *SPACE.shape), np.uint8)
            obs[0, -1] = frames[step % 64]
        next_obs = np.concatenate([obs[:, 1:], frames[None, None, (step * 7 + 1) % 64]], axis=1)
        done = np.array([step % EPISODE == EPISODE - 1])
        for index, buffer in enumerate(buffers):
            begin = time.perf_counter()
            buffer.add(obs, next_obs, np.array([[step % 6]]), np.array([0.0]), done, [{}])
            seconds[index] += time.perf_counter() - begin
        obs = next_obs
    return seconds


def sampling_rates(buffers: list[Any], rounds: int, seconds: float) -> list[list[float]]:
    """
    :param buffers: To sample from in turns
    :param rounds: Number of measurements of each
    :param seconds: Of one measurement
    :return: For each buffer, batches per second in each round
    """
    rates: list[list[float]] = [[] for _ in buffers]
    for _ in range(rounds):
        for buffer, of_buffer in zip(buffers, rates, strict=True):
            n, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                buffer.sample(BATCH)
                n += 1
            of_buffer.append(n / (time.perf_counter() - begin))
    return rates


def measure(n: int, n_sampling: int, rounds: int, seconds: float) -> Row:
    """
    :param n: Transitions whose memory is measured
    :param n_sampling: Transitions in the two buffers that are sampled from
    :param rounds: Number of measurements of each buffer
    :param seconds: Of one measurement
    :return: The row of results
    """
    make = {"ours": FrameReplayBuffer, "sb3": ReplayBuffer}
    pair = [make[name](n_sampling, SPACE, ACTIONS, "cpu") for name in make]
    adding = fill(pair, n_sampling)
    sampling = sampling_rates(pair, rounds, seconds)
    sb3_bytes = sum(array.nbytes for array in vars(pair[1]).values() if isinstance(array, np.ndarray)) / n_sampling
    del pair
    before = resident_bytes()
    buffer = FrameReplayBuffer(n, SPACE, ACTIONS, "cpu")
    fill([buffer], n)
    return {
        "kind": "frames",
        "transitions": n,
        "resident_bytes": resident_bytes() - before,
        "array_bytes": buffer.nbytes,
        "array_bytes_of_a_million": FrameReplayBuffer(1_000_000, SPACE, ACTIONS, "cpu").nbytes,
        "sb3_bytes_of_a_million": round(1_000_000 * sb3_bytes),
        "sampled_from": n_sampling,
        "batches_per_s": {name: results.rounded(rates) for name, rates in zip(make, sampling, strict=True)},
        "adds_per_s": {name: round(n_sampling / spent, 1) for name, spent in zip(make, adding, strict=True)},
        "command": results.own_command(),
        **results.stamp(),
    }


def summary(row: Row) -> str:
    """:return: one line about a row of ``measure``"""
    rates, adds = row["batches_per_s"], row["adds_per_s"]
    gb = {key: value / 1e9 for key, value in row.items() if "bytes" in key}
    return (
        f"{row['transitions']} transitions: {gb['resident_bytes']:.2f} GB resident, {gb['array_bytes']:.2f} GB of arrays; "
        f"a million: {gb['array_bytes_of_a_million']:.2f} GB, SB3 {gb['sb3_bytes_of_a_million']:.1f} GB; "
        f"sampling {statistics.median(rates['ours']):.0f} batches/s, {paired_ratio(rates['ours'], rates['sb3']):.2f} x SB3; "
        f"adding {adds['ours'] / adds['sb3']:.2f} x SB3"
    )
