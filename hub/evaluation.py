"""What an agent does, measured and recorded for its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv

# Pages show moving pictures of this size at once
MAX_GIF_BYTES = 1_000_000


@dataclass(frozen=True)
class SeedResult:
    """
    :param seed: Of the environment
    :param mean: Mean return of the episodes
    :param std: Standard deviation of their returns
    :param length: Mean length in steps
    """

    seed: int
    mean: float
    std: float
    length: float


@dataclass(frozen=True)
class Evaluation:
    """
    :param rows: One for each seed
    :param n_episodes: Episodes with each seed
    :param deterministic: Whether the agent acted deterministically
    """

    rows: Sequence[SeedResult]
    n_episodes: int
    deterministic: bool

    @property
    def n_seeds(self) -> int:
        return len(self.rows)

    @property
    def mean(self) -> float:
        """Mean return over all episodes."""
        return float(np.mean([row.mean for row in self.rows]))

    @property
    def std(self) -> float:
        """Standard deviation of the seeds' mean returns."""
        return float(np.std([row.mean for row in self.rows]))

    @property
    def how(self) -> str:
        return "acting deterministically" if self.deterministic else "with sampled actions"


def evaluate(model: BaseAlgorithm, env: VecEnv, seeds: Sequence[int], n_episodes: int, deterministic: bool) -> Evaluation:
    """
    :param model: The agent
    :param env: Its environment, with statistics that no longer change and rewards as they are
    :param seeds: Of the environment and of sampled actions
    :param n_episodes: With each seed
    :param deterministic: Whether the agent acts deterministically
    :return: What came out
    """
    rows = []
    for seed in seeds:
        model.set_random_seed(seed)
        env.seed(seed)
        returns, lengths = evaluate_policy(model, env, n_episodes, deterministic, return_episode_rewards=True, warn=False)
        rows.append(SeedResult(seed, float(np.mean(returns)), float(np.std(returns)), float(np.mean(lengths))))
    return Evaluation(rows, n_episodes, deterministic)


def record(model: BaseAlgorithm, env: VecEnv, n_steps: int, deterministic: bool) -> list[np.ndarray]:
    """
    :param model: The agent
    :param env: One environment, made with ``render_mode="rgb_array"``
    :param n_steps: Steps to play
    :param deterministic: Whether the agent acts deterministically
    :return: Frames, uint8, (height, width, 3)
    """
    frames: list[np.ndarray] = []
    obs: Any = env.reset()
    state, starts = None, np.ones(env.num_envs, bool)
    while len(frames) < n_steps:
        frame = env.render()
        assert frame is not None
        frames.append(frame)
        actions, state = model.predict(obs, state, starts, deterministic)
        obs, _, starts, _ = env.step(actions)
    return frames


def write_video(frames: Sequence[np.ndarray], fps: float, path: Path) -> None:
    """
    :param frames: uint8, (height, width, 3)
    :param fps: Frames per second
    :param path: MP4 file to write
    """
    height, width = (size // 2 * 2 for size in frames[0].shape[:2])
    # The codec that browsers play needs even sizes
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame[:height, :width]))
    writer.close()


def write_gif(frames: Sequence[np.ndarray], fps: float, path: Path) -> None:
    """
    Write a moving picture of at most ``MAX_GIF_BYTES``, smaller and with fewer frames if it has to be.

    :param frames: uint8, (height, width, 3)
    :param fps: Frames per second
    :param path: GIF file to write
    """
    for longest, n_frames in ((320, 120), (240, 90), (160, 60), (120, 40), (80, 20)):
        step = -(-len(frames) // n_frames)
        images = [_shrunk(frame, longest) for frame in frames[::step]]
        # At most 10 seconds, since most of an episode was left out
        duration = max(20, min(1000 * step / fps, 10_000 / len(images)))
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)
        if path.stat().st_size <= MAX_GIF_BYTES:
            return


def _shrunk(frame: np.ndarray, longest: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((longest, longest), Image.Resampling.BOX)
    return image.quantize(64)


def learning_curve(log_path: Path) -> Figure | None:
    """
    :param log_path: Folder of an experiment of the zoo
    :return: Returns over the steps of training, from its evaluations or else from its episodes; None if there are neither
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes: Any = figure.subplots()
    evaluations = log_path / "evaluations.npz"
    if evaluations.is_file():
        with np.load(evaluations) as data:
            steps, returns = data["timesteps"], data["results"]
        mean, std = returns.mean(axis=1), returns.std(axis=1)
        axes.plot(steps, mean)
        axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
        axes.set_title(f"Evaluations during training, {returns.shape[1]} episodes each")
    elif len(episodes := _episodes(log_path)):
        window = min(100, -(-len(episodes) // 10))
        axes.plot(episodes["l"].cumsum(), episodes["r"].rolling(window, min_periods=1).mean())
        axes.set_title(f"Episodes of the training, means over {window}")
    else:
        return None
    axes.set(xlabel="steps", ylabel="return")
    axes.grid(alpha=0.3)
    return figure


def _episodes(log_path: Path) -> pd.DataFrame:
    """:return: the episodes of the training; none for an offline agent"""
    return load_results(str(log_path)) if list(log_path.glob("*monitor.csv")) else pd.DataFrame()
