"""Checks of a data set against the environment it is meant for; every value is checked once, on load."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_ext.offline.errors import (
    ActionRangeError,
    ActionTypeError,
    CorruptDatasetError,
    NonFiniteDataError,
    SpaceMismatchError,
)
from sb3_ext.offline.layout import Piece

# Rounding that an action may carry, as a fraction of the width of the action space: data saved in another precision, or
# scaled to [-1, 1] and back, end up to a few units in the last place outside.
ACTION_TOLERANCE = 1e-5


def check_spaces(name: str, data: tuple[spaces.Space, spaces.Space], env: tuple[spaces.Space, spaces.Space]) -> None:
    """
    :param name: of the data set, for the message
    :param data: observation and action space of the data set
    :param env: observation and action space of the environment, as the algorithm sees them
    :raises ActionTypeError: discrete actions for a continuous environment, or the reverse
    :raises SpaceMismatchError: any other difference but the floating-point precision and the place of image channels
    """
    for kind, other in (("Discrete", "Box"), ("Box", "Discrete")):
        space_class: type[spaces.Space] = getattr(spaces, kind)
        if isinstance(data[1], space_class) and not isinstance(env[1], space_class):
            names = {"Discrete": "discrete", "Box": "continuous"}
            raise ActionTypeError(
                f"The data set '{name}' has {names[kind]} actions, {data[1]}, but the environment's are "
                f"{names.get(type(env[1]).__name__, names[other])}, {env[1]}. Use data of the same environment."
            )
    for what, data_space, env_space in zip(("observation", "action"), data, env, strict=True):
        if not _same(data_space, env_space):
            raise SpaceMismatchError(
                f"The {what} space of the data set '{name}' differs from the environment's.\n"
                f"  data set:    {data_space}\n"
                f"  environment: {env_space}\n"
                "Use data of the same environment, with the same wrappers (frame_stack, env_wrapper)."
            )


def _same(data: spaces.Space, env: spaces.Space) -> bool:
    if isinstance(data, spaces.Dict) and isinstance(env, spaces.Dict):
        return data.spaces.keys() == env.spaces.keys() and all(_same(data[key], env[key]) for key in data.spaces)
    if isinstance(data, spaces.Box) and isinstance(env, spaces.Box):
        if is_image_space(data) and data.shape != env.shape and not is_image_space_channels_first(data):
            data = VecTransposeImage.transpose_space(data)
        both_float = np.issubdtype(data.dtype, np.floating) and np.issubdtype(env.dtype, np.floating)
        same_bounds = data.shape == env.shape and np.allclose(data.low, env.low) and np.allclose(data.high, env.high)
        return bool((both_float or data.dtype == env.dtype) and same_bounds)
    if isinstance(data, spaces.Discrete) and isinstance(env, spaces.Discrete):
        return bool(data.n == env.n and data.start == env.start)
    return data == env


class _Problem(NamedTuple):
    n_values: int
    first: str


class ValueChecker:
    """
    Collects what is wrong with the values while a data set is read, so that the message can count all of it.

    :param name: of the data set, for the message
    :param observation_space: of the data set
    :param action_space: of the environment
    """

    def __init__(self, name: str, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.name = name
        self.action_space = action_space
        subspaces = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self._sizes = {key: int(np.prod(space.shape or ())) for key, space in subspaces.items()}
        self._non_finite: dict[str, _Problem] = {}
        self._out_of_range = _Problem(0, "")

    def check_all(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """
        :param pieces: all steps of the data set
        :return: the same steps, each checked
        :raises NonFiniteDataError: after the last one, with the number of bad values per field and the place of the first
        :raises ActionRangeError: after the last one, with the number of bad values and the first of them
        """
        for piece in pieces:
            yield self.check(piece)
        self.finish()

    def check(self, piece: Piece) -> Piece:
        """
        :param piece: steps to check
        :return: the same steps; actions that are outside the action space by rounding only are clipped to it
        :raises CorruptDatasetError: when an array does not have the shape that the spaces of the data set say
        """
        self._check_shapes(piece)
        fields = {f"observations{f'[{key!r}]' if key else ''}": array for key, array in piece.observations.items()}
        for field, array in (*fields.items(), ("actions", piece.actions), ("rewards", piece.rewards)):
            # The rows are float32, in which large float64 values become infinite
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(array.astype(np.float32, copy=False)) if array.dtype.kind == "f" else None
            if bad is not None and bad.any():
                known = self._non_finite.get(field)
                first = known.first if known else self._where(piece, bad)
                self._non_finite[field] = _Problem((known.n_values if known else 0) + int(bad.sum()), first)
        return piece._replace(actions=self._check_actions(piece))

    def _check_shapes(self, piece: Piece) -> None:
        where = f"In episode {piece.episode} of '{self.name}'"
        if piece.observations.keys() != self._sizes.keys():
            raise CorruptDatasetError(
                f"{where}, the observations are {sorted(piece.observations)}, but their space has {sorted(self._sizes)}."
            )
        sizes = {"actions": (piece.actions, int(np.prod(self.action_space.shape or ())))}
        sizes.update({f"observations {key}".strip(): (array, self._sizes[key]) for key, array in piece.observations.items()})
        for name, (array, size) in sizes.items():
            if np.prod(array.shape[1:]) != size:
                raise CorruptDatasetError(
                    f"{where}, the {name} of a step have the shape {array.shape[1:]}, which does not fit their space."
                )
        for name, array in (("rewards", piece.rewards), ("terminations", piece.terminations)):
            if array.ndim != 1:
                raise CorruptDatasetError(
                    f"{where}, the {name} have the shape {array.shape}, but one number for each step is needed."
                )

    def _check_actions(self, piece: Piece) -> np.ndarray:
        if isinstance(self.action_space, spaces.Discrete):
            first, n = self.action_space.start, self.action_space.n
            bad = (piece.actions < first) | (piece.actions >= first + n) | (piece.actions != np.round(piece.actions))
            actions = piece.actions
        else:
            assert isinstance(self.action_space, spaces.Box)
            low, high = self.action_space.low, self.action_space.high
            actions = piece.actions.reshape(len(piece.actions), *low.shape)
            with np.errstate(invalid="ignore"):
                tolerance = np.nan_to_num(ACTION_TOLERANCE * (high - low), posinf=0.0)
            bad = (actions < low - tolerance) | (actions > high + tolerance)
            actions = np.clip(actions, low, high)
        if bad.any():
            value = piece.actions[np.argwhere(bad)[0][0]]
            first_bad = self._out_of_range.first or f"{value} at {self._where(piece, bad)}"
            self._out_of_range = _Problem(self._out_of_range.n_values + int(bad.sum()), first_bad)
        return actions

    @staticmethod
    def _where(piece: Piece, bad: np.ndarray) -> str:
        return f"episode {piece.episode}, step {piece.first_step + int(np.argwhere(bad)[0][0])}"

    def finish(self) -> None:
        """Raise what was found."""
        if self._non_finite:
            fields = "; ".join(
                f"{problem.n_values} in {field}, the first at {problem.first}" for field, problem in self._non_finite.items()
            )
            raise NonFiniteDataError(f"The data set '{self.name}' contains NaN or infinite values: {fields}.")
        if self._out_of_range.n_values:
            raise ActionRangeError(
                f"The data set '{self.name}' contains {self._out_of_range.n_values} action values outside "
                f"{self.action_space}; the first: {self._out_of_range.first}."
            )
