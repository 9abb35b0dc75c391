"""What a trained Option-Critic does with its options."""

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from benchmarks.results import Row

if TYPE_CHECKING:
    from sb3_ext import OptionCritic

N_STEPS = 10_000


def use_of_options(model: "OptionCritic", env: Any, n_steps: int = N_STEPS, epsilon: float = 0.0) -> Row:
    """
    Let the agent act as in training, with terminations and actions drawn.

    :param model: Trained
    :param env: Vectorized environment, seeded
    :param n_steps: Steps, summed over the environments
    :param epsilon: Probability that an option is drawn at random where one is chosen
    :return: See :meth:`OptionStatistics.summary`
    """
    from stable_baselines3.common.utils import obs_as_tensor

    from sb3_ext.algos.option_critic.statistics import OptionStatistics

    policy, n_envs = model.policy, env.num_envs
    np.random.seed(0)
    statistics = OptionStatistics(model.n_options, n_envs, n_episodes=n_steps, window=n_steps)
    obs, options, is_start = env.reset(), np.zeros(n_envs, np.int64), np.ones(n_envs, bool)
    for _ in range(n_steps // n_envs):
        outputs = policy.outputs(obs_as_tensor(obs, model.device))
        step = policy.decide(outputs, options, is_start, deterministic=False, epsilon=epsilon)
        options = step.options
        statistics.add(options, step.is_chosen, step.terminations, is_start)
        actions = policy.to_env(step.actions)
        if isinstance(model.action_space, spaces.Box):
            actions = policy.unscale_action(actions.reshape(-1, *model.action_space.shape))
        obs, _, is_start, _ = env.step(actions)
    env.close()
    return {name: round(value, 3) for name, value in statistics.summary().items()}
