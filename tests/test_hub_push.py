"""Agents and data sets go to a Hub on localhost and come back, through its real client and through the zoo's commands."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from hub_http import DROP_REQUEST
from hub_server import HubServer
from huggingface_hub.errors import HTTPError
from huggingface_sb3 import EnvironmentName
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ext.hub import load_safe
from sb3_ext.hub.card import describe, extras, training_command, tuning
from sb3_ext.hub.errors import HubError
from sb3_ext.hub.evaluation import MAX_GIF_BYTES, evaluate, write_gif, write_video
from sb3_ext.hub.publishing import explained
from sb3_ext.zoo import register
from sb3_ext.zoo.registry import ALGORITHMS

register()
from sb3_ext.zoo.agents import find_agent, load_agent  # noqa: E402

SHIPPED = "sb3-ext/cartpole/replay-v0"
BRIEFLY = ["--eval-seeds", "2", "--eval-episodes", "2", "--video-steps", "30"]
AGENTS = {
    "vpg": ["-n", "512", "--eval-freq", "256", "--eval-episodes", "2", "-params", "n_envs:1", "normalize:True"],
    "bcq": ["-n", "30", "--eval-freq", "-1"],
}


def run(*command: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **env}
    process = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    if check and process.returncode != 0:
        pytest.fail(f"{' '.join(command)}: {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the agents of ``AGENTS`` were trained by the zoo."""
    folder = tmp_path_factory.mktemp("trained")
    for algo, options in AGENTS.items():
        run("-m", "rl_zoo3.train", "--algo", algo, "--env", "CartPole-v1", "--seed", "7", *options, cwd=folder)
    return folder


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(lfs_above=1000) as server:
        yield server
    assert server.unexpected == []


def push(logs: Path, server: HubServer, home: Path, *options: str, algo: str = "vpg", check: bool = True, token=None):
    command = ["-m", "sb3_ext.hub.push", "--algo", algo, "--env", "CartPole-v1", "-f", "logs", "-orga", "team", *BRIEFLY]
    return run(*command, *options, cwd=logs, check=check, **server.environment(home, token))


def actions_of(logs: Path, algo: str = "vpg") -> list[int]:
    """What the trained agent does, loaded by the zoo."""
    code = f"""
import numpy as np
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
import gymnasium as gym
model = ALGOS["{algo}"].load("logs/{algo}/CartPole-v1_1/CartPole-v1.zip", device="cpu")
obs = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
if "{algo}" == "vpg":
    path = "logs/vpg/CartPole-v1_1/CartPole-v1/vecnormalize.pkl"
    obs = VecNormalize.load(path, DummyVecEnv([lambda: gym.make("CartPole-v1")])).normalize_obs(obs)
print(model.predict(obs, deterministic=True)[0].tolist())
"""
    return json.loads(run("-c", code, cwd=logs).stdout.splitlines()[-1])


LOAD = """
import pickle, cloudpickle, numpy as np
from sb3_ext.hub import load
class Refuse:
    def __init__(self, *args, **kwargs):
        raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = cloudpickle.load = cloudpickle.loads = Refuse
model, saved_env = load("team/{algo}-CartPole-v1", device="cpu")
env = saved_env.make(seed=0)
obs = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
if hasattr(env, "normalize_obs"):
    obs = env.normalize_obs(obs)
env.reset()
print(model.predict(obs, deterministic=True)[0].tolist())
"""


@pytest.mark.parametrize("algo", AGENTS)
def test_an_agent_goes_up_and_comes_back(logs, server, tmp_path, algo):
    pushed = push(logs, server, tmp_path, "-m", "First", algo=algo)
    repo = f"team/{algo}-CartPole-v1"
    assert f"{server.url}/{repo}" in pushed.stdout
    files = server.files(repo)
    expected = {"README.md", "agent.json", f"{algo}-CartPole-v1.zip", "args.yml", "config.yml", "results.json", "replay.mp4"}
    assert expected <= set(files)
    assert ("vec_normalize.pkl" in files) == (algo == "vpg")
    assert server.history(repo)[0].title == "First"

    # To go on training, with what it was trained with
    arguments = json.loads(files["agent.json"])["arguments"]
    trained, _, _ = load_from_zip_file(logs / f"logs/{algo}/CartPole-v1_1/CartPole-v1.zip")
    assert arguments["seed"] == trained["seed"] and arguments["learning_rate"] != 0.0

    # The token is nowhere but in the requests to the Hub
    assert server.token not in pushed.stdout + pushed.stderr
    assert not any(server.token.encode() in content for content in files.values())

    loaded = run("-c", LOAD.format(algo=algo), cwd=tmp_path, **server.environment(tmp_path / "other"))
    assert json.loads(loaded.stdout.splitlines()[-1]) == actions_of(logs, algo)

    # The same evaluation, from what came back
    results = json.loads(files["results.json"])
    assert len(results["seeds"]) == 2 and results["n_eval_episodes"] == 4
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == (
        f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    )
    again = LOAD.format(algo=algo) + (
        "from sb3_ext.hub.evaluation import evaluate\nprint(evaluate(model, env, [0, 1], 2, True).mean)"
    )
    evaluated = run("-c", again, cwd=tmp_path, **server.environment(tmp_path / "other"))
    assert float(evaluated.stdout.splitlines()[-1]) == pytest.approx(results["mean_reward"])


