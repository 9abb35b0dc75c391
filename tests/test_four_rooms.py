"""Four Rooms against its definition."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_ext.envs import FourRooms
from sb3_ext.envs.four_rooms import MOVES

DOORS = [(3, 6), (6, 2), (7, 9), (10, 6)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("observation", ["one_hot", "coordinates"])
def test_it_passes_the_checkers(observation):
    env = gymnasium.make("FourRooms-v0", observation=observation, render_mode="rgb_array")
    gymnasium_check_env(env.unwrapped)
    sb3_check_env(env.unwrapped)


def test_layout():
    env = FourRooms()
    assert env.floor.shape == (13, 13) and len(env.cells) == 104
    assert not env.floor[[0, -1]].any() and not env.floor[:, [0, -1]].any()
    # Each door has walls on two sides, and without the doors there are four rooms
    floor = env.floor.copy()
    for row, column in DOORS:
        assert floor[row, column]
        floor[row, column] = False
    rooms = []
    unseen = {tuple(cell) for cell in np.argwhere(floor)}
    while unseen:
        room = [unseen.pop()]
        for row, column in room:
            beside = {(row + down, column + right) for down, right in MOVES} & unseen
            unseen -= beside
            room += beside
        rooms.append(len(room))
    assert sorted(rooms) == [20, 25, 25, 30]


def place(env, row, column):
    env.reset(seed=0)
    env.position = env._numbers[row, column]


@pytest.mark.parametrize(
    ("action", "expected"), [(0, (4, 8)), (1, (6, 8)), (2, (5, 7)), (3, (5, 9))], ids=["up", "down", "left", "right"]
)
def test_moves(action, expected):
    env = FourRooms(slip_probability=0.0)
    place(env, 5, 8)
    obs, reward, terminated, truncated, _ = env.step(action)
    assert tuple(env.cells[obs.argmax()]) == expected
    assert (reward, terminated, truncated) == (0.0, False, False)


def test_walls_stop_the_agent():
    env = FourRooms(slip_probability=0.0)
    place(env, 1, 1)
    for action in (0, 2):
        obs, *_ = env.step(action)
        assert tuple(env.cells[obs.argmax()]) == (1, 1)


def test_slips_go_to_cells_beside():
    env = FourRooms()
    counts: dict[tuple[int, ...], int] = {}
    env.reset(seed=0)
    for _ in range(9000):
        env.position = env._numbers[5, 1]  # walls on the left and below
        obs, *_ = env.step(2)
        cell = tuple(int(index) for index in env.cells[obs.argmax()])
        counts[cell] = counts.get(cell, 0) + 1
    # Into the wall with 2/3, up or right with 1/6 each
    assert set(counts) == {(5, 1), (4, 1), (5, 2)}
    assert [counts[cell] / 9000 for cell in ((5, 1), (4, 1), (5, 2))] == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.02)


def test_goal_pays_and_ends_the_episode():
    env = FourRooms(slip_probability=0.0, goal=(1, 3))
    place(env, 1, 2)
    _, reward, terminated, truncated, _ = env.step(3)
    assert (reward, terminated, truncated) == (1.0, True, False)


def test_episodes_start_anywhere_but_at_the_goal_and_end_after_1000_steps():
    env = gymnasium.make("FourRooms-v0", goal=(1, 1))
    starts = {int(env.reset(seed=0 if index == 0 else None)[0].argmax()) for index in range(2000)}
    assert starts == set(range(1, 104))
    env.unwrapped.slip_probability = 0.0
    env.reset()
    place(env.unwrapped, 11, 11)
    lengths = [env.step(1)[3] for _ in range(1000)]
    assert lengths == [False] * 999 + [True]


def _shortest_times(env):
    """:return: expected steps to the goal under the best policy from each cell, and its actions, by value iteration"""
    number = {tuple(place): index for index, place in enumerate(env.cells.tolist())}
    moved = np.array([[number.get((row + down, column + right), -1) for down, right in MOVES] for row, column in env.cells])
    beside = moved >= 0
    moved = np.where(beside, moved, np.arange(len(moved))[:, None])
    steps = np.zeros(len(moved))
    for _ in range(500):
        slipped = np.where(beside, steps[moved], 0).sum(1) / beside.sum(1)
        of_actions = 1 + (1 - env.slip_probability) * steps[moved] + env.slip_probability * slipped[:, None]
        of_actions[env.goal] = 0
        steps = of_actions.min(1)
    return steps, of_actions.argmin(1)


def test_the_best_policy_takes_as_long_as_value_iteration_says():
    env = FourRooms()
    steps, actions = _shortest_times(env)
    starts = np.delete(steps, env.goal)
    # The figure of docs/algos/option_critic.md
    assert starts.mean() == pytest.approx(12.06, abs=0.005)

    env.reset(seed=0)
    taken = []
    for _ in range(2000):
        env.reset()
        expected, ended, n_steps = steps[env.position], False, 0
        while not ended:
            *_, ended, _, _ = env.step(actions[env.position])
            n_steps += 1
        taken.append(n_steps - expected)
    assert abs(np.mean(taken)) < 3 * np.std(taken) / np.sqrt(len(taken))


def test_goal_moves_once():
    env = FourRooms(goal_moves_after=3)
    goals = []
    for index in range(6):
        env.reset(seed=5 if index == 0 else None)
        goals.append(tuple(int(number) for number in env.cells[env.goal]))
    assert goals[:3] == [(7, 9)] * 3 and len(set(goals[3:])) == 1
    assert goals[3][0] > 7 and goals[3][1] > 6
    env = FourRooms(goal_moves_after=1, next_goal=(2, 2))
    env.reset(seed=0)
    env.reset()
    assert tuple(env.cells[env.goal]) == (2, 2)


def test_coordinates():
    env = FourRooms(observation="coordinates")
    np.testing.assert_allclose(env.observe(env._numbers[3, 6]), [3 / 12, 6 / 12])


def test_picture():
    env = FourRooms(render_mode="rgb_array")
    place(env, 2, 3)
    image = env.render()
    assert image.shape == (13 * 32, 13 * 32, 3) and image.dtype == np.uint8
    colours = {
        name: tuple(image[row * 32 + 16, column * 32 + 16])
        for name, (row, column) in {"agent": (2, 3), "goal": (7, 9), "wall": (0, 0), "floor": (1, 1)}.items()
    }
    assert len(set(colours.values())) == 4
    assert FourRooms().render() is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"observation": "pixels"},
        {"goal": (0, 0)},
        {"next_goal": (6, 6)},
        {"slip_probability": 2.0},
        {"goal_moves_after": 0},
        {"render_mode": "human"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match="must be"):
        FourRooms(**arguments)
