"""Publishes a trained agent on the Hugging Face Hub: ``python -m sb3_ext.hub.push --help``."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3.import_envs  # noqa: F401
import torch as th
import yaml
from gymnasium import Wrapper
from huggingface_sb3 import EnvironmentName, ModelName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_class_by_name, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext.common.offline_algorithm import OfflineAlgorithm
from sb3_ext.offline.errors import AgentError, DatasetError
from sb3_ext.zoo import pictures, register
from sb3_ext.zoo.agents import add_choice_of_agent, find_agent, load_agent, training_arguments

from .card import CardContents, Picture, render
from .data import DatasetStatistics, statistics_of
from .errors import HubError, SafeFormatError
from .evaluation import Evaluation, evaluate, learning_curve, record, write_gif, write_video
from .publishing import add_repository, check_token, files_in, upload
from .safe import save_safe


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """
    :param argv: The arguments of the command (None: those of the process)
    :return: The checked arguments
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_ext.hub.push", description=__doc__)
    parser.add_argument("--algo", help="RL algorithm of the agent", required=True, choices=list(ALGOS))
    parser.add_argument("--env", help="environment ID", type=EnvironmentName, required=True)
    add_choice_of_agent(parser)
    parser.add_argument(
        "--gym-packages", help="packages that register environments (default: those of the training)", nargs="+"
    )
    parser.add_argument("-orga", "--organization", help="user or organization on the Hub (not needed for --dry-run)")
    add_repository(parser, name="algo-env", message="Trained agent")
    parser.add_argument("--dry-run", help="write what would be pushed into this folder, and push nothing", type=Path)
    parser.add_argument("--eval-seeds", help="number of seeds to evaluate with", type=int, default=5)
    parser.add_argument("--eval-episodes", help="episodes with each seed", type=int, default=10)
    parser.add_argument("--seed", help="first seed of the evaluation", type=int, default=0)
    parser.add_argument("--deterministic", help="act deterministically", action="store_true")
    parser.add_argument("--stochastic", help="sample actions", action="store_true")
    parser.add_argument("--video-steps", help="steps of the replay video, 0: none", type=int, default=500)
    parser.add_argument("--num-threads", help="number of threads for PyTorch", type=int, default=1)
    args = parser.parse_args(argv)
    if "/" in (args.repo_name or ""):
        parser.error(f"-name is the name without the organization, which is -orga: not {args.repo_name}")
    if args.dry_run is None and not args.organization:
        parser.error("-orga is needed, or --dry-run")
    if args.deterministic and args.stochastic:
        parser.error("--deterministic and --stochastic exclude each other")
    if args.eval_seeds < 1 or args.eval_episodes < 1:
        parser.error("--eval-seeds and --eval-episodes must be at least 1")
    return args


def repo_id_of(args: argparse.Namespace) -> str:
    """
    :param args: Of the command
    :return: ``organization/name``
    """
    return f"{args.organization or 'your-name'}/{args.repo_name or ModelName(args.algo, args.env)}"


