"""What a SAC-Discrete expects from its actions, and what they are worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.results import Row

if TYPE_CHECKING:
    from sb3_ext import SACDiscrete

N_STEPS = 10_000
# Share of a return that may lie beyond the steps that were seen
UNSEEN = 0.01


def bias_of_values(model: "SACDiscrete", env: Any, n_steps: int = N_STEPS) -> Row:
    """
    Let the agent act as in training, with actions drawn.

    :param model: Trained
    :param env: Vectorized environment, seeded, whose rewards are those of the training
    :param n_steps: Steps, summed over the environments
    :return: ``value``, what the agent expects of the actions it takes, and ``soft_return``, the discounted rewards that follow
        and the entropy bonuses that the targets contain, both as means over the steps whose return is known but for a
        hundredth (NaN if there is none)
    """
    import torch as th
    from stable_baselines3.common.utils import obs_as_tensor

    th.manual_seed(0)
    policy, start = model.policy, int(model.action_space.start)
    policy.set_training_mode(False)
    ent_coef = model.ent_coef_tensor.item() if model.log_ent_coef is None else model.log_ent_coef.exp().item()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("values", "bonuses", "rewards", "terminated", "done")}
    obs = env.reset()
    for _ in range(n_steps // env.num_envs):
        with th.no_grad():
            batch = obs_as_tensor(obs, model.device)
            log_probs = policy.actor(batch).log_softmax(dim=1)
            actions = th.multinomial(log_probs.exp(), 1)
            values = th.stack(policy.critic(batch)).amin(dim=0).gather(1, actions).squeeze(1)
        obs, rewards, dones, infos = env.step(actions.squeeze(1).cpu().numpy() + start)
        columns["values"].append(values.cpu().numpy())
        columns["bonuses"].append(-ent_coef * (log_probs.exp() * log_probs).sum(dim=1).cpu().numpy())
        columns["rewards"].append(rewards)
        columns["done"].append(dones)
        columns["terminated"].append(dones & [not info.get("TimeLimit.truncated", False) for info in infos])
    env.close()
    arrays = {name: np.array(column) for name, column in columns.items()}
    values = arrays.pop("values")
    returns, unseen = soft_returns(**arrays, gamma=model.gamma, n_steps=model.n_steps)
    known = unseen <= UNSEEN
    means = {"value": values[known], "soft_return": returns[known]}
    return {name: round(float(of.mean()), 3) if len(of) else float("nan") for name, of in means.items()}


def soft_returns(
    rewards: np.ndarray, bonuses: np.ndarray, terminated: np.ndarray, done: np.ndarray, gamma: float, n_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    :param rewards: (steps, environments), as the other arrays
    :param bonuses: Entropy times its coefficient in the state in which the step was taken
    :param terminated: Whether the step ended its episode, other than by a time limit
    :param done: Whether the step ended its episode
    :param gamma: Discount factor
    :param n_steps: Of the targets, which have the bonus of every ``n_steps``-th state only
    :return: The discounted sum of what follows each action, without the bonus of its own state, as the critics learn it; and
        the discount of what was not seen, because of a time limit or the end of the arrays
    """
    returns, unseen = np.zeros(rewards.shape), np.zeros(rewards.shape)
    rewarded, beyond = np.zeros(rewards.shape[1]), np.ones(rewards.shape[1])
    bonuses_from = np.zeros((len(rewards) + n_steps, rewards.shape[1]))
    left = np.full(rewards.shape[1], np.inf)
    for step in reversed(range(len(rewards))):
        left = np.where(done[step], 1, left + 1)
        rewarded = rewards[step] + gamma * np.where(done[step], 0.0, rewarded)
        bonus = np.where(left > n_steps, gamma**n_steps * bonuses_from[step + n_steps], 0.0)
        bonuses_from[step] = bonuses[step] + bonus
        returns[step] = rewarded + bonus
        unseen[step] = beyond = gamma * np.where(done[step], ~terminated[step], beyond)
    return returns, unseen


def entropy_in_training(folder: Path) -> Row:
    """
    :param folder: Where the training logged to TensorBoard
    :return: ``entropy`` and ``entropy_deviation``: mean and standard deviation of ``train/entropy`` in the second half of the
        training, in nats
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars("train/entropy")
    late = [one.value for one in log if one.step > log[-1].step / 2]
    return {"entropy": round(float(np.mean(late)), 3), "entropy_deviation": round(float(np.std(late)), 3)}