def test_the_card_is_true(logs, server, tmp_path):
    """Its commands run, and what it links to is there."""
    push(logs, server, tmp_path, algo="bcq")
    files = server.files("team/bcq-CartPole-v1")
    card = files["README.md"].decode()
    assert SHIPPED in card and "247" in card  # episodes of the data set
    assert all(link in files or link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", card))

    environment = server.environment(tmp_path / "home")
    python = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert python is not None
    run("-c", python[1], cwd=tmp_path, **environment)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL) for line in block.splitlines()]
    assert [re.sub(".*(pip install|rl_zoo3[.][a-z_]+).*", r"\1", command) for command in commands] == [
        "pip install",
        "rl_zoo3.load_from_hub",
        "rl_zoo3.enjoy",
        "rl_zoo3.train",
    ]
    for command in commands[1:]:
        variables, _, arguments = command.partition("python ")
        more = ["--no-render", "-n", "10"] if "enjoy" in command else []
        consent = dict(variable.split("=") for variable in variables.split())
        run(*shlex.split(arguments), *more, cwd=tmp_path, **environment, **consent)
    # Trained again by the card's command, the agent is the same
    first, second = logs / "logs/bcq/CartPole-v1_1/CartPole-v1.zip", tmp_path / "logs/bcq/CartPole-v1_2/CartPole-v1.zip"
    compare = (
        "import sys, torch as th; from sb3_ext import BCQ\n"
        "first, second = (BCQ.load(path, device='cpu').policy.state_dict() for path in sys.argv[1:])\n"
        "assert all(th.equal(first[name], second[name]) for name in first)"
    )
    run("-c", compare, str(first), str(second), cwd=tmp_path)


def test_the_zoos_own_commands(logs, server, tmp_path):
    environment = server.environment(tmp_path / "home")
    of_agent = ["--algo", "vpg", "--env", "CartPole-v1", "-f", "logs"]
    to = ["-orga", "team", "-m", "By the zoo", "-n", "30"]
    run("-m", "rl_zoo3.push_to_hub", *of_agent, *to, cwd=logs, **environment)
    files = server.files("team/vpg-CartPole-v1")
    assert {"README.md", "vpg-CartPole-v1.zip", "vec_normalize.pkl", "replay.mp4", "results.json"} <= set(files)
    shutil.rmtree(logs / "hub")
    run("-m", "rl_zoo3.load_from_hub", *of_agent, "-orga", "team", cwd=tmp_path, **environment, TRUST_REMOTE_CODE="True")
    run("-m", "rl_zoo3.enjoy", *of_agent, "--no-render", "-n", "20", cwd=tmp_path)


def test_publishing_again_keeps_the_history(logs, server, tmp_path):
    push(logs, server, tmp_path, "-m", "First")
    push(logs, server, tmp_path, "-m", "Second", "--license", "cc0-1.0")
    history = server.history("team/vpg-CartPole-v1")
    assert [commit.title for commit in history][:2] == ["Second", "First"]
    assert "license: cc0-1.0" in server.files("team/vpg-CartPole-v1")["README.md"].decode()


def test_an_interrupted_push_can_be_repeated(logs, server, tmp_path):
    # More often than the client tries
    fault = server.fail(r"/api/models/team/vpg-CartPole-v1/commit", DROP_REQUEST, method="POST", times=9)
    failed = push(logs, server, tmp_path, check=False)
    assert failed.returncode == 80
    assert "The connection to the Hub failed" in failed.stderr and "try again" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "agent.json" not in server.files("team/vpg-CartPole-v1")
    fault.times = 0
    push(logs, server, tmp_path)
    assert "agent.json" in server.files("team/vpg-CartPole-v1")