def package(args: argparse.Namespace, folder: Path) -> None:
    """
    Write everything that a repository of an agent has.

    :param args: Of the command
    :param folder: An empty folder
    :raises DatasetError: if there is no such agent, or its data are no longer there
    """
    model_path, log_path = find_agent(args)
    params_path = Path(log_path, args.env)
    train_args = training_arguments(params_path)
    if not train_args:
        raise AgentError(f"{params_path / 'args.yml'} is not there: without it the card cannot say how the agent was trained.")
    gym_packages = args.gym_packages or train_args.get("gym_packages") or []
    import_packages(gym_packages, args.env)
    hyperparams, _ = get_saved_hyperparams(str(params_path), test_mode=True)
    model, env, env_kwargs = load_agent(args, model_path, log_path, more_env_kwargs={"render_mode": "rgb_array"})
    del env_kwargs["render_mode"]

    copy_agent(args, Path(model_path), params_path, Path(log_path), env_kwargs, folder)
    restore_arguments(model, model_path)
    save_safe(model, folder, env, args.env.gym_id, env_kwargs, wrappers_of(hyperparams))
    evaluation = evaluate(model, env, range(args.seed, args.seed + args.eval_seeds), args.eval_episodes, acts(args))
    write_results(evaluation, folder)
    shown = draw(model, env, evaluation.deterministic, Path(log_path), folder)
    has_video = args.video_steps > 0 and film(model, env, args.video_steps, evaluation.deterministic, folder)
    contents = CardContents(
        algo=args.algo,
        algorithm=type(model),
        env_id=args.env.gym_id,
        repo_id=repo_id_of(args),
        evaluation=evaluation,
        hyperparams=hyperparams,
        train_args=train_args,
        env_kwargs=env_kwargs,
        dataset=dataset_of(hyperparams) if isinstance(model, OfflineAlgorithm) else None,
        pictures=shown,
        has_video=has_video,
        n_trained=model.num_timesteps if stage_of(args) else None,
        stage=stage_of(args),
        gym_packages=gym_packages,
        license=args.license,
    )
    (folder / "README.md").write_text(render(contents), encoding="utf-8")
    env.close()


