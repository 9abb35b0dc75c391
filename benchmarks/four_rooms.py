"""Four Rooms with a goal that moves: Option-Critic, the same without options (a flat actor-critic), and SARSA."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from benchmarks import data, results
from benchmarks.results import Row

if TYPE_CHECKING:
    from sb3_ext import OptionCritic

PAGE, N_EPISODES, GOAL_MOVES_AFTER = "option_critic", 2000, 1000
# Episodes whose mean lengths are in the table
WINDOWS = ((900, 1000), (1000, 1020), (1020, 1100), (1100, 1300), (1900, 2000))
TRANSITION = [("state", int), ("action", int), ("reward", float), ("next", int), ("goes_on", float)]
# Defaults of Option-Critic
GAMMA, LEARNING_STARTS, MAX_GRAD_NORM = 0.99, 100, 10.0


def make_env() -> Any:
    import sb3_ext.envs  # noqa: F401

    return gymnasium.make("FourRooms-v0", goal_moves_after=GOAL_MOVES_AFTER)


def option_critic(n_options: int, seed: int, n_episodes: int) -> list[int]:
    """
    Option-Critic with the settings of the zoo.

    :param n_options: Number of options
    :param seed: Of everything
    :param n_episodes: Number of episodes
    :return: Their lengths
    """
    import torch as th
    from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
    from stable_baselines3.common.monitor import Monitor

    th.set_num_threads(1)
    env, settings = Monitor(make_env()), zoo_settings()
    n_timesteps = int(settings["n_timesteps"])
    model = make_option_critic(env, n_options, seed, settings)
    # Exploration falls over the zoo's number of steps; the end is a number of episodes
    while len(env.get_episode_lengths()) < n_episodes:
        stop = StopTrainingOnMaxEpisodes(n_episodes - len(env.get_episode_lengths()))
        model.learn(n_timesteps, callback=stop, reset_num_timesteps=False)
        n_timesteps = 10_000
    return env.get_episode_lengths()[:n_episodes]


def make_option_critic(env: Any, n_options: int, seed: int, settings: dict[str, Any]) -> "OptionCritic":
    """:return: with the settings of the zoo, but for the number of options"""
    from sb3_ext import OptionCritic

    arguments = {key: value for key, value in settings.items() if key != "n_timesteps"}
    return OptionCritic(env=env, seed=seed, device="cpu", **{**arguments, "n_options": n_options})


def zoo_settings() -> dict[str, Any]:
    """:return: those of Option-Critic in Four Rooms"""
    import torch as th

    settings = data.settings("option_critic", "FourRooms-v0", [])
    # Python in a yml, as in the zoo
    settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"dict": dict, "th": th})
    return settings


def actor_critic(seed: int, n_episodes: int) -> list[int]:
    """
    Option-Critic with a single option: nothing to choose, and nothing to end. The same updates with the same settings as for
    several options, but written for tables.

    :param seed: Of everything
    :param n_episodes: Number of episodes
    :return: The lengths of the episodes
    """
    settings = zoo_settings()
    env, rng, lengths, n_steps = make_env(), np.random.default_rng(seed), [], 0
    values = np.zeros(env.observation_space.shape[0])
    preferences = np.zeros((len(values), int(env.action_space.n)))
    replay = np.zeros(settings["buffer_size"], TRANSITION)
    while len(lengths) < n_episodes:
        obs, _ = env.reset(seed=seed if not lengths else None)
        state, length, is_over = int(obs.argmax()), 0, False
        while not is_over:
            probabilities = softmax(preferences[state], settings)
            action = int(rng.choice(len(probabilities), p=probabilities))
            obs, reward, terminated, truncated, _ = env.step(action)
            latest = n_steps % len(replay)
            replay[latest] = state, action, reward, obs.argmax(), not terminated
            n_steps, length, is_over = n_steps + 1, length + 1, terminated or truncated
            if n_steps > LEARNING_STARTS:
                batch = replay[rng.integers(min(n_steps, len(replay)), size=settings["batch_size"])]
                update_tables(values, preferences, replay[latest], batch, settings)
            state = int(obs.argmax())
        lengths.append(length)
    return lengths


def update_tables(
    values: np.ndarray, preferences: np.ndarray, latest: Any, batch: np.ndarray, settings: dict[str, Any]
) -> None:
    """
    Steps of the values on replayed transitions and of the policy on the latest one, both in place.

    :param values: (n_states,)
    :param preferences: (n_states, n_actions)
    :param latest: Of type ``TRANSITION``
    :param batch: Of type ``TRANSITION``, (batch,)
    :param settings: Of Option-Critic
    """
    state = latest["state"]
    probabilities = softmax(preferences[state], settings)
    advantage = latest["reward"] + GAMMA * latest["goes_on"] * values[latest["next"]] - values[state]
    errors = batch["reward"] + GAMMA * batch["goes_on"] * values[batch["next"]] - values[batch["state"]]
    logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    of_entropy = -probabilities * (logs - probabilities @ logs)
    of_log_prob = (np.arange(len(probabilities)) == latest["action"]) - probabilities
    of_policy = (advantage * of_log_prob + settings["ent_coef"] * of_entropy) / temperature_of(settings)
    of_values = np.bincount(batch["state"], errors, len(values)) / len(batch)
    preferences[state] += settings["actor_learning_rate"] * clipped(of_policy)
    values += settings["learning_rate"] * clipped(of_values)


def clipped(gradient: np.ndarray) -> np.ndarray:
    """:return: with a norm of at most ``MAX_GRAD_NORM``"""
    return gradient * min(1.0, MAX_GRAD_NORM / (np.linalg.norm(gradient) + 1e-6))


def softmax(preferences: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """:return: probabilities of the actions"""
    exponentials = np.exp((preferences - preferences.max()) / temperature_of(settings))
    return exponentials / exponentials.sum()


def temperature_of(settings: dict[str, Any]) -> float:
    """:return: by which preferences are divided"""
    return settings["policy_kwargs"]["temperature"]


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
    "actor-critic": actor_critic,
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