@pytest.mark.parametrize(("status", "message"), [(429, "fewer requests"), (503, "a problem of its own")])
def test_answers_of_a_busy_hub(logs, server, tmp_path, status, message):
    server.fail(r"/api/repos/create", status, times=9)
    failed = push(logs, server, tmp_path, check=False)
    assert failed.returncode == 80
    assert message in failed.stderr and "Traceback" not in failed.stderr


def test_tokens_that_are_wrong_or_may_not_write(logs, server, tmp_path):
    wrong = push(logs, server, tmp_path, check=False, token="hf_wrong")
    assert wrong.returncode == 80 and "does not accept the token" in wrong.stderr
    assert "hf_wrong" not in wrong.stdout + wrong.stderr
    stranger = push(logs, server, tmp_path, check=False, token=server.add_user("stranger"))
    assert stranger.returncode == 80 and "may not write to team/vpg-CartPole-v1" in stranger.stderr
    nobody = push(logs, server, tmp_path, check=False, token="")
    assert nobody.returncode == 80 and "who you are" in nobody.stderr


def test_private_repositories(logs, server, tmp_path):
    push(logs, server, tmp_path, "--private", "-name", "secret", "--token", server.token, token="")
    load = "from sb3_ext.hub import load; load('team/secret', device='cpu')"
    anonymous = run("-c", load, cwd=tmp_path, check=False, **server.environment(tmp_path / "a", ""))
    assert anonymous.returncode != 0 and "There is no repository team/secret, or it is private" in anonymous.stderr
    run("-c", load, cwd=tmp_path, **server.environment(tmp_path / "b"))


def test_dry_run_writes_a_folder_and_nothing_else(logs, server, tmp_path):
    target = tmp_path / "agent"
    push(logs, server, tmp_path / "home", "--dry-run", str(target))
    assert {path.name for path in tmp_path.iterdir()} <= {"agent", "home"}
    assert (target / "README.md").is_file() and (target / "replay.gif").stat().st_size <= MAX_GIF_BYTES
    assert server.requests == []
    again = push(logs, server, tmp_path / "home", "--dry-run", str(target), check=False)
    assert again.returncode == 80 and "not empty" in again.stderr


def test_missing_agents_are_named(logs, server, tmp_path):
    missing = push(logs, server, tmp_path, algo="npg", check=False)
    assert missing.returncode == 78 and "Train an agent first" in missing.stderr


def test_pickles_need_consent(server, tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu").save(tmp_path / "ppo-CartPole-v1")
    upload = (
        "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('team/other'); "
        "api.upload_file(path_or_fileobj='ppo-CartPole-v1.zip', path_in_repo='ppo-CartPole-v1.zip', repo_id='team/other')"
    )
    environment = server.environment(tmp_path / "home")
    run("-c", upload, cwd=tmp_path, **environment)
    refused = run("-c", "from sb3_ext.hub import load; load('team/other')", cwd=tmp_path, check=False, **environment)
    assert refused.returncode != 0 and "trust_pickle=True" in refused.stderr
    load = "from sb3_ext.hub import load; print(type(load('team/other', trust_pickle=True, device='cpu')[0]).__name__)"
    assert run("-c", load, cwd=tmp_path, **environment).stdout.split() == ["PPO"]


def test_no_room_for_a_download(logs, server, tmp_path):
    push(logs, server, tmp_path)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from sb3_ext.hub import load; load('team/vpg-CartPole-v1', device='cpu')"
    )
    environment = {**server.environment(tmp_path / "new"), "PYTHONDONTWRITEBYTECODE": "1"}
    failed = run("-c", code, cwd=tmp_path, check=False, **environment)
    assert failed.returncode != 0 and "HubError: There is no room left" in failed.stderr
    assert not list((tmp_path / "new").rglob("*.safetensors"))


