from sb3_ext.algos.npg.npg import NPG

__all__ = ["NPG"]
