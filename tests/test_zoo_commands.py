"""Every command of the RL Zoo with our algorithms, in processes of their own, from a regular and from an editable install."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from installation import Installation

from sb3_ext.offline.errors import DatasetNotFoundError
from sb3_ext.zoo.registry import ALGORITHMS

BRIEFLY = ["-n", "60", "--eval-freq", "30", "--eval-episodes", "2"]


@pytest.fixture(scope="session")
def trained(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which BCQ has been trained by the zoo, into ``logs``."""
    folder = tmp_path_factory.mktemp("trained")
    installation.zoo("train", "--algo", "bcq", *BRIEFLY, cwd=folder)
    return folder


def test_train(installation, trained):
    run = trained / "logs/bcq/CartPole-v1_1"
    assert (run / "CartPole-v1.zip").is_file()
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [30, 60]
    saved = yaml.unsafe_load((run / "CartPole-v1/config.yml").read_text())
    assert saved["dataset"] == "sb3-ext/cartpole/replay-v0"


def test_enjoy(installation, trained):
    command = ["--algo", "bcq", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", "600"]
    assert "Mean reward: " in installation.zoo("enjoy", *command, cwd=trained).stdout


def test_record_video(installation, trained):
    command = ["--algo", "bcq", "--env", "CartPole-v1", "-f", "logs", "-n", "5", "-o", "videos"]
    installation.zoo("record_video", *command, cwd=trained)
    (video,) = trained.joinpath("videos").glob("*.mp4")
    assert video.stat().st_size > 0


@pytest.mark.parametrize("command", ["push_to_hub", "load_from_hub", "benchmark"])
def test_help(installation, tmp_path, command):
    text = installation.zoo(command, "--help", cwd=tmp_path).stdout
    assert command == "benchmark" or "bcq" in text


def test_console_script(installation, tmp_path):
    script = Path(sysconfig.get_path("scripts"), "rl_zoo3")
    installation.run(script, "train", "--algo", "bcq", "-n", "10", "--eval-freq", "-1", cwd=tmp_path)
    assert (tmp_path / "logs/bcq/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.parametrize("key", [algorithm.key for algorithm in ALGORITHMS])
def test_every_algorithm_trains(installation, tmp_path, key):
    env = "PixelPendulum-v1" if key == "sac_ae" else "CartPole-v1"
    installation.zoo("train", "--algo", key, "--env", env, "-n", "60", "--eval-freq", "-1", cwd=tmp_path)
    assert (tmp_path / f"logs/{key}/{env}_1/{env}.zip").is_file()


def test_vec_env_subproc(installation, tmp_path):
    command = ["--algo", "bcq", *BRIEFLY, "--vec-env", "subproc", "-params", "n_envs:2"]
    installation.zoo("train", *command, cwd=tmp_path)
    assert len(np.load(tmp_path / "logs/bcq/CartPole-v1_1/evaluations.npz")["results"]) > 0


def test_optimize_and_train_with_a_trial(installation, tmp_path):
    study = ["--storage", "study.log", "--study-name", "bcq"]
    tune = ["-optimize", "--n-trials", "3", "-n", "20", "--n-evaluations", "1", "--eval-episodes", "1", *study]
    installation.zoo("train", "--algo", "bcq", *tune, cwd=tmp_path)
    (report,) = tmp_path.glob("logs/bcq/report_*.csv")
    trials = pd.read_csv(report)
    assert list(trials["state"]) == ["COMPLETE"] * 3
    assert "params_action_threshold" in trials and "params_perturbation_scale" not in trials

    installation.zoo("train", "--algo", "bcq", "-n", "10", "--eval-freq", "-1", *study, "--trial-id", "1", cwd=tmp_path)
    # The run of the study itself is number 1
    used = yaml.unsafe_load((tmp_path / "logs/bcq/CartPole-v1_2/CartPole-v1/config.yml").read_text())
    assert used["gamma"] == pytest.approx(1 - trials["params_one_minus_gamma"][1])
    assert used["batch_size"] == 2 ** trials["params_batch_size_pow"][1]


def test_continuing_a_saved_agent(wheel_installation, tmp_path):
    wheel_installation.zoo("train", "--algo", "bcq", "-n", "10", "--eval-freq", "-1", cwd=tmp_path)
    saved = "logs/bcq/CartPole-v1_1/CartPole-v1.zip"
    wheel_installation.zoo("train", "--algo", "bcq", "-n", "10", "--eval-freq", "-1", "-i", saved, cwd=tmp_path)
    assert (tmp_path / saved.replace("v1_1", "v1_2")).is_file()
    command = ["train", "--algo", "bcq", "-n", "10", "-i", saved, "-params", "dataset:'nobody/made-this-v0'"]
    process = wheel_installation.zoo(*command, cwd=tmp_path, check=False)
    assert process.returncode == DatasetNotFoundError.exit_status
    assert "sb3-ext: error: " in process.stderr and "Traceback" not in process.stderr


def test_plots(wheel_installation, tmp_path):
    wheel_installation.zoo("train", "--algo", "bcq", *BRIEFLY, cwd=tmp_path)
    script = Path(sysconfig.get_path("scripts"), "rl_zoo3")
    arguments = ["-a", "bcq", "-e", "CartPole-v1", "-f", "logs"]
    wheel_installation.run(script, "plot_train", *arguments, cwd=tmp_path)
    wheel_installation.run(script, "all_plots", *arguments, "-o", "gathered", "--no-million", cwd=tmp_path)
    assert (tmp_path / "gathered.pkl").is_file()


def test_module_form_without_the_hook(installation, tmp_path):
    command = ["--algo", "bcq", *BRIEFLY, "--vec-env", "subproc", "-params", "n_envs:2"]
    installation.run("-m", "sb3_ext.zoo", "train", *command, cwd=tmp_path, SB3_EXT_AUTOLOAD="0")
    assert (tmp_path / "logs/bcq/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.parametrize("arguments", [[], ["no_such_command"], ["--help"]])
def test_module_form_tells_its_usage(wheel_installation, tmp_path, arguments):
    process = wheel_installation.run("-m", "sb3_ext.zoo", *arguments, cwd=tmp_path, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("usage: python -m sb3_ext.zoo {train,")


CONFIGURATION = """
import argparse, json, sys
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS

def describe(algo, **kwargs):
    manager = ExperimentManager(argparse.Namespace(), algo, "CartPole-v1", "logs", **kwargs)
    return [ALGOS[algo].__module__, manager.config]

print(json.dumps({" ".join([algo, *options]): describe(algo, **dict(zip(["config"], options)))
                  for algo, *options in json.loads(sys.argv[1])}))
"""


def configurations(installation: Installation, folder: Path, *choices: list[str], **env: str) -> dict[str, list[str]]:
    """Where the class and the hyperparameters of each (algorithm, [``--conf-file``]) come from."""
    return json.loads(installation.run("-c", CONFIGURATION, json.dumps(choices), cwd=folder, **env).stdout)


def test_upstream_algorithms_keep_class_and_hyperparameters(installation, tmp_path):
    choices = [["ppo"], ["dqn"], ["trpo"]]
    upstream = configurations(installation, tmp_path, *choices, SB3_EXT_AUTOLOAD="0")
    assert configurations(installation, tmp_path, *choices) == upstream
    assert all("sb3_ext" not in module + config for module, config in upstream.values())


def test_own_hyperparameters_only_without_conf_file(installation, tmp_path):
    found = configurations(installation, tmp_path, ["bcq"], ["bcq", "mine.yml"], ["ppo", "missing.yml"])
    module, config = found["bcq"]
    assert module.startswith("sb3_ext.") and Path(config).is_file() and Path(config).name == "bcq.yml"
    assert found["bcq mine.yml"][1] == "mine.yml"
    assert found["ppo missing.yml"][1] == "missing.yml"


def test_a_clone_of_the_repository_as_working_folder(wheel_installation, project_copy):
    # `python -m` finds the clone's sb3_ext before the installed one, without the folders that are mapped into it
    ((_, config),) = configurations(wheel_installation, project_copy, ["bcq"]).values()
    assert Path(config).samefile(project_copy / "hyperparams/bcq.yml")
    help_text = wheel_installation.run("-m", "sb3_ext.hub.push", "--help", cwd=project_copy).stdout
    assert "--dry-run" in help_text


@pytest.mark.parametrize("tuning", [[], ["-optimize", "--n-trials", "2", "--storage", "study.log", "--study-name", "bcq"]])
def test_unusable_data_end_in_a_message_and_a_status(wheel_installation, tmp_path, tuning):
    command = ["--algo", "bcq", "--env", "MountainCar-v0", "-n", "10", *tuning]
    process = wheel_installation.zoo("train", *command, cwd=tmp_path, check=False)
    assert process.returncode == DatasetNotFoundError.exit_status
    assert "sb3-ext: error: " in process.stderr and "Traceback" not in process.stderr
    if tuning:
        import optuna

        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
        (trial,) = optuna.load_study(study_name="bcq", storage=storage).trials
        assert trial.state == optuna.trial.TrialState.FAIL
