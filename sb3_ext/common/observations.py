"""Observations are arrays or tensors, or dictionaries of them."""

from collections.abc import Callable
from typing import Any


def map_observations(function: Callable[..., Any], *observations: Any) -> Any:
    """
    :param function: Of one array or tensor from each of the observations
    :param observations: Batches of observations of the same space
    :return: What the function makes of them, for a Dict space as a dictionary with the same keys
    """
    if isinstance(observations[0], dict):
        return {key: function(*(each[key] for each in observations)) for key in observations[0]}
    return function(*observations)