def import_packages(names: Iterable[str], env: EnvironmentName) -> None:
    """
    :param names: Of packages that register environments
    :param env: The agent's environment
    :raises AgentError: if one cannot be imported, or none registers the environment
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise AgentError(f"{name}, which the agent was trained with, cannot be imported: {error}") from error
    if env.gym_id not in gym.registry:
        raise AgentError(f"{env} is not in the gymnasium registry: name the package that registers it with --gym-packages.")


def stage_of(args: argparse.Namespace) -> str:
    """
    :param args: Of the command
    :return: Which of the models that the training saved the agent is; nothing if it is the last one
    """
    if args.load_best:
        return "the best of the evaluations on the way"
    return "a checkpoint" if args.load_checkpoint is not None or args.load_last_checkpoint else ""


def restore_arguments(model: BaseAlgorithm, model_path: str) -> None:
    """
    :param model: Loaded for playing, without memory and learning rate; gets those of its training back, for it to go on
    :param model_path: The file that it was loaded from
    """
    data, _, _ = load_from_zip_file(model_path, device="cpu")
    assert data is not None
    for name in ("learning_rate", "clip_range", "seed", "buffer_size", "optimize_memory_usage"):
        if name in data:
            setattr(model, name, data[name])


def dataset_of(hyperparams: dict[str, Any]) -> DatasetStatistics | None:
    """
    :param hyperparams: Of an offline agent, as the zoo saved them
    :return: Statistics of its data; None for a pickled replay buffer, which is not opened for a card
    :raises DatasetError: if the data are no longer there
    """
    source = str(hyperparams["dataset"])
    return None if source.endswith(".pkl") else statistics_of(source)


def acts(args: argparse.Namespace) -> bool:
    """
    :param args: Of the command
    :return: Whether the agent acts deterministically: as the zoo decides, unless it is told
    """
    samples_by_default = ExperimentManager.is_atari(args.env.gym_id) or ExperimentManager.is_minigrid(args.env.gym_id)
    return args.deterministic or not (args.stochastic or samples_by_default)


def wrappers_of(hyperparams: dict[str, Any]) -> list[tuple[type[Wrapper], dict[str, Any]]]:
    """
    :param hyperparams: As the zoo saved them
    :return: The wrappers of each single environment with their arguments, the innermost first
    """
    named = hyperparams.get("env_wrapper") or []
    wrappers = []
    for entry in named if isinstance(named, list) else [named]:
        ((name, kwargs),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
        wrappers.append((get_class_by_name(name), kwargs or {}))
    return wrappers


def copy_agent(
    args: argparse.Namespace, model_path: Path, params_path: Path, log_path: Path, env_kwargs: dict[str, Any], folder: Path
) -> None:
    """
    What ``rl_zoo3.load_from_hub`` wants to find.

    :param args: Of the command
    :param model_path: Saved model
    :param params_path: Folder of its settings
    :param log_path: Folder of its experiment
    :param env_kwargs: Arguments of the environment
    :param folder: Where to
    """
    shutil.copy(model_path, folder / ModelName(args.algo, args.env).filename)
    for name in ("args.yml", "config.yml"):
        shutil.copy(params_path / name, folder / name)
    (folder / "env_kwargs.yml").write_text(yaml.safe_dump(env_kwargs))
    if (params_path / "vecnormalize.pkl").is_file():
        shutil.copy(params_path / "vecnormalize.pkl", folder / "vec_normalize.pkl")
    with zipfile.ZipFile(folder / "train_eval_metrics.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([*log_path.glob("evaluations.npz"), *log_path.glob("*.csv")]):
            archive.write(path, path.name)


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """
    :param evaluation: Of the agent
    :param folder: For ``results.json``, with the names that huggingface_sb3 gives them, and each seed
    """
    results = {
        "mean_reward": evaluation.mean,
        "std_reward": evaluation.std,
        "is_deterministic": evaluation.deterministic,
        "n_eval_episodes": evaluation.n_episodes * evaluation.n_seeds,
        "seeds": [vars(row) for row in evaluation.rows],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))


def draw(model: BaseAlgorithm, env: VecEnv, deterministic: bool, log_path: Path, folder: Path) -> list[Picture]:
    """
    :param model: The agent
    :param env: Its environment
    :param deterministic: Whether it acts deterministically
    :param log_path: Folder of its experiment
    :param folder: For the pictures
    :return: What was drawn: its learning curve, and what its algorithm has to show
    """
    shown = []
    curve = learning_curve(log_path)
    if curve is not None:
        curve.savefig(folder / "learning-curve.png", dpi=100)
        shown.append(Picture("learning-curve.png", "Learning curve"))
    before = set(folder.glob("*.png"))
    pictures.draw(model, env, deterministic, folder)
    new = sorted(path.name for path in set(folder.glob("*.png")) - before)
    return [*shown, *(Picture(name, name.removesuffix(".png").replace("-", " ").capitalize()) for name in new)]


def film(model: BaseAlgorithm, env: VecEnv, n_steps: int, deterministic: bool, folder: Path) -> bool:
    """
    :param model: The agent
    :param env: Its environment
    :param n_steps: Steps to play
    :param deterministic: Whether it acts deterministically
    :param folder: For ``replay.mp4``, which the Hub shows, and ``replay.gif``
    :return: Whether there is a video; without one, the card does
    """
    try:
        frames = record(model, env, n_steps, deterministic)
    # Each renderer has errors of its own
    except Exception as error:
        print(f"sb3-ext: warning: no replay video, because the environment does not render: {error}", file=sys.stderr)
        return False
    fps: Any = env.metadata.get("render_fps") or 30
    write_video(frames, fps, folder / "replay.mp4")
    write_gif(frames, fps, folder / "replay.gif")
    return True


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: The arguments of the command (None: those of the process)
    """
    # The start-up hook may be switched off
    register()
    args = parse(argv)
    th.set_num_threads(args.num_threads)
    try:
        if args.dry_run is not None:
            write_folder(args)
        else:
            check_token(args.token, repo_id_of(args))
            with tempfile.TemporaryDirectory() as folder:
                package(args, Path(folder))
                files = files_in(Path(folder))
                url = upload(files, repo_id_of(args), args.commit_message, private=args.private, token=args.token)
            print(f"Published: {url}")
    except (DatasetError, HubError, SafeFormatError) as error:
        print(f"sb3-ext: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def write_folder(args: argparse.Namespace) -> None:
    """
    :param args: Of the command, whose ``dry_run`` names the folder
    :raises HubError: if there is something in it
    """
    target: Path = args.dry_run
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HubError(f"{target} is there and not empty: remove it, or choose another folder for --dry-run.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        complete = Path(folder, "agent")
        complete.mkdir()
        package(args, complete)
        complete.replace(target)
    print(f"This would be pushed to {repo_id_of(args)}: {target}")


if __name__ == "__main__":
    main()
