from sb3_ext.algos.bcq.bcq import BCQ
from sb3_ext.algos.bcq.policies import ContinuousBCQPolicy, DiscreteBCQPolicy

__all__ = ["BCQ", "ContinuousBCQPolicy", "DiscreteBCQPolicy"]
