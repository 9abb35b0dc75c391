"""
Pictures of what the options of a trained agent do: ``python -m sb3_ext.algos.option_critic.plot --help``.

For Four Rooms, one row for each option: how it acts, where it ends, and where it is in force. For any environment, a timeline
of episodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch as th
from huggingface_sb3 import EnvironmentName
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ext.algos.option_critic import OptionCritic
from sb3_ext.envs import FourRooms
from sb3_ext.envs.four_rooms import MOVES
from sb3_ext.offline.errors import AgentError
from sb3_ext.zoo import register

# Where options are drawn in colours, as many as there are
_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]


class Episode(NamedTuple):
    """
    An episode that was played.

    :param options: In force at each step, (length,)
    :param cells: Where the agent was in Four Rooms; empty elsewhere
    :param episode_return: Sum of the rewards
    """

    options: np.ndarray
    cells: Sequence[int]
    episode_return: float


def play(model: OptionCritic, env: VecEnv, n_episodes: int, deterministic: bool) -> list[Episode]:
    """
    :param model: That acts
    :param env: One environment
    :param n_episodes: Number of episodes
    :param deterministic: See :meth:`OptionCriticPolicy.predict`
    :return: The episodes
    """
    episodes: list[Episode] = []
    is_in_rooms = _rooms(env) is not None
    obs: Any = env.reset()
    state, starts = None, np.ones(1, bool)
    options, cells, total = [], [], 0.0
    while len(episodes) < n_episodes:
        actions, state = model.predict(obs, state, starts, deterministic)
        assert state is not None
        options.append(int(state[0][0]))
        cells.extend(env.get_attr("position") if is_in_rooms else [])
        obs, rewards, starts, _ = env.step(actions)
        total += float(rewards[0])
        if starts[0]:
            episodes.append(Episode(np.array(options), cells, total))
            options, cells, total = [], [], 0.0
    return episodes


def _rooms(env: VecEnv) -> FourRooms | None:
    (unwrapped,) = env.get_attr("unwrapped")
    return unwrapped if isinstance(unwrapped, FourRooms) else None


def draw_timeline(episodes: Sequence[Episode], n_options: int) -> Figure:
    """
    :param episodes: One line each
    :param n_options: Number of options
    :return: Which option is in force when, with the returns
    """
    longest = max(len(episode.options) for episode in episodes)
    grid = np.full((len(episodes), longest), np.nan)
    for line, episode in enumerate(episodes):
        grid[line, : len(episode.options)] = episode.options
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(episodes)), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([_COLOURS[option % len(_COLOURS)] for option in range(n_options)])
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap=colours, vmin=-0.5, vmax=n_options - 0.5)
    axes.set_yticks(range(len(episodes)), [f"{episode.episode_return:.1f}" for episode in episodes])
    axes.set(xlabel="step", ylabel="return of the episode", title="Option in force")
    figure.colorbar(image, ax=axes, ticks=range(n_options), label="option")
    return figure


def draw_four_rooms(model: OptionCritic, rooms: FourRooms, observations: np.ndarray, episodes: Sequence[Episode]) -> Figure:
    """
    :param model: Trained on Four Rooms
    :param rooms: The environment
    :param observations: What the model observes in each cell, (104, ...)
    :param episodes: Played there
    :return: For each option its policy as arrows, its termination probabilities, and the share of the visits to a cell in
        which it was in force
    """
    policy, shares = model.policy, _shares(rooms, episodes, model.n_options)
    policy.set_training_mode(False)
    figure = Figure(figsize=(9, 3 * model.n_options), layout="constrained")
    grid = figure.subplots(model.n_options, 3, squeeze=False)
    with th.no_grad():
        hidden = policy.critic.hidden(th.as_tensor(observations, device=model.device))
        terminations = policy.terminations(hidden).cpu().numpy()
        for option, (arrows, ends, used) in enumerate(grid):
            numbers = th.full((len(rooms.cells),), option, device=model.device)
            distribution: Any = policy.distribution(hidden, numbers).distribution
            _draw_arrows(arrows, rooms, distribution.probs.cpu().numpy())
            for axes, values in ((ends, terminations[:, option]), (used, shares[:, option])):
                figure.colorbar(_draw_cells(axes, rooms, values), ax=axes, shrink=0.8)
            arrows.set_ylabel(f"option {option}")
    for axes, title in zip(grid[0], ("policy", "termination probability", "share of the visits"), strict=True):
        axes.set_title(title)
    return figure


def _shares(rooms: FourRooms, episodes: Sequence[Episode], n_options: int) -> np.ndarray:
    """:return: for each cell, how often each option was in force there, as a share; NaN where nobody was"""
    counts = np.zeros((len(rooms.cells), n_options))
    for episode in episodes:
        np.add.at(counts, (np.array(episode.cells), episode.options), 1)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def _draw_cells(axes: Any, rooms: FourRooms, values: np.ndarray) -> Any:
    grid = np.full(rooms.floor.shape, np.nan)
    grid[tuple(rooms.cells.T)] = values
    _draw_walls(axes, rooms)
    return axes.imshow(grid, cmap="viridis", vmin=0, vmax=1)


def _draw_arrows(axes: Any, rooms: FourRooms, probabilities: np.ndarray) -> None:
    """Mean direction of the option in each cell: long where it is sure."""
    down, right = (probabilities @ np.array(MOVES)).T
    _draw_walls(axes, rooms)
    rows, columns = rooms.cells.T
    axes.quiver(columns, rows, right, down, angles="xy", scale_units="xy", scale=1.2, pivot="mid", width=0.006)
    axes.scatter(*rooms.cells[rooms.goal][::-1], marker="*", s=120, color="tab:green", zorder=3)


def _draw_walls(axes: Any, rooms: FourRooms) -> None:
    axes.imshow(np.where(rooms.floor, np.nan, 0.0), cmap=ListedColormap(["0.35"]))
    axes.set(xticks=[], yticks=[])


def pictures(model: OptionCritic, env: VecEnv, deterministic: bool, n_episodes: int = 20) -> dict[str, Figure]:
    """
    :param model: That acts
    :param env: One environment
    :param deterministic: See :meth:`OptionCriticPolicy.predict`
    :param n_episodes: Number of episodes to play
    :return: The pictures, by file name without its ending
    """
    episodes = play(model, env, n_episodes, deterministic)
    figures = {"options-timeline": draw_timeline(episodes, model.n_options)}
    rooms = _rooms(env)
    # Of several frames, as VecFrameStack makes them, a cell does not say the others
    if rooms is not None and model.observation_space == rooms.observation_space:
        observations: Any = np.stack([rooms.observe(number) for number in range(len(rooms.cells))])
        normalize = unwrap_vec_normalize(env)
        if normalize is not None:
            observations = normalize.normalize_obs(observations)
        figures["options-rooms"] = draw_four_rooms(model, rooms, observations, episodes)
    return figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from sb3_ext.zoo.agents import add_choice_of_agent

    parser = argparse.ArgumentParser(prog="python -m sb3_ext.algos.option_critic.plot", description=__doc__)
    parser.add_argument("--env", help="environment ID", type=EnvironmentName, default="FourRooms-v0")
    parser.add_argument("--n-episodes", help="number of episodes to play", type=int, default=20)
    parser.add_argument("--stochastic", help="draw actions and terminations", action="store_true")
    parser.add_argument("--seed", help="random generator seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the pictures (default: that of the agent)", type=Path)
    add_choice_of_agent(parser)
    args = parser.parse_args(argv, argparse.Namespace(algo="option_critic"))
    if args.n_episodes < 1:
        parser.error(f"--n-episodes must be at least 1, not {args.n_episodes}")
    return args


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: The arguments, those of the process by default
    """
    # The start-up hook may be switched off
    register()
    from sb3_ext.zoo.agents import find_agent, load_agent

    args = parse(argv)
    try:
        model_path, log_path = find_agent(args)
    except AgentError as error:
        print(f"sb3-ext: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    model, env, _ = load_agent(args, model_path, log_path)
    assert isinstance(model, OptionCritic)
    folder = args.output or Path(log_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures(model, env, not args.stochastic, args.n_episodes).items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(path)


if __name__ == "__main__":
    main()