def test_data_sets_go_up_and_are_trained_on(server, tmp_path):
    environment = server.environment(tmp_path / "home")
    command = ["-m", "sb3_ext.hub.push_dataset", "--dataset", SHIPPED, "-orga", "team", "-name", "cartpole"]
    pushed = run(*command, cwd=tmp_path, **environment)
    files = server.files("team/cartpole", repo_type="dataset")
    assert {"README.md", "returns.png", "coverage.png", "data/main_data.hdf5", "data/metadata.json"} <= set(files)
    card = files["README.md"].decode()
    assert "247" in card and "sb3_ext.offline.collect" in card and f"{server.url}/datasets/team/cartpole" in pushed.stdout
    (train,) = re.findall(r"^python -m rl_zoo3.train.*$", card, re.MULTILINE)
    briefly = ["-n", "20", "--eval-freq", "-1"]
    run(*shlex.split(train)[1:], *briefly, cwd=tmp_path, **environment)
    assert (tmp_path / "logs/bcq/CartPole-v1_1/CartPole-v1.zip").is_file()

    missing = train.replace("team/cartpole", "team/no-such-data")
    failed = run(*shlex.split(missing)[1:], *briefly, cwd=tmp_path, check=False, **environment)
    assert failed.returncode == 65 and "hf://team/no-such-data cannot be downloaded" in failed.stderr
    assert "Traceback" not in failed.stderr


# -- the agents of the repository --

AGENT_FOLDER = Path(__file__).parents[1] / "hub" / "agents"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.key)
def test_agents_of_the_repository_do_what_their_cards_say(algorithm):
    (card,) = AGENT_FOLDER.glob(f"{algorithm.key}/*/README.md")
    env_id = card.parent.name.removesuffix("_1")
    args = argparse.Namespace(
        **{"algo": algorithm.key, "env": EnvironmentName(env_id), "folder": str(AGENT_FOLDER), "device": "cpu", "seed": 0},
        **{"exp_id": 0, "load_best": False, "load_checkpoint": None, "load_last_checkpoint": False},
    )
    model, env, _ = load_agent(args, *find_agent(args))
    rows = re.findall(r"^\| (\d+) \| (-?[\d.]+) \| [\d.]+ \| [\d.]+ \|$", card.read_text(), re.MULTILINE)
    seed, mean = rows[0]
    assert evaluate(model, env, [int(seed)], 10, True).mean == pytest.approx(float(mean), rel=0.05)
    assert re.search(rf"^\| \[{algorithm.key}\]", (AGENT_FOLDER / "README.md").read_text(), re.MULTILINE)
    for path in card.parent.glob("*.gif"):
        assert path.stat().st_size <= MAX_GIF_BYTES
    if (card.parent / "agent.json").is_file():
        loaded, _ = load_safe(card.parent, device="cpu")
        for (name, ours), theirs in zip(model.policy.state_dict().items(), loaded.policy.state_dict().values(), strict=True):
            assert th.equal(ours, theirs), name


def test_errors_that_are_not_of_the_connection_stay_what_they_are():
    with pytest.raises(RuntimeError, match="no intact zip") as raised, explained("someone/agent"):
        raise RuntimeError("no intact zip")
    assert not isinstance(raised.value, HubError)
    with pytest.raises(HubError, match="connection to the Hub failed"), explained("someone/agent"):
        raise RuntimeError("Error while uploading") from HTTPError("cut")


# -- parts of the card --


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.key)
def test_every_algorithm_says_what_it_is(algorithm):
    module, name = algorithm.class_path.split(":")
    summary, paper = describe(getattr(__import__(module, fromlist=[name]), name))
    assert len(summary) > 20 and "`" not in summary.replace("`", "", 2)
    assert paper is not None and paper.startswith("https://")


def test_training_command():
    saved = {
        "algo": "bcq",
        "env": "Pendulum-v1",
        "seed": 3,
        "n_timesteps": 1000,
        "conf_file": None,
        "hyperparams": {"gamma": 0.9, "dataset": "a b"},
        "env_kwargs": {"g": 9.8},
        "vec_env": "dummy",
        "trial_id": None,
    }
    hyperparams = {
        "n_timesteps": 5000,
        "gamma": 0.8,
        "learning_rate": 1e-3,
        "policy_kwargs": {"activation_fn": th.nn.ReLU, "net_arch": [8], "optimizer_class": th.optim.RMSprop},
        "betas": (0.5,),
    }
    command = training_command(saved, hyperparams)
    assert command == (
        "python -m rl_zoo3.train --algo bcq --env Pendulum-v1 --seed 3 -n 1000 -params gamma:0.9 'dataset:'\"'\"'a b'\"'\"'' "
        "--env-kwargs g:9.8"
    )
    # The zoo evaluates the hyperparameters of a trial as Python
    of_trial = shlex.split(training_command({**saved, "trial_id": 4}, hyperparams))
    params = of_trial[of_trial.index("-params") + 1 : of_trial.index("--env-kwargs")]
    names = {"nn": th.nn}
    assert {key: eval(value, names) for key, value in (param.split(":", 1) for param in params)} == {
        **{key: value for key, value in hyperparams.items() if key != "n_timesteps"},
        "gamma": 0.9,
        "dataset": "a b",
    }
    continued = training_command({**saved, "trained_agent": "logs/agent.zip", "gym_packages": ["a", "b"]}, {})
    assert "--seed 3 -i logs/agent.zip --gym-packages a b -n 1000" in continued
    assert tuning(saved) == ""
    assert tuning({**saved, "trial_id": 4, "study_name": "s"}) == "The hyperparameters are those of trial 4 of the study `s`."


