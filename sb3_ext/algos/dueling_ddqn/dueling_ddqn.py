from __future__ import annotations

from typing import ClassVar

from stable_baselines3.common.policies import BasePolicy

from sb3_ext.algos.ddqn import DDQN
from sb3_ext.algos.dueling_ddqn.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class DuelingDDQN(DDQN):
    """
    Dueling Double Deep Q-Network: :class:`DDQN` with a network that has separate streams for the value of a state and the
    advantages of its actions.

    Paper: Wang et al. 2016, "Dueling Network Architectures for Deep Reinforcement Learning"
    (https://arxiv.org/abs/1511.06581). The parameters are those of :class:`DDQN`; the streams are settings of the policy, see
    :class:`sb3_ext.algos.dueling_ddqn.policies.DuelingDDQNPolicy`. The documentation lists where we differ.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
