"""The studies that ship with the package, and the hyperparameters that come from them."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from torch import nn

from sb3_ext.zoo import register

STUDIES = sorted(Path(str(files("sb3_ext.optuna_studies"))).glob("*.log"))


def load(path: Path) -> tuple[str, str, optuna.Study]:
    """:return: algorithm, environment, and the study that the journal holds"""
    algo, env = path.stem.split("-", 1)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return algo, env, optuna.load_study(study_name=env, storage=storage)


def test_there_are_studies():
    assert STUDIES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_holds_nothing_of_the_machine_that_made_it(path):
    assert load(path)[2].user_attrs["command"].startswith("python -m rl_zoo3.train ")
    assert not re.search(r"[\s\"=]/\w", path.read_text())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_hyperparameters_are_those_of_one_of_the_best_trials(path):
    register()
    algo, env, study = load(path)
    given = yaml.safe_load(files("sb3_ext.hyperparams").joinpath(f"{algo}.yml").read_text())[env]
    given["policy_kwargs"] = eval(given["policy_kwargs"], {"dict": dict, "nn": nn})
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    best = sorted(complete, key=lambda trial: trial.value, reverse=True)[:5]
    assert any(is_given(HYPERPARAMS_CONVERTER[algo](trial.params), given) for trial in best)


def is_given(sampled: dict[str, Any], given: dict[str, Any]) -> bool:
    """:return: whether what was sampled is what is given, where fractions may be rounded to two digits"""
    return all(
        given.get(name) == (pytest.approx(value, rel=0.05) if isinstance(value, float) else value)
        for name, value in sampled.items()
    )
