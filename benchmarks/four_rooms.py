"""Four Rooms with a goal that moves: Option-Critic, the same without options, and SARSA."""

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from benchmarks import data, results
from benchmarks.results import Row

PAGE, N_EPISODES, GOAL_MOVES_AFTER = "option_critic", 2000, 1000
# Episodes whose mean lengths are in the table
WINDOWS = ((900, 1000), (1000, 1020), (1020, 1100), (1100, 1300), (1900, 2000))


def make_env() -> Any:
    import sb3_ext.envs  # noqa: F401

    return gymnasium.make("FourRooms-v0", goal_moves_after=GOAL_MOVES_AFTER)


def option_critic(n_options: int, seed: int, n_episodes: int) -> list[int]:
    """
    Option-Critic with the settings of the zoo. With a single option it is a flat actor-critic: there is nothing to choose.

    :param n_options: Number of options
    :param seed: Of everything
    :param n_episodes: Number of episodes
    :return: Their lengths
    """
    import torch as th
    from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
    from stable_baselines3.common.monitor import Monitor

    from sb3_ext import OptionCritic

    th.set_num_threads(1)
    settings = data.settings("option_critic", "FourRooms-v0", [])
    # Python in a yml, as in the zoo
    settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"dict": dict, "th": th})
    n_timesteps = int(settings.pop("n_timesteps"))
    env = Monitor(make_env())
    model = OptionCritic(env=env, seed=seed, device="cpu", **{**settings, "n_options": n_options})
    # Exploration falls over the zoo's number of steps; the end is a number of episodes
    while len(env.get_episode_lengths()) < n_episodes:
        stop = StopTrainingOnMaxEpisodes(n_episodes - len(env.get_episode_lengths()))
        model.learn(n_timesteps, callback=stop, reset_num_timesteps=False)
        n_timesteps = 10_000
    return env.get_episode_lengths()[:n_episodes]


def sarsa(seed: int, n_episodes: int, learning_rate: float = 0.25, gamma: float = 0.99, epsilon: float = 0.05) -> list[int]:
    """
    Tabular SARSA with epsilon-greedy exploration, whose step size and probability were chosen on other seeds than those of the
    table.

    :param seed: Of everything
    :param n_episodes: Number of episodes
    :param learning_rate: Step towards the target
    :param gamma: Discount factor
    :param epsilon: Probability of a random action
    :return: The lengths of the episodes
    """
    env, rng, lengths = make_env(), np.random.default_rng(seed), []
    values = np.zeros((env.observation_space.shape[0], env.action_space.n))

    def act(state: int) -> int:
        best = np.flatnonzero(values[state] == values[state].max())
        return int(rng.integers(values.shape[1]) if rng.random() < epsilon else rng.choice(best))

    for episode in range(n_episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        state, length, is_over = int(obs.argmax()), 0, False
        action = act(state)
        while not is_over:
            obs, reward, terminated, truncated, _ = env.step(action)
            next_state, length = int(obs.argmax()), length + 1
            next_action = act(next_state)
            target = reward + gamma * (not terminated) * values[next_state, next_action]
            values[state, action] += learning_rate * (target - values[state, action])
            state, action, is_over = next_state, next_action, terminated or truncated
        lengths.append(length)
    return lengths


#: By label: seed, number of episodes -> lengths of the episodes
AGENTS: dict[str, Callable[[int, int], list[int]]] = {
    "4 options": lambda seed, n: option_critic(4, seed, n),
    "8 options": lambda seed, n: option_critic(8, seed, n),
    "1 option (flat actor-critic)": lambda seed, n: option_critic(1, seed, n),
    "SARSA": sarsa,
}


def run(label: str, seed: int, n_episodes: int) -> Row:
    """
    :param label: A key of ``AGENTS``
    :param seed: Of everything
    :param n_episodes: Number of episodes
    :return: The row of results
    """
    begin = time.time()
    lengths = AGENTS[label](seed, n_episodes)
    return {
        "kind": "four rooms",
        "label": label,
        "seed": seed,
        "lengths": [int(length) for length in lengths],
        "wall_time_s": round(time.time() - begin, 1),
        "command": results.own_command(),
        **results.stamp(),
    }


def run_missing(labels: list[str], seeds: range, n_episodes: int) -> None:
    """Add the rows that are not there yet."""
    path = results.path_of(PAGE)
    there = {(row["label"], row["seed"]) for row in results.read(path) if row["kind"] == "four rooms"}
    for label in labels:
        for seed in seeds:
            if (label, seed) not in there:
                row = run(label, seed, n_episodes)
                results.append(path, row)
                print(f"{label}, seed {seed}: {summary(row['lengths'])} in {row['wall_time_s']:.0f} s", flush=True)


def summary(lengths: list[int]) -> str:
    """:return: mean lengths in the windows that have been reached"""
    return ", ".join(f"{first}-{last}: {np.mean(lengths[first:last]):.1f}" for first, last in WINDOWS if last <= len(lengths))
