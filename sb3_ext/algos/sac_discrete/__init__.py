from sb3_ext.algos.sac_discrete.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ext.algos.sac_discrete.sac_discrete import SACDiscrete

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "SACDiscrete"]
