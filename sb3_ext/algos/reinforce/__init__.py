from sb3_ext.algos.reinforce.reinforce import REINFORCE

__all__ = ["REINFORCE"]
