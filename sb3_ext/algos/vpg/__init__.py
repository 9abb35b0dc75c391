from sb3_ext.algos.vpg.vpg import VPG

__all__ = ["VPG"]
