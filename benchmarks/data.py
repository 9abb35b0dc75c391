"""Hyperparameters of the zoo, and offline data as the peers and the controls want them."""

import ast
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gymnasium import spaces

from benchmarks.results import PROJECT, Row


def additional_conf_file(algo: str, env: str) -> str | None:
    """
    :param algo: Key in the zoo
    :param env: Environment id
    :return: The file in this folder that has settings for the environment, from the root of the repository; None if the zoo
        needs no other file than it finds by itself
    """
    path = PROJECT / "benchmarks" / f"{algo}.yml"
    has_env = path.is_file() and env in yaml.safe_load(path.read_text())
    return path.relative_to(PROJECT).as_posix() if has_env else None


def settings(algo: str, env: str, params: list[str]) -> Row:
    """
    :param algo: Key in the zoo
    :param env: Environment id
    :param params: ``key:value``, which overrule the file
    :return: The hyperparameters with which the zoo trains
    """
    own = PROJECT / (additional_conf_file(algo, env) or f"hyperparams/{algo}.yml")
    path = own if own.is_file() else files("rl_zoo3") / "hyperparams" / f"{algo}.yml"
    tables = yaml.safe_load(Path(str(path)).read_text())
    overruled = dict(param.split(":", 1) for param in params)
    return {**tables.get(env, tables.get("default", {})), **{key: literal(text) for key, text in overruled.items()}}


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def arrays(dataset: str, observation_space: spaces.Space, action_space: spaces.Space) -> tuple[dict[str, np.ndarray], Row]:
    """
    :param dataset: Minari id or path
    :param observation_space: Of the environment
    :param action_space: Of the environment
    :return: One row per transition as :func:`benchmarks.workers.load` gives them (Discrete actions from 0, Box actions in
        [-1, 1]), and a description of the data
    """
    import torch as th

    from sb3_ext.offline import load_dataset
    from sb3_ext.offline.sources import open_source

    data = load_dataset(dataset, observation_space, action_space)
    batch: Any = data.take(th.arange(len(data)))
    lengths = open_source(dataset).lengths
    ends = np.cumsum(lengths[lengths > 0])
    last = np.zeros(len(data), dtype=bool)
    last[ends - 1] = True
    terminals, rewards = batch.dones.numpy().reshape(-1) == 1, batch.rewards.numpy().reshape(-1)
    actions = batch.actions.numpy()
    if isinstance(action_space, spaces.Box):
        actions = (2 * (actions - action_space.low) / (action_space.high - action_space.low) - 1).astype(np.float32)
    else:
        actions = actions.reshape(-1) - int(getattr(action_space, "start", 0))
    returns = np.add.reduceat(rewards.astype(float), ends - lengths[lengths > 0])
    description = {
        "id": dataset,
        "transitions": len(data),
        "episodes": len(returns),
        "mean_return": round(float(returns.mean()), 3),
        "std_return": round(float(returns.std()), 3),
        "ref_min_score": data.metadata.get("ref_min_score"),
        "ref_max_score": data.metadata.get("ref_max_score"),
    }
    table = {
        "observations": batch.observations.numpy(),
        "next_observations": batch.next_observations.numpy(),
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
        "timeouts": last & ~terminals,
    }
    return table, description


def spec(algo: str, hyperparameters: Row, observation_space: spaces.Box, action_space: spaces.Space, **more: Any) -> Row:
    """
    :param algo: Key in the zoo
    :param hyperparameters: See :func:`settings`
    :param observation_space: Of the environment
    :param action_space: Of the environment
    :param more: Further keys
    :return: What a contender is built from, see :mod:`benchmarks.workers`
    """
    discrete = isinstance(action_space, spaces.Discrete)
    n_actions = int(action_space.n) if isinstance(action_space, spaces.Discrete) else int(np.prod(action_space.shape or ()))
    return {
        "algo": algo,
        "observation_shape": list(observation_space.shape),
        "n_actions": n_actions,
        "discrete": discrete,
        "image": len(observation_space.shape) == 3,
        "batch_size": int(hyperparameters.get("batch_size", 100)),
        "learning_rate": float(hyperparameters.get("learning_rate", 1e-3)),
        "ours": {},
        "threads": 1,
        **more,
    }
