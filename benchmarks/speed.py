"""Speed and memory against the peers: long-lived processes, asked in turns, so that a ratio compares neighbours in time."""

import json
import statistics
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import cases, results
from benchmarks.peers import PEERS, Worker
from benchmarks.results import Row
from benchmarks.workers import load, spaces_env

# Observations in one call when acting: as many environments as a vectorised evaluation has
ACT_BATCH = 16

# What Minari calls the columns of :func:`benchmarks.workers.load`
MINARI_KEYS = {"actions": "actions", "rewards": "rewards", "terminations": "terminals", "truncations": "timeouts"}


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """
    :param ours: Rates, one per round
    :param theirs: Rates of the same rounds
    :return: Median over the rounds of the ratios within a round, which a machine that slows down for a while does not change
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def calibrate(worker: Worker, verb: str, seconds: float) -> int:
    """
    Warm up, and find how much work takes about ``seconds``.

    :param worker: That has been built
    :param verb: ``update`` or ``act``
    :param seconds: Of one measurement
    :return: Number of updates, of steps, or of calls
    """
    answer = worker.ask(verb, n=1)
    while answer["seconds"] < 0.5 * seconds:
        answer = worker.ask(verb, n=2 * answer["done"])
    return max(1, round(answer["done"] * seconds / answer["seconds"]))


def race(workers: list[Worker], verb: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    """
    :param workers: That have been built
    :param verb: ``update`` or ``act``
    :param seconds: Of one measurement
    :param rounds: Number of measurements of each worker, in turns
    :return: Updates, steps or calls per second in each round, by name
    """
    amounts = {worker.name: calibrate(worker, verb, seconds) for worker in workers}
    rates: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            answer = worker.ask(verb, n=amounts[worker.name])
            rates[worker.name].append(answer["done"] / answer["seconds"])
    return rates


def measure(case: cases.Case, folder: Path, threads: int, seconds: float, rounds: int, peers: list[str]) -> Row:
    """
    :param case: What to time
    :param folder: Of the peers' environments
    :param threads: Of torch and OpenMP
    :param seconds: Of one measurement
    :param rounds: Number of measurements of each contender
    :param peers: Contenders to ask beside ours
    :return: The row of results
    """
    products = case.products(case)
    names = ["ours", *(name for name in case.contenders if name in peers or name not in PEERS), "arithmetic"]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        data = Path(scratch, "data.npz")
        cases.synthetic(case, data)
        workers = [stack.enter_context(Worker(name, folder, threads)) for name in names]
        spec = case.spec(threads, data=str(data), act_batch=ACT_BATCH, products=products)
        versions = {worker.name: worker.ask("build", spec=spec)["versions"] for worker in workers}
        update = race(workers, "update", seconds, rounds)
        act = race(workers[:-1], "act", seconds, rounds)
        peak = {worker.name: worker.ask("peak")["bytes"] for worker in workers[:-1]}
    return {
        "kind": "speed",
        "case": case.name,
        "threads": threads,
        "updates_per_s": {name: results.rounded(rates) for name, rates in update.items()},
        "observations_per_s": {name: results.rounded(np.array(rates) * ACT_BATCH, 1) for name, rates in act.items()},
        "peak_bytes": peak,
        "gflop": round(cases.gflop(products), 4),
        "command": results.own_command(),
        **results.stamp(**{name: versions[name][name] for name in names if name in versions[name]}),
    }


def measure_on_policy(
    case: cases.OnPolicyCase, folder: Path, threads: int, seconds: float, rounds: int, peers: list[str]
) -> Row:
    """
    :param case: What to time
    :param folder: Of the peers' environments
    :param threads: Of torch and OpenMP
    :param seconds: Of one measurement, or as long as the smallest piece of work takes
    :param rounds: Number of measurements of each contender
    :param peers: Contenders in environments of their own to ask beside those in ours
    :return: The row of results
    """
    names = [name for name in case.contenders if name in peers or name not in PEERS]
    specs = {name: case.spec(name, threads) for name in names}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        data = Path(scratch, "data.npz")
        if case.measured == "train":
            cases.synthetic(case, data)
        workers = [stack.enter_context(Worker(name, folder, threads)) for name in names]
        versions = {worker.name: worker.ask("build", spec={**specs[worker.name], "data": str(data)}) for worker in workers}
        rates = race(workers, "update", seconds, rounds)
    return {
        "kind": "on-policy speed",
        "case": case.name,
        "measured": case.measured,
        "threads": threads,
        "rates": {name: results.rounded(of_name) for name, of_name in rates.items()},
        "specs": specs,
        "command": results.own_command(),
        **results.stamp(**{name: answer["versions"][name] for name, answer in versions.items() if name in PEERS}),
    }


def summary(row: Row) -> str:
    """:return: one line about a row of ``speed``, ``on-policy speed`` or ``memory``"""
    if row["kind"] == "on-policy speed":
        rates, unit = row["rates"], "updates/s" if row["measured"] == "train" else "steps/s"
        parts = [f"ours {statistics.median(rates['ours']):.1f} {unit}"]
        parts += [
            f"{paired_ratio(rates['ours'], theirs):.2f} x {name} ({statistics.median(theirs):.1f})"
            for name, theirs in rates.items()
            if name != "ours"
        ]
        return f"{row['case']}, {row['threads']} thread(s): " + "; ".join(parts)
    if row["kind"] == "memory":
        return (
            f"{row['case']}, {row['transitions']} transitions of {row['transition_bytes'] / 1e6:.0f} MB in all: "
            f"peak {row['peak_bytes'] / 1e6:.0f} MB, start-up {row['startup_bytes'] / 1e6:.0f} MB, "
            f"{memory_factor(row):.2f} times the bytes of the transitions"
        )
    rates, ours = row["updates_per_s"], row["updates_per_s"]["ours"]
    parts = [f"ours {statistics.median(ours):.1f} updates/s"]
    parts += [f"{paired_ratio(ours, rates[n]):.2f} x {n} ({statistics.median(rates[n]):.1f})" for n in peers_of(row)]
    share, bound = paired_ratio(ours, rates["arithmetic"]), statistics.median(rates["arithmetic"])
    parts.append(f"{share:.2f} of the arithmetic bound ({bound:.1f}, {bound * row['gflop']:.0f} GFLOP/s)")
    return f"{row['case']}, {row['threads']} thread(s): " + "; ".join(parts)


def peers_of(row: Row) -> list[str]:
    """:return: the contenders in a row of ``speed`` other than ours and the bound"""
    return [name for name in row["updates_per_s"] if name not in ("ours", "arithmetic")]


def memory_factor(row: Row) -> float:
    """:return: what training took beyond the start-up size, in units of the bytes of the transitions"""
    return (row["peak_bytes"] - row["startup_bytes"]) / row["transition_bytes"]


def memory(case: cases.Case, n_transitions: int, n_updates: int) -> Row:
    """
    Peak memory of reading a Minari data set and training on it. The start-up size is the peak of the same process with a
    data set of one episode.

    :param case: Gives the shapes
    :param n_transitions: Size of the data set
    :param n_updates: Number of updates
    :return: The row of results
    """
    with tempfile.TemporaryDirectory() as scratch:
        peaks = {}
        for n in (200, n_transitions):
            dataset = _minari(case, Path(scratch), n)
            with Worker("ours", Path()) as worker:
                worker.ask("build", spec=case.spec(dataset=str(dataset)))
                worker.ask("update", n=n_updates)
                peaks[n] = worker.ask("peak")["bytes"]
    n_numbers = 2 * int(np.prod(case.observation_shape)) + (1 if case.discrete else case.n_actions) + 2
    return {
        "kind": "memory",
        "case": case.name,
        "transitions": n_transitions,
        "transition_bytes": 4 * n_numbers * n_transitions,
        "startup_bytes": peaks[200],
        "peak_bytes": peaks[n_transitions],
        "command": results.own_command(),
        **results.stamp(),
    }


def _minari(case: cases.Case, scratch: Path, n: int) -> Path:
    """:return: the folder of a Minari data set of synthetic transitions"""
    import h5py
    from minari.serialization import serialize_space

    npz, folder = scratch / f"{n}.npz", scratch / str(n) / "data"
    cases.synthetic(case, npz, n)
    spec = case.spec(data=str(npz))
    data, env = load(spec), spaces_env(spec)
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w", libver="latest") as file:
        for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            episode = file.create_group(f"episode_{index}")
            episode.attrs.update({"id": index, "total_steps": end - start})
            episode["observations"] = np.concatenate(
                [data["observations"][start:end], data["next_observations"][end - 1 : end]]
            )
            for name, key in MINARI_KEYS.items():
                episode[name] = data[key][start:end]
    metadata = {
        "dataset_id": f"synthetic/{n}-v0",
        "total_episodes": len(ends),
        "total_steps": n,
        "data_format": "hdf5",
        "observation_space": serialize_space(env.observation_space),
        "action_space": serialize_space(env.action_space),
        "minari_version": version("minari"),
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    npz.unlink()
    return folder.parent
