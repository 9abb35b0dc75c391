"""The gridworld on which options are traditionally shown."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LAYOUT = """
#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############
"""

#: Rows and columns of up, down, left, right
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))

# Of rendered cells, in pixels
_CELL_SIZE = 32
_WALL, _FLOOR, _GOAL, _AGENT = (60, 60, 60), (235, 235, 235), (60, 160, 75), (40, 80, 180)


class FourRooms(gym.Env):
    """
    Four rooms joined by doorways, 104 cells (Sutton, Precup, Singh 1999, "Between MDPs and semi-MDPs").

    Actions are up, down, left and right. With a probability of 1/3 the agent goes to a cell drawn from those beside it
    instead. A move into a wall has no effect. The reward is 1 at the goal, which ends the episode, and 0 elsewhere. Episodes
    start in any cell but the goal. ``gymnasium.make("FourRooms-v0")`` ends episodes after 1000 steps.

    :param observation: ``one_hot``: one number for each cell, (104,), or ``coordinates``: row and column, from 0 to 1, (2,)
    :param goal: Row and column of the goal, counted from 0 with the walls
    :param slip_probability: Instead of 1/3, in [0, 1]
    :param goal_moves_after: Number of episodes after which the goal moves, once (None: never)
    :param next_goal: Row and column to which it moves (None: a cell of the lower right room, drawn with the seed of the
        environment)
    :param render_mode: ``rgb_array`` or None
    :raises ValueError: if an argument is none of these
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        observation: str = "one_hot",
        goal: tuple[int, int] = (7, 9),
        slip_probability: float = 1 / 3,
        goal_moves_after: int | None = None,
        next_goal: tuple[int, int] | None = None,
        render_mode: str | None = None,
    ) -> None:
        #: Where there is no wall, (13, 13)
        self.floor = np.array([[cell == " " for cell in row] for row in LAYOUT.strip().splitlines()])
        #: Row and column of each cell, (104, 2)
        self.cells = np.argwhere(self.floor)
        self._numbers = {(int(row), int(column)): number for number, (row, column) in enumerate(self.cells)}
        self._neighbours = [
            [self._numbers[place] for place in self._places_beside(number) if place in self._numbers]
            for number in range(len(self.cells))
        ]
        if observation not in ("one_hot", "coordinates"):
            raise ValueError(f'observation must be "one_hot" or "coordinates", but got {observation!r}.')
        if not 0 <= slip_probability <= 1:
            raise ValueError(f"slip_probability must be in [0, 1], but got {slip_probability}.")
        if goal_moves_after is not None and goal_moves_after < 1:
            raise ValueError(f"goal_moves_after must be at least 1, but got {goal_moves_after}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be "rgb_array" or None, but got {render_mode!r}.')
        self.observation = observation
        self.slip_probability = slip_probability
        self.goal_moves_after = goal_moves_after
        self.render_mode = render_mode
        self.goal = self._number(goal)
        self._next_goal = None if next_goal is None else self._number(next_goal)
        self._n_episodes = 0
        self.position = self.goal
        self.action_space = spaces.Discrete(len(MOVES))
        size = len(self.cells) if observation == "one_hot" else 2
        self.observation_space = spaces.Box(0.0, 1.0, (size,), np.float32)

    def _number(self, place: tuple[int, int]) -> int:
        row, column = place
        if (row, column) not in self._numbers:
            raise ValueError(f"A goal must be the row and column of a cell without a wall, but got {place}.")
        return self._numbers[row, column]

    def _places_beside(self, number: int) -> list[tuple[int, int]]:
        row, column = self.cells[number]
        return [(int(row) + down, int(column) + right) for down, right in MOVES]

    def observe(self, number: int) -> np.ndarray:
        """
        :param number: Of a cell, from 0 to 103
        :return: What the agent observes there
        """
        if self.observation == "coordinates":
            return (self.cells[number] / (np.array(self.floor.shape) - 1)).astype(np.float32)
        return np.eye(1, len(self.cells), number, dtype=np.float32)[0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self._n_episodes == self.goal_moves_after:
            self._move_goal()
        self._n_episodes += 1
        others = [number for number in range(len(self.cells)) if number != self.goal]
        self.position = others[self.np_random.integers(len(others))]
        return self.observe(self.position), {}

    def _move_goal(self) -> None:
        if self._next_goal is None:
            lower_right = [number for number, (row, column) in enumerate(self.cells) if row > 7 and column > 6]
            self._next_goal = lower_right[self.np_random.integers(len(lower_right))]
        self.goal = self._next_goal

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.np_random.random() < self.slip_probability:
            neighbours = self._neighbours[self.position]
            self.position = neighbours[self.np_random.integers(len(neighbours))]
        else:
            self.position = self._numbers.get(self._places_beside(self.position)[int(action)], self.position)
        is_at_goal = self.position == self.goal
        return self.observe(self.position), float(is_at_goal), is_at_goal, False, {}

    def render(self) -> np.ndarray | None:
        """
        :return: The rooms, the goal and the agent, (height, width, 3), in ``rgb_array`` mode
        """
        if self.render_mode is None:
            return None
        image = np.where(self.floor[..., None], _FLOOR, _WALL).astype(np.uint8).repeat(_CELL_SIZE, 0).repeat(_CELL_SIZE, 1)
        for number, colour, margin in ((self.goal, _GOAL, 2), (self.position, _AGENT, 8)):
            top, left = self.cells[number] * _CELL_SIZE
            image[top + margin : top + _CELL_SIZE - margin, left + margin : left + _CELL_SIZE - margin] = colour
        return image
