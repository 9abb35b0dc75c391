"""Environments. Importing this module registers them with gymnasium; the zoo knows them by itself."""

import gymnasium

from sb3_ext.envs.four_rooms import FourRooms

__all__ = ["FourRooms"]

if "FourRooms-v0" not in gymnasium.registry:
    gymnasium.register("FourRooms-v0", entry_point="sb3_ext.envs:FourRooms", max_episode_steps=1000)
