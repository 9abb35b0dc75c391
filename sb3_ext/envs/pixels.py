"""Images instead of states: environments as a camera sees them."""

from __future__ import annotations

from collections import deque
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import HumanRendering
from PIL import Image

_HOW_TO_RENDER = (
    'Classic control and Box2D need pygame (pip install "gymnasium[classic-control,box2d]"). MuJoCo and dm_control need '
    "OpenGL; on a machine without a display, install OSMesa (apt-get install libosmesa6) and set MUJOCO_GL=osmesa, or, "
    "with a GPU, set MUJOCO_GL=egl."
)


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """
    Each action is done several times, and the rewards are summed; an episode can end within them.

    :param env: Environment
    :param n_repeats: Steps of the environment with the same action, >= 1
    :raises ValueError: if there are fewer
    """

    def __init__(self, env: gym.Env, n_repeats: int) -> None:
        super().__init__(env)
        if n_repeats < 1:
            raise ValueError(f"n_repeats must be at least 1, but got {n_repeats}.")
        self.n_repeats = n_repeats

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.n_repeats):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class PixelObservation(gym.Wrapper[np.ndarray, Any, Any, Any]):
    """
    Renderings of the environment as observations, the last ``n_stack`` of them one behind the other along the channels. Before
    the first step of an episode, the first image stands for those that are missing.

    :param env: Environment that renders: ``gym.make(..., render_mode="rgb_array")``
    :param height: Of the images, in pixels, >= 1
    :param width: Of the images, in pixels, >= 1
    :param action_repeat: Each action is done so many times between two images, see :class:`ActionRepeat`, >= 1
    :param n_stack: Images in an observation, >= 1
    :raises ValueError: if the environment does not render arrays, or a number is out of range
    :raises RuntimeError: if rendering fails; it says what has to be installed
    """

    def __init__(self, env: gym.Env, height: int = 84, width: int = 84, action_repeat: int = 1, n_stack: int = 3) -> None:
        super().__init__(ActionRepeat(env, action_repeat))
        if env.render_mode != "rgb_array":
            raise ValueError(
                f'PixelObservation needs an environment made with render_mode="rgb_array", but got {env.render_mode!r}.'
            )
        if min(height, width, n_stack) < 1:
            raise ValueError(f"height, width and n_stack must be at least 1, but got {height}, {width} and {n_stack}.")
        self.size, self.n_stack = (height, width), n_stack
        self.observation_space = spaces.Box(0, 255, (height, width, 3 * n_stack), np.uint8)
        self._images: deque[np.ndarray] = deque(maxlen=n_stack)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        self._images.extend([self._image()] * self.n_stack)
        return self._observation(), info

    def step(self, action: Any) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self.env.step(action)
        self._images.append(self._image())
        return self._observation(), reward, terminated, truncated, info

    def _observation(self) -> np.ndarray:
        return np.concatenate(self._images, axis=-1)

    def _image(self) -> np.ndarray:
        try:
            frame: Any = self.env.render()
        # Each backend has errors of its own, which name libraries and not packages
        except Exception as error:
            raise RuntimeError(f"Cannot render {self.env.unwrapped}: {error}. {_HOW_TO_RENDER}") from error
        if frame.shape[:2] == self.size:
            # The environment may draw the next one into the same array
            return np.array(frame)
        # Means over rectangles, which keep thin lines
        return np.asarray(Image.fromarray(frame).resize(self.size[::-1], Image.Resampling.BOX))


def make_pixels(
    env_id: str,
    render_mode: str | None = None,
    height: int = 84,
    width: int = 84,
    action_repeat: int = 1,
    n_stack: int = 3,
    **kwargs: Any,
) -> gym.Env:
    """
    Entry point of the environments whose names begin with ``Pixel``.

    :param env_id: The environment that is rendered
    :param render_mode: "human" shows it in a window
    :param height: See :class:`PixelObservation`
    :param width: See :class:`PixelObservation`
    :param action_repeat: See :class:`PixelObservation`
    :param n_stack: See :class:`PixelObservation`
    :param kwargs: For ``gym.make``
    :return: The environment
    :raises ValueError: if a number is out of range, or the environment needs dm_control and it is not installed
    :raises RuntimeError: if the environment finds nothing to render with; it says what has to be installed
    """
    if env_id.startswith("dm_control/"):
        _register_dm_control(env_id)
    try:
        rendered = gym.make(env_id, render_mode="rgb_array", **kwargs)
    # What OpenGL's Python packages say where its library is missing
    except (AttributeError, ImportError) as error:
        raise RuntimeError(f"Cannot make {env_id} with a renderer: {error}. {_HOW_TO_RENDER}") from error
    env: gym.Env = PixelObservation(rendered, height, width, action_repeat, n_stack)
    return HumanRendering(env) if render_mode == "human" else env


def _register_dm_control(env_id: str) -> None:
    try:
        import shimmy
    except ImportError as error:
        raise ValueError(f'{env_id} needs dm_control: pip install "sb3-ext[dm_control]"') from error
    gym.register_envs(shimmy)
    if env_id not in gym.registry:
        raise ValueError(
            f'{env_id} is no environment of dm_control, or it is not installed: pip install "sb3-ext[dm_control]"'
        )


# Name, environment, and what PixelObservation and the environment are given. Action repeats of dm_control: Yarats et al. 2019,
# table 1; their MuJoCo renders in the paper's size at once.
_SMALL = {"height": 36, "width": 36}
_DM_CONTROL = {
    "PixelFingerSpin-v0": ("finger-spin-v0", 2),
    "PixelCartpoleSwingup-v0": ("cartpole-swingup-v0", 8),
    "PixelReacherEasy-v0": ("reacher-easy-v0", 4),
    "PixelCheetahRun-v0": ("cheetah-run-v0", 4),
    "PixelWalkerWalk-v0": ("walker-walk-v0", 2),
    "PixelBallInCupCatch-v0": ("ball_in_cup-catch-v0", 4),
}
PIXEL_ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "PixelPendulum-v1": {"env_id": "Pendulum-v1", "action_repeat": 2, **_SMALL},
    "PixelInvertedPendulum-v5": {"env_id": "InvertedPendulum-v5", "action_repeat": 2, **_SMALL},
    **{
        name: {
            "env_id": f"dm_control/{task}",
            "action_repeat": action_repeat,
            "render_kwargs": {"height": 84, "width": 84, "camera_id": 0},
        }
        for name, (task, action_repeat) in _DM_CONTROL.items()
    },
}
