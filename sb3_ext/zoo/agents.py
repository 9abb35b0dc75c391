"""Agents that the zoo has trained, for commands that work with them as ``rl_zoo3.enjoy`` does."""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from rl_zoo3.utils import ALGOS, create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext.offline.errors import AgentError


def add_choice_of_agent(parser: Any) -> None:
    """
    :param parser: Gets the arguments that choose among the trained agents of an algorithm and an environment
    """
    parser.add_argument("-f", "--folder", help="log folder", default="logs")
    parser.add_argument("--exp-id", help="experiment ID (default: 0: latest, -1: no exp folder)", default=0, type=int)
    parser.add_argument("--load-best", help="load the best model instead of the last one", action="store_true")
    parser.add_argument("--load-checkpoint", help="load the checkpoint of this number of timesteps", type=int)
    parser.add_argument("--load-last-checkpoint", help="load the last checkpoint", action="store_true")
    parser.add_argument("--device", help="PyTorch device", default="auto")


def find_agent(args: argparse.Namespace) -> tuple[str, str]:
    """
    :param args: Of the command, with ``algo`` and ``env``
    :return: The saved model, and the folder of its experiment
    :raises AgentError: if there is none
    """
    which = args.load_best, args.load_checkpoint, args.load_last_checkpoint
    first_error: Exception | None = None
    # Tuning leaves experiments without an agent
    for exp_id in [args.exp_id] if args.exp_id != 0 else _experiments(args) or [0]:
        try:
            _, model_path, log_path = get_model_path(exp_id, args.folder, args.algo, args.env, *which)
        except (AssertionError, ValueError) as error:
            first_error = first_error or error
        else:
            print(f"Loading {model_path}")
            return model_path, log_path
    raise AgentError(f"{first_error}. {_what_to_do(args)}") from first_error


def _experiments(args: argparse.Namespace) -> list[int]:
    """:return: ids of those with this algorithm and environment, the latest first"""
    folders = Path(args.folder, args.algo).glob(f"{args.env}_*")
    ids = [folder.name.removeprefix(f"{args.env}_") for folder in folders if folder.is_dir()]
    return sorted((int(number) for number in ids if number.isdecimal() and int(number) > 0), reverse=True)


def _what_to_do(args: argparse.Namespace) -> str:
    folder = Path(args.folder, args.algo)
    experiments = [folder] if args.exp_id < 0 else list(folder.glob(f"{args.env}_{args.exp_id or '*'}"))
    models = sorted(path.as_posix() for experiment in experiments for path in experiment.glob("*.zip"))
    if models:
        return f"There is: {', '.join(models)}. Best models are saved with --eval-freq, checkpoints with --save-freq."
    return f"Train an agent first: python -m rl_zoo3.train --algo {args.algo} --env {args.env.gym_id} -f {args.folder}"


def training_arguments(params_path: str | Path) -> dict[str, Any]:
    """
    :param params_path: Where the zoo saved the settings of an agent
    :return: The arguments of ``rl_zoo3.train``; nothing if they are not there
    """
    path = Path(params_path, "args.yml")
    # The zoo writes its own classes into it
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader)) if path.is_file() else {}


def load_agent(
    args: argparse.Namespace,
    model_path: str,
    log_path: str,
    n_envs: int = 1,
    vec_env_cls: type[VecEnv] = DummyVecEnv,
    more_env_kwargs: dict[str, Any] | None = None,
) -> tuple[BaseAlgorithm, VecEnv, dict[str, Any]]:
    """
    Load the agent and make its environments as ``rl_zoo3.enjoy`` does.

    :param args: of the command
    :param model_path: saved model
    :param log_path: folder of its experiment
    :param n_envs: number of environments
    :param vec_env_cls: their kind
    :param more_env_kwargs: keyword arguments for each, beside those of the training
    :return: the agent, its environments, and the keyword arguments with which each was made
    """
    params_path = os.path.join(log_path, args.env)
    hyperparams, stats_path = get_saved_hyperparams(params_path, test_mode=True)
    env_kwargs = hyperparams.pop("env_kwargs", {})
    env_kwargs = {**(training_arguments(params_path).get("env_kwargs") or env_kwargs), **(more_env_kwargs or {})}
    her = "HerReplayBuffer" in hyperparams.get("replay_buffer_class", "")
    env = create_test_env(
        args.env.gym_id,
        n_envs=n_envs,
        stats_path=stats_path,
        seed=args.seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs=env_kwargs,
        vec_env_cls=vec_env_cls,
    )
    kwargs: dict[str, Any] = {"env": env} if her else {}
    if issubclass(ALGOS[args.algo], OffPolicyAlgorithm):
        # No memory for transitions
        kwargs.update(buffer_size=1, optimize_memory_usage=False)
    # Schedules are pickled functions, which do not load in every Python version, and nothing is trained
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    model = ALGOS[args.algo].load(model_path, custom_objects=custom_objects, device=args.device, seed=args.seed, **kwargs)
    return model, env, env_kwargs
