from sb3_ext.algos.trpo.trpo import TRPO

__all__ = ["TRPO"]
