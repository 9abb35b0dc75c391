"""Model cards: what a reader of an agent's page wants to know."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from platform import python_version
from typing import Any

import gymnasium as gym
import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from torch import nn

from sb3_ext.common.offline_algorithm import OfflineAlgorithm
from sb3_ext.zoo.registry import ALGORITHMS

from .data import DatasetStatistics
from .evaluation import Evaluation

_LIBRARIES = ("sb3-ext", "stable-baselines3", "rl-zoo3", "gymnasium", "torch", "numpy")
# By what an environment's entry point or id contains
_EXTRAS = {"mujoco": "mujoco", "minatar": "minatar", "ale_py": "atari", "dm_control/": "dm_control"}


@dataclass(frozen=True)
class Picture:
    """
    :param file: Name in the repository
    :param text: For those who do not see it
    """

    file: str
    text: str


@dataclass(frozen=True)
class CardContents:
    """
    What a model card is made of.

    :param algo: Key in the zoo
    :param algorithm: Its class
    :param env_id: Gymnasium id
    :param repo_id: ``organization/name``
    :param evaluation: Of the agent
    :param hyperparams: As the zoo saved them
    :param train_args: Arguments of ``rl_zoo3.train``, as the zoo saved them
    :param env_kwargs: Arguments of the environment
    :param dataset: Of an offline agent
    :param pictures: In the order in which they are shown
    :param has_video: Whether there is a ``replay.mp4``
    :param n_trained: Length of the training so far, if it is not the whole of it
    :param stage: Which of the models of the training it is, if not the last one
    :param gym_packages: Packages to import, which register the environment
    :param license: Of the agent, an identifier of the Hub
    """

    algo: str
    algorithm: type
    env_id: str
    repo_id: str
    evaluation: Evaluation
    hyperparams: Mapping[str, Any]
    train_args: Mapping[str, Any]
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dataset: DatasetStatistics | None = None
    pictures: Sequence[Picture] = ()
    has_video: bool = False
    n_trained: int | None = None
    stage: str = ""
    gym_packages: Sequence[str] = ()
    license: str = "mit"


def render(contents: CardContents) -> str:
    """
    :param contents: Of the card
    :return: The card, Markdown with metadata that the Hub indexes
    """
    algo, algorithm, env_id = contents.algo, contents.algorithm, contents.env_id
    summary, paper = describe(algorithm)
    organization, name = contents.repo_id.split("/")
    default_name = f"{algo}-{env_id}".replace("/", "-")
    is_offline = issubclass(algorithm, OfflineAlgorithm)
    hyperparams = dict(contents.hyperparams)
    if _has_own_length(contents.train_args):
        # The zoo saves that of the yml
        hyperparams["n_timesteps"] = contents.train_args["n_timesteps"]
    return render_template(
        "card.md",
        card_data=metadata(contents).to_yaml(),
        class_name=algorithm.__name__,
        algo=algo,
        env_id=env_id,
        summary=summary,
        paper=paper,
        is_ours=algo in {row.key for row in ALGORITHMS},
        evaluation=contents.evaluation,
        repo_id=contents.repo_id,
        organization=organization,
        name_option=f"-name {name} " if name != default_name else "",
        model_file=f"{default_name}.zip",
        extras=extras(env_id),
        pictures=contents.pictures,
        has_video=contents.has_video,
        training_command=training_command(contents.train_args, contents.hyperparams),
        tuning=tuning(contents.train_args),
        dataset=contents.dataset,
        seed=contents.train_args["seed"],
        n_timesteps=f"{int(contents.n_trained or hyperparams['n_timesteps']):,}",
        stage=contents.stage,
        gym_packages=contents.gym_packages,
        unit="gradient updates" if is_offline else "steps",
        hyperparams=_yaml(hyperparams),
        env_kwargs=_yaml(contents.env_kwargs) if contents.env_kwargs else "",
        versions={"Python": python_version(), **{library: version(library) for library in _LIBRARIES}},
    )


def render_template(name: str, **values: Any) -> str:
    """
    :param name: Of a template in this package
    :param values: Of its variables
    :return: The text
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(files(__package__).joinpath(name).read_text(encoding="utf-8")).render(**values)


