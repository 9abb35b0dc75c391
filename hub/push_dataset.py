"""Publishes a Minari data set on the Hugging Face Hub: ``python -m sb3_ext.hub.push_dataset --help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from huggingface_hub import DatasetCardData
from matplotlib.figure import Figure
from minari import MinariDataset

from sb3_ext.offline.catalog import METADATA, find_folder
from sb3_ext.offline.errors import DatasetError

from .card import extras, render_template
from .data import DatasetStatistics, statistics_of
from .errors import HubError
from .publishing import add_repository, files_in, upload

# Points of a picture, beyond which it only grows darker
_MAX_POINTS = 20_000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: The arguments of the command (None: those of the process)
    :return: The checked arguments
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_ext.hub.push_dataset", description=__doc__)
    parser.add_argument("--dataset", help="Minari id, or path of the data set", required=True)
    parser.add_argument("-orga", "--organization", help="user or organization on the Hub", required=True)
    add_repository(parser, name="the id with - for /", message="Data set")
    parser.add_argument("--dry-run", help="write the card and its pictures into this folder, and push nothing", type=Path)
    return parser.parse_args(argv)


def repo_id_of(args: argparse.Namespace) -> str:
    """
    :param args: Of the command
    :return: ``organization/name``
    """
    return f"{args.organization}/{args.repo_name or Path(args.dataset).as_posix().strip('/').replace('/', '-')}"


def write_card(args: argparse.Namespace, dataset: MinariDataset, statistics: DatasetStatistics, folder: Path) -> None:
    """
    :param args: Of the command
    :param dataset: The data set
    :param statistics: Its statistics
    :param folder: For the card and its pictures
    """
    draw_returns(statistics).savefig(folder / "returns.png", dpi=100)
    draw_coverage(dataset).savefig(folder / "coverage.png", dpi=100)
    metadata: dict[str, Any] = dataset.storage.metadata
    card_data = DatasetCardData(
        license=args.license, task_categories=["reinforcement-learning"], tags=["minari", "offline-reinforcement-learning"]
    )
    env_id = dataset.env_spec.id if dataset.env_spec else None
    card = render_template(
        "dataset_card.md",
        card_data=card_data.to_yaml(),
        repo_id=repo_id_of(args),
        dataset=statistics,
        env_id=env_id,
        extras=extras(env_id) if env_id else "",
        observation_space=dataset.observation_space,
        action_space=dataset.action_space,
        command=metadata.get("command"),
        algorithm=metadata.get("algorithm_name"),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def draw_returns(statistics: DatasetStatistics) -> Figure:
    """
    :param statistics: Of a data set
    :return: Histogram of the returns of its episodes
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes: Any = figure.subplots()
    axes.hist(statistics.returns, bins=min(50, max(10, statistics.n_episodes // 10)))
    axes.set(xlabel="return of the episode", ylabel="episodes")
    return figure


def draw_coverage(dataset: MinariDataset) -> Figure:
    """
    :param dataset: A data set
    :return: Its observations in the plane of their first two principal components, and how often it has which action
    """
    observations, actions = _sampled(dataset)
    centred = observations - observations.mean(axis=0)
    # Components of standardized observations: units do not matter
    scaled = centred / np.maximum(centred.std(axis=0), 1e-8)
    _, sizes, components = np.linalg.svd(scaled[:2000], full_matrices=False)
    plane = scaled @ components[:2].T
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    states, acts = figure.subplots(1, 2)
    second = plane[:, 1] if plane.shape[1] > 1 else np.zeros(len(plane))
    states.hexbin(plane[:, 0], second, gridsize=50, bins="log", cmap="viridis")
    shares = sizes**2 / (sizes**2).sum()
    states.set(title="Observations", xlabel=f"first component ({shares[0]:.0%})", ylabel="second component")
    if isinstance(dataset.action_space, spaces.Discrete):
        values, counts = np.unique(actions, return_counts=True)
        acts.bar(values, counts / counts.sum())
        acts.set(title="Actions", xlabel="action", ylabel="share", xticks=values)
    else:
        for dimension, values in enumerate(actions.T):
            acts.hist(values, bins=50, histtype="step", density=True, label=f"dimension {dimension}")
        acts.set(title="Actions", xlabel="value", ylabel="density")
        acts.legend(fontsize="small")
    return figure


def _sampled(dataset: MinariDataset) -> tuple[np.ndarray, np.ndarray]:
    """:return: observations as vectors and actions, at most ``_MAX_POINTS`` of them, evenly spaced"""
    every = -(-dataset.total_steps // _MAX_POINTS)
    observations, actions = [], []
    for episode in dataset.iterate_episodes():
        rows = _rows(episode.observations, len(episode.rewards))[::every]
        flat: list[Any] = [spaces.flatten(dataset.observation_space, row) for row in rows]
        observations.append(np.stack(flat))
        actions.append(np.asarray(episode.actions)[::every])
    points, acted = np.concatenate(observations).astype(float), np.concatenate(actions)
    return points, acted.reshape(len(acted), -1) if acted.ndim > 1 else acted


def _rows(observations: Any, n: int) -> list[Any]:
    if isinstance(observations, dict):
        columns = [_rows(column, n) for column in observations.values()]
        return [dict(zip(observations, values, strict=True)) for values in zip(*columns, strict=True)]
    return list(observations[:n])


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: The arguments of the command (None: those of the process)
    """
    args = parse(argv)
    try:
        data = find_folder(args.dataset, None)
        dataset, statistics = MinariDataset(data), statistics_of(args.dataset)
        if args.dry_run is not None:
            args.dry_run.mkdir(parents=True, exist_ok=True)
            write_card(args, dataset, statistics, args.dry_run)
            print(f"This card would be pushed to {repo_id_of(args)} with the data in {data}: {args.dry_run}")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_card(args, dataset, statistics, Path(folder))
            of_data = {f"{METADATA.parent}/{name}": path for name, path in files_in(data).items()}
            files = {**files_in(Path(folder)), **of_data}
            url = upload(files, repo_id_of(args), args.commit_message, "dataset", args.private, args.token)
        print(f"Published: {url}")
    except (DatasetError, HubError) as error:
        print(f"sb3-ext: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
