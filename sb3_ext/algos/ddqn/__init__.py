from sb3_ext.algos.ddqn.ddqn import DDQN
from sb3_ext.algos.ddqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DDQN", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
