"""Environments. Importing this module registers them with gymnasium; the zoo knows them by itself."""

import gymnasium

from sb3_ext.envs.four_rooms import FourRooms
from sb3_ext.envs.pixels import PIXEL_ENVIRONMENTS, ActionRepeat, PixelObservation

__all__ = ["ActionRepeat", "FourRooms", "PixelObservation"]

if "FourRooms-v0" not in gymnasium.registry:
    gymnasium.register("FourRooms-v0", entry_point="sb3_ext.envs:FourRooms", max_episode_steps=1000)
    for name, kwargs in PIXEL_ENVIRONMENTS.items():
        gymnasium.register(name, entry_point="sb3_ext.envs.pixels:make_pixels", kwargs=kwargs)
