from sb3_ext.algos.dueling_ddqn.dueling_ddqn import DuelingDDQN
from sb3_ext.algos.dueling_ddqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "DuelingDDQN", "MlpPolicy", "MultiInputPolicy"]
