"""Pictures of options."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch as th
from huggingface_hub import ModelCard
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_ext import OptionCritic
from sb3_ext.algos.option_critic import plot
from sb3_ext.envs import FourRooms
from sb3_ext.zoo import register


def rooms(**kwargs):
    return DummyVecEnv([lambda: gymnasium.make("FourRooms-v0", max_episode_steps=30, **kwargs)])


@pytest.fixture
def model():
    return OptionCritic("MlpPolicy", rooms(), n_options=3, buffer_size=100, seed=0, device="cpu")


def test_episodes_hold_options_cells_and_returns(model):
    env = rooms(goal=(1, 1))
    env.seed(0)
    episodes = plot.play(model, env, 4, deterministic=False)
    assert len(episodes) == 4
    for episode in episodes:
        assert len(episode.options) == len(episode.cells) <= 30
        # From one cell to the same or a neighbour
        (four_rooms,) = env.get_attr("unwrapped")
        assert np.abs(np.diff(four_rooms.cells[episode.cells], axis=0)).sum(axis=1, initial=0).max(initial=0) <= 1
        assert set(episode.options) <= {0, 1, 2}
        assert episode.episode_return == (1.0 if len(episode.options) < 30 else 0.0)


@pytest.mark.parametrize("observation", ["one_hot", "coordinates"])
@pytest.mark.parametrize("wrapper", [lambda env: env, VecNormalize])
def test_pictures_of_four_rooms(observation, wrapper):
    env = wrapper(rooms(observation=observation))
    model = OptionCritic("MlpPolicy", env, n_options=3, buffer_size=100, seed=0, device="cpu")
    figures = plot.pictures(model, env, deterministic=False, n_episodes=3)
    # Three pictures for each option, and the scales of two of them
    assert len(figures["options-rooms"].axes) == 3 * 3 + 2 * 3


def test_termination_probabilities_are_those_for_what_the_model_observes():
    env = VecNormalize(rooms(observation="coordinates"))
    env.obs_rms.mean, env.obs_rms.var = np.array([0.3, 0.6]), np.array([0.01, 0.04])
    model = OptionCritic("MlpPolicy", env, n_options=3, buffer_size=100, seed=0, device="cpu")
    axes = plot.pictures(model, env, deterministic=False, n_episodes=1)["options-rooms"].axes[1]
    (four_rooms,) = env.get_attr("unwrapped")
    drawn = axes.images[-1].get_array()[tuple(four_rooms.cells[7])]
    observation = (four_rooms.observe(7) - [0.3, 0.6]) / np.sqrt(np.array([0.01, 0.04]) + env.epsilon)
    hidden = model.policy.critic.hidden(th.as_tensor(observation, dtype=th.float32)[None])
    assert drawn == pytest.approx(model.policy.terminations(hidden)[0, 0].item(), rel=1e-4)


def test_no_rooms_for_stacked_observations():
    env = VecFrameStack(rooms(), 2)
    model = OptionCritic("MlpPolicy", env, n_options=3, buffer_size=100, seed=0, device="cpu")
    assert list(plot.pictures(model, env, deterministic=False, n_episodes=1)) == ["options-timeline"]


def test_shares_by_hand():
    four_rooms = FourRooms()
    episodes = [plot.Episode(np.array([0, 1, 1]), [5, 5, 9], 0.0), plot.Episode(np.array([1]), [5], 0.0)]
    shares = plot._shares(four_rooms, episodes, 2)
    np.testing.assert_allclose(shares[5], [1 / 3, 2 / 3])
    np.testing.assert_allclose(shares[9], [0.0, 1.0])
    assert np.isnan(shares[[0, 1, 2]]).all()


def test_timeline_shows_each_step_and_return():
    episodes = [plot.Episode(np.array([0, 1]), [], 3.0), plot.Episode(np.array([1, 1, 0]), [], -1.5)]
    figure = plot.draw_timeline(episodes, 2)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[0, 1, np.nan], [1, 1, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3.0", "-1.5"]


def test_command_draws_an_agent_of_the_zoo(tmp_path):
    train = "-m rl_zoo3.train --algo option_critic --env FourRooms-v0 -n 60 --eval-freq -1 -f logs"
    draw = "-m sb3_ext.algos.option_critic.plot -f logs --n-episodes 2 --output pictures"
    for command in (train, draw):
        subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["options-rooms.png", "options-timeline.png"]


def test_a_missing_agent_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        plot.main(["-f", str(tmp_path)])
    assert status.value.code not in (0, None)
    assert "Train an agent first" in capsys.readouterr().err


def test_model_card_shows_the_pictures(tmp_path, model):
    register()
    from huggingface_sb3.push_to_hub import _evaluate_agent
    from rl_zoo3.push_to_hub import generate_model_card, save_model_card

    _evaluate_agent(model, rooms(), 1, False, tmp_path)
    text, metadata = generate_model_card("option_critic", "OptionCritic", "someone", "FourRooms-v0", 1.0, 0.0, {}, {})
    save_model_card(tmp_path, text, metadata)
    card = ModelCard.load(tmp_path / "README.md")
    for name in ("options-timeline.png", "options-rooms.png"):
        assert f"]({name})" in card.content and (tmp_path / name).stat().st_size > 0
    assert card.data.eval_results[0].metric_value == "1.00 +/- 0.00"


def test_other_cards_stay_as_they_are(tmp_path):
    register()
    from huggingface_sb3.push_to_hub import _evaluate_agent
    from rl_zoo3.push_to_hub import generate_model_card, save_model_card

    env = make_vec_env("CartPole-v1")
    _evaluate_agent(PPO("MlpPolicy", env, n_steps=8, batch_size=8), env, 1, True, tmp_path)
    text, metadata = generate_model_card("ppo", "PPO", "someone", "CartPole-v1", 1.0, 0.0, {}, {})
    save_model_card(tmp_path, text, metadata)
    assert "Pictures" not in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("*.png"))