def test_agents_of_other_environments_and_stages(tmp_path):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=50)\n"
    )
    train = ["-m", "rl_zoo3.train", "--algo", "ddqn", "--env", "Mine-v0", "--gym-packages", "my_envs", "--eval-freq", "-1"]
    params = ["policy_kwargs:dict(activation_fn=nn.ELU, net_arch=[8])", "policy:'MlpPolicy'", "buffer_size:100"]
    run(*train, "-n", "40", "--seed", "1", "--save-freq", "20", "-params", *params, cwd=tmp_path)
    # As tuning leaves it
    (tmp_path / "logs" / "ddqn" / "Mine-v0_2").mkdir()
    push_it = ["-m", "sb3_ext.hub.push", "--algo", "ddqn", "--env", "Mine-v0", "-f", "logs", *BRIEFLY, "--dry-run", "card"]

    missing = run(*push_it, "--load-best", cwd=tmp_path, check=False)
    assert missing.returncode == 78 and "rl_model_20_steps.zip" in missing.stderr and "--eval-freq" in missing.stderr
    run(*push_it, "--load-checkpoint", "20", cwd=tmp_path)
    card = (tmp_path / "card" / "README.md").read_text()
    assert "Seed 1, 20 steps: a checkpoint." in card
    assert "import my_envs" in card and "torch.nn.modules.activation.ELU" in card
    # What the card says trains another one
    command = shlex.split(re.search(r"^python -m rl_zoo3.train .*$", card, re.MULTILINE)[0])
    run(*command[1:], "-n", "10", cwd=tmp_path)
    assert (tmp_path / "logs" / "ddqn" / "Mine-v0_3" / "Mine-v0.zip").is_file()

    shutil.rmtree(tmp_path / "card")
    args = tmp_path / "logs" / "ddqn" / "Mine-v0_1" / "Mine-v0" / "args.yml"
    args.unlink()
    missing = run(*push_it, "--exp-id", "1", cwd=tmp_path, check=False)
    assert missing.returncode == 78 and "args.yml is not there" in missing.stderr


def test_environments_that_nobody_registers(logs):
    command = ["-m", "sb3_ext.hub.push", "--algo", "vpg", "--env", "CartPole-v1", "-f", "logs", "--dry-run", "card"]
    failed = run(*command, "--gym-packages", "no_such_package", cwd=logs, check=False)
    assert failed.returncode == 78 and "no_such_package" in failed.stderr and "Traceback" not in failed.stderr


def test_extras_of_environments():
    import sb3_ext.envs  # noqa: F401

    assert extras("CartPole-v1") == ""
    assert extras("HalfCheetah-v5") == "[mujoco]"
    assert extras("PixelInvertedPendulum-v5") == "[mujoco]"
    assert extras("PixelCheetahRun-v0") == "[dm_control]"


def test_moving_pictures(tmp_path):
    # Noise does not compress
    frames = list(np.random.default_rng(0).integers(0, 256, (150, 101, 203, 3), np.uint8))
    write_gif(frames, 30, tmp_path / "replay.gif")
    assert (tmp_path / "replay.gif").stat().st_size <= MAX_GIF_BYTES
    with Image.open(tmp_path / "replay.gif") as image:
        assert image.n_frames > 10
    write_video(frames, 30, tmp_path / "replay.mp4")
    # "ftyp", with which MP4 files begin
    assert (tmp_path / "replay.mp4").read_bytes()[4:8] == b"ftyp"