def metadata(contents: CardContents) -> ModelCardData:
    """
    :param contents: Of the card
    :return: What the Hub indexes, with the agent's result
    """
    evaluation = contents.evaluation
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=contents.env_id,
        dataset_name=contents.env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=f"{evaluation.mean:.2f} +/- {evaluation.std:.2f}",
        verified=False,
    )
    tags = [contents.env_id, contents.algo, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3"]
    tags += ["sb3-ext", "offline-reinforcement-learning"] if issubclass(contents.algorithm, OfflineAlgorithm) else ["sb3-ext"]
    return ModelCardData(
        library_name="stable-baselines3",
        license=contents.license,
        tags=tags,
        model_name=contents.algorithm.__name__,
        eval_results=[result],
    )


def describe(algorithm: type) -> tuple[str, str | None]:
    """
    :param algorithm: Class of an algorithm
    :return: What its docstring says first, and the first link to a paper in it, if there is one
    """
    text = inspect.getdoc(algorithm) or algorithm.__name__
    summary = " ".join(text.split("\n\n")[0].split())
    links = re.findall(r"https?://[^\s)>`,]+", text)
    papers = [link for link in links if "arxiv" in link] or links
    return re.sub(r"``?([^`]+)``?", r"`\1`", summary), papers[0].rstrip(".") if papers else None


def training_command(train_args: Mapping[str, Any], hyperparams: Mapping[str, Any]) -> str:
    """
    :param train_args: Arguments of ``rl_zoo3.train``, as the zoo saved them
    :param hyperparams: As the zoo saved them
    :return: The command that trains this agent again. Who reads it does not have the study that hyperparameters may come from.
    """
    command = ["python", "-m", "rl_zoo3.train", "--algo", train_args["algo"], "--env", str(train_args["env"])]
    command += ["--seed", str(train_args["seed"])]
    if train_args.get("conf_file"):
        command += ["--conf-file", str(train_args["conf_file"])]
    for option, name in (("-i", "trained_agent"), ("--gym-packages", "gym_packages")):
        given = train_args.get(name)
        if given:
            command += [option, *([given] if isinstance(given, str) else given)]
    if _has_own_length(train_args):
        command += ["-n", str(int(train_args["n_timesteps"]))]
    params = train_args.get("hyperparams") or {}
    if train_args.get("trial_id") is not None:
        params = {**{key: value for key, value in hyperparams.items() if key != "n_timesteps"}, **params}
    for option, given in (("-params", params), ("--env-kwargs", train_args.get("env_kwargs"))):
        if given:
            command += [option, *(f"{key}:{_expression(value)}" for key, value in given.items())]
    if train_args.get("vec_env", "dummy") != "dummy":
        command += ["--vec-env", train_args["vec_env"]]
    return shlex.join(command)


def _has_own_length(train_args: Mapping[str, Any]) -> bool:
    """:return: whether the length of the training was given with ``-n``"""
    return (train_args.get("n_timesteps") or -1) > 0


def tuning(train_args: Mapping[str, Any]) -> str:
    """
    :param train_args: Arguments of ``rl_zoo3.train``, as the zoo saved them
    :return: Which trial of which study the hyperparameters come from; nothing if they do not
    """
    if train_args.get("trial_id") is None:
        return ""
    return f"The hyperparameters are those of trial {train_args['trial_id']} of the study `{train_args.get('study_name')}`."


def extras(env_id: str) -> str:
    """
    :param env_id: Gymnasium id
    :return: What pip has to be told beside the package's name, for the environment
    """
    described = ""
    while spec := gym.registry.get(env_id):
        described += str(spec.entry_point)
        # What a pixel environment renders
        env_id = spec.kwargs.get("env_id", "")
    found = [extra for part, extra in _EXTRAS.items() if part in described + env_id]
    return f"[{','.join(found)}]" if found else ""


def _expression(value: Any) -> str:
    """:return: Python that the zoo evaluates to the value"""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_expression(each)}' for key, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_expression, value))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_expression(each)}, ' for each in value)})"
    if isinstance(value, type):
        is_layer = getattr(nn, value.__name__, None) is value
        return f"nn.{value.__name__}" if is_layer else f"__import__({value.__module__!r}, fromlist=['_']).{value.__qualname__}"
    return repr(value)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_plain(values), sort_keys=False, width=1000).rstrip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, (int, float, bool)) else str(value)
