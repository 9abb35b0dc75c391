"""Environments as a camera sees them."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

from sb3_ext import SACAE
from sb3_ext.envs import ActionRepeat, PixelObservation
from sb3_ext.envs.pixels import PIXEL_ENVIRONMENTS, make_pixels


class Stripes(gym.Env):
    """Renders the number of the step as columns of light; ends after ``length`` steps by ``end``."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Box(0.0, 100.0, (1,))
    action_space = spaces.Box(-1.0, 1.0, (1,))
    render_mode = "rgb_array"

    def __init__(self, length=5, end="terminated"):
        self.length, self.end, self.t = length, end, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        is_over = self.t == self.length
        ends = {"terminated": is_over and self.end == "terminated", "truncated": is_over and self.end == "truncated"}
        return np.full(1, self.t, np.float32), 10.0**self.t, *ends.values(), {"t": self.t}

    def render(self):
        frame = np.zeros((8, 12, 3), np.uint8)
        frame[:, : 2 * self.t] = (100, 200, 50)
        return frame


def test_observations_are_stacks_of_renderings():
    env = PixelObservation(Stripes(), height=4, width=6, n_stack=3)
    assert env.observation_space == spaces.Box(0, 255, (4, 6, 9), np.uint8)
    images = []
    for t in range(3):
        expected = np.zeros((4, 6, 3), np.uint8)
        expected[:, :t] = (100, 200, 50)
        images.append(expected)
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, np.concatenate([images[0]] * 3, axis=-1))
    obs, *_ = env.step(np.zeros(1))
    np.testing.assert_array_equal(obs, np.concatenate([images[0], images[0], images[1]], axis=-1))
    obs, *_ = env.step(np.zeros(1))
    np.testing.assert_array_equal(obs, np.concatenate(images, axis=-1))
    # An observation does not change afterwards
    kept = obs.copy()
    env.step(np.zeros(1))
    np.testing.assert_array_equal(obs, kept)
    # A new episode knows nothing of the one before it
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, np.concatenate([images[0]] * 3, axis=-1))


def test_small_images_are_means():
    env = PixelObservation(Stripes(), height=2, width=3, n_stack=1)
    env.reset()
    obs, *_ = env.step(np.zeros(1))
    # Two of four columns are lit
    np.testing.assert_array_equal(obs[0, :, 0], [50, 0, 0])


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_actions_are_repeated(end):
    env = PixelObservation(Stripes(length=5, end=end), 8, 12, action_repeat=3, n_stack=1)
    env.reset()
    obs, reward, *ends, info = env.step(np.zeros(1))
    assert (reward, ends, info) == (1110.0, [False, False], {"t": 3})
    assert (obs[0, :, 1] > 0).sum() == 6
    _, reward, *ends, info = env.step(np.zeros(1))
    assert (reward, info) == (110_000.0, {"t": 5})
    assert ends == [end == "terminated", end == "truncated"]


def test_unusable_arguments():
    with pytest.raises(ValueError, match='render_mode="rgb_array", but got None'):
        PixelObservation(gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="n_stack must be at least 1, but got 4, 4 and 0"):
        PixelObservation(Stripes(), 4, 4, n_stack=0)
    with pytest.raises(ValueError, match="n_repeats must be at least 1, but got 0"):
        ActionRepeat(Stripes(), 0)


def test_failing_renderer_says_what_to_install():
    class Broken(Stripes):
        def render(self):
            raise OSError("no OpenGL")

    with pytest.raises(RuntimeError, match=r"Cannot render .*Broken.*no OpenGL.*libosmesa6.*MUJOCO_GL"):
        PixelObservation(Broken()).reset()


def test_renderer_that_is_missing_at_once_says_what_to_install():
    def without_opengl(render_mode):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    gym.register("WithoutOpenGL-v0", entry_point=without_opengl)
    try:
        with pytest.raises(RuntimeError, match=r"Cannot make WithoutOpenGL-v0 .*glGetError.*libosmesa6.*MUJOCO_GL"):
            make_pixels("WithoutOpenGL-v0")
    finally:
        del gym.registry["WithoutOpenGL-v0"]


def test_frames_of_a_renderer_that_draws_into_the_same_array():
    class Canvas(Stripes):
        canvas = np.zeros((8, 12, 3), np.uint8)

        def render(self):
            self.canvas[:] = self.t
            return self.canvas

    env = PixelObservation(Canvas(), 8, 12, n_stack=3)
    env.reset()
    for _ in range(3):
        obs, *_ = env.step(np.zeros(1))
    assert obs[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("env_id", ["LunarLanderContinuous-v3", "MountainCarContinuous-v0"])
def test_box2d_and_classic_control(env_id):
    env = PixelObservation(gym.make(env_id, render_mode="rgb_array"), 40, 48)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (40, 48, 9) and obs.std() > 0
    env.close()


def test_registered_environment():
    env = gym.make("PixelPendulum-v1", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    check_env_for_sb3(env)
    obs, _ = env.reset(seed=0)
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, again)
    assert obs.shape == (36, 36, 9) and env.render().shape == (500, 500, 3)
    length = 1
    while not (ends := env.step(env.action_space.sample())[2:4])[1]:
        length += 1
    # 200 steps, two for each action, and a time limit is not a terminal state
    assert (length, ends) == (100, (False, True))
    assert gym.make("PixelPendulum-v1", height=40, width=44, action_repeat=4).observation_space.shape == (40, 44, 9)
    env.close()


def test_a_window_shows_it(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make("PixelPendulum-v1", render_mode="human")
    assert "HumanRendering" in str(env)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()


def test_the_table_is_registered_with_the_repeats_of_the_paper():
    assert set(PIXEL_ENVIRONMENTS) <= set(gym.registry)
    repeats = {
        name: kwargs["action_repeat"] for name, kwargs in PIXEL_ENVIRONMENTS.items() if "dm_control" in kwargs["env_id"]
    }
    assert repeats == {
        "PixelFingerSpin-v0": 2,
        "PixelCartpoleSwingup-v0": 8,
        "PixelReacherEasy-v0": 4,
        "PixelCheetahRun-v0": 4,
        "PixelWalkerWalk-v0": 2,
        "PixelBallInCupCatch-v0": 4,
    }


def test_missing_dm_control_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(ValueError, match=r'pip install "sb3-ext\[dm_control\]"'):
        gym.make("PixelCheetahRun-v0")


def test_trains_on_renderings():
    small = {"net_arch": [8], "features_extractor_kwargs": {"n_layers": 2, "n_filters": 2, "features_dim": 4}}
    model = SACAE(
        "CnnPolicy",
        "PixelPendulum-v1",
        buffer_size=300,
        learning_starts=105,
        batch_size=4,
        initial_gradient_steps=0,
        policy_kwargs=small,
        seed=0,
        device="cpu",
    ).learn(110)
    assert model.replay_buffer.n_stack == 3
    assert model._n_updates == 5
