from sb3_ext.algos.option_critic.option_critic import OptionCritic
from sb3_ext.algos.option_critic.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "OptionCritic"]
