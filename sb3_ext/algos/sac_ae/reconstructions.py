"""Pictures of what the autoencoder keeps of an image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image as LoggedImage
from stable_baselines3.common.vec_env import VecEnv

if TYPE_CHECKING:
    from sb3_ext.algos.sac_ae.sac_ae import SACAE


class ReconstructionCallback(BaseCallback):
    """
    Shows, during training, images from the replay buffer and beneath them what the autoencoder makes of them: to TensorBoard,
    if that is on, and as PNG files. They are drawn anew each time.

    :param interval: In steps of the environment, >= 1
    :param folder: For the PNG files (None: that of the logger, if it has one)
    :param n_images: Images side by side, >= 1
    :param verbose: Verbosity level
    :raises ValueError: if a number is out of range
    """

    model: SACAE

    def __init__(self, interval: int = 5000, folder: str | None = None, n_images: int = 8, verbose: int = 0) -> None:
        super().__init__(verbose)
        if interval < 1 or n_images < 1:
            raise ValueError(f"interval and n_images must be at least 1, but got {interval} and {n_images}.")
        self.interval, self.folder, self.n_images = interval, folder, n_images
        self._last_drawn = 0

    def _on_training_start(self) -> None:
        self._last_drawn = self.num_timesteps

    def _on_step(self) -> bool:
        buffer = self.model.replay_buffer
        assert buffer is not None
        # The transition of the first step is stored after this
        if self.num_timesteps - self._last_drawn >= self.interval and buffer.size() > 0:
            self._last_drawn = self.num_timesteps
            self._draw(buffer)
        return True

    def _draw(self, buffer: ReplayBuffer) -> None:
        # Drawing must not change the training, which samples with numpy's global generator
        state = np.random.get_state()
        observations = buffer.sample(self.n_images).observations
        np.random.set_state(state)
        image = montage(self.model, observations.cpu().numpy())
        logged = LoggedImage(image, "HWC")
        self.logger.record("train/reconstructions", logged, exclude=("stdout", "log", "json", "csv"))
        folder = self.folder or self.logger.get_dir()
        if folder:
            save_png(image, Path(folder, f"reconstructions_{self.num_timesteps}_steps.png"))


def montage(model: SACAE, observations: np.ndarray) -> np.ndarray:
    """
    :param model: With an autoencoder
    :param observations: Images, uint8, channels first, (n, channels, height, width)
    :return: The newest frame of each, and beneath it of its reconstruction, uint8, (2 * height, n * width, 3)
    """
    rows = (_newest_frames(images) for images in (observations, model.reconstruct(observations)))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def _newest_frames(images: np.ndarray) -> np.ndarray:
    """:return: (n, height, width, 3). Colours, if the channels can be those, and gray otherwise."""
    newest = images[:, -3:] if images.shape[1] % 3 == 0 else images[:, -1:].repeat(3, axis=1)
    return newest.transpose(0, 2, 3, 1)


def save_png(image: np.ndarray, path: Path) -> None:
    """
    :param image: uint8, (height, width, 3)
    :param path: Where to; the folder is made, and an older file is there until the new one is complete
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(image).save(temporary, format="png")
    os.replace(temporary, path)


def pictures(model: SACAE, env: VecEnv, deterministic: bool, n_images: int = 8) -> dict[str, Figure]:
    """
    :param model: That acts
    :param env: One environment, with channels first or last
    :param deterministic: Whether it acts deterministically
    :param n_images: Images from one episode, evenly spaced
    :return: The picture, by file name without its ending; nothing, if the model was trained without a decoder
    """
    if model.decoder_update_interval is None:
        return {}
    obs: Any = env.reset()
    observations, done = [], False
    while not done:
        observations.append(_channels_first(model, obs)[0])
        actions, _ = model.predict(obs, deterministic=deterministic)
        obs, _, dones, _ = env.step(actions)
        done = bool(dones[0])
    chosen = np.linspace(0, len(observations) - 1, n_images).round().astype(int)
    figure = Figure(figsize=(1.5 * n_images, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    image = montage(model, np.stack([observations[index] for index in chosen]))
    axes.imshow(image)
    height = image.shape[0]
    axes.set(xticks=[], yticks=[0.25 * height, 0.75 * height], yticklabels=["observation", "reconstruction"])
    return {"reconstructions": figure}


def _channels_first(model: SACAE, obs: Any) -> np.ndarray:
    return obs if obs.shape[1:] == model.observation_space.shape else obs.transpose(0, 3, 1, 2)
