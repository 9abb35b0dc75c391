"""The gaps of the zoo that this package closes: each test fails when its patch, or the dependency, is taken out."""

import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution, distribution, distributions
from types import SimpleNamespace

import gymnasium
import minatar.gym
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_ext.zoo import patches, register


@pytest.fixture(autouse=True)
def registered():
    register()


def requirements(package: Distribution, extras: frozenset[str] = frozenset(), seen: set | None = None) -> list[Requirement]:
    """All that is asked for when a package is installed with these extras, by itself and by what it asks for."""
    seen = set() if seen is None else seen
    seen.add((canonicalize_name(package.name), extras))
    found = []
    for requirement in map(Requirement, package.requires or []):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        found.append(requirement)
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            found += requirements(distribution(requirement.name), key[1], seen)
    return found


@pytest.fixture
def package(wheel_installation) -> Distribution:
    (found,) = distributions(name="sb3-ext", path=[str(wheel_installation.site_packages)])
    return found


def names(package: Distribution) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements(package)}


@pytest.mark.parametrize("name", "requests pandas plotly seaborn scipy matplotlib tensorboard pygame-ce".split())
def test_what_the_zoo_imports_is_installed(package, name):
    assert name in names(package)


def test_only_one_distribution_of_huggingface_sb3_is_installed(package):
    assert "sb3-team-hf-integration" in names(package) and "huggingface-sb3" not in names(package)


def test_no_second_array_library_is_installed(package):
    assert not {"jax", "jaxlib"} & names(package)


@pytest.mark.parametrize("name, extra, version", [("pandas", "", "3.0"), ("mujoco", "mujoco", "4.0")])
def test_versions_that_crash_are_excluded(package, name, extra, version):
    bounds = [requirement.specifier for requirement in requirements(package, frozenset([extra])) if requirement.name == name]
    assert any(version not in bound for bound in bounds)


def test_minatar_is_known_to_the_zoo():
    assert gymnasium.make("MinAtar/SpaceInvaders-v1").observation_space.shape == (10, 10, 6)
    ours = {name: spec.kwargs for name, spec in gymnasium.registry.items() if name.startswith("MinAtar/")}
    minatar.gym.register_envs()
    assert ours == {name: spec.kwargs for name, spec in gymnasium.registry.items() if name.startswith("MinAtar/")}


def test_schedules_in_a_yml():
    from rl_zoo3.exp_manager import ExperimentManager

    given = {"learning_rate": "lin_0.004", "target_kl": "lin_0.02", "actor_learning_rate": 0.1}
    settings = ExperimentManager._preprocess_schedules(given)
    assert settings["learning_rate"](0.5) == 0.002
    assert settings["target_kl"](0.5) == 0.01
    assert settings["actor_learning_rate"] == 0.1
    assert ExperimentManager._preprocess_schedules({"ent_coef": "lin_0.1"})["ent_coef"](0.5) == 0.05
    # SB3's SAC takes both
    for text in ("auto_0.1", "1e-2"):
        assert ExperimentManager._preprocess_schedules({"ent_coef": text}) == {"ent_coef": text}
    with pytest.raises(ValueError, match="target_kl"):
        ExperimentManager._preprocess_schedules({"target_kl": "1e-2"})


def test_model_card_of_push_to_hub(tmp_path):
    from rl_zoo3.push_to_hub import generate_model_card, save_model_card

    text, metadata = generate_model_card("bcq", "BCQ", "someone", "CartPole-v1", 400.0, 10.0, {"batch_size": 64}, {})
    save_model_card(tmp_path, text, metadata)
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_value) == ("CartPole-v1", "400.00 +/- 10.00")


def test_replay_video_without_a_system_ffmpeg(tmp_path, monkeypatch):
    from huggingface_sb3.push_to_hub import _generate_replay

    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ffmpeg") is None
    env = make_vec_env("CartPole-v1", env_kwargs={"render_mode": "rgb_array"})
    _generate_replay(PPO("MlpPolicy", env, n_steps=8, batch_size=8), env, 5, True, tmp_path)
    assert (tmp_path / "replay.mp4").stat().st_size > 0
    assert os.environ["PATH"] == str(tmp_path)


@pytest.fixture
def hub(tmp_path):
    """A server on localhost that serves the files of ``tmp_path/hub`` as the Hub serves those of a model."""
    files = tmp_path / "hub"
    files.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            path = files / self.path.rpartition("/")[2]
            found = path.is_file()
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            if found:
                self.send_header("ETag", f'"{path.name}"')
                self.send_header("Content-Length", str(path.stat().st_size))
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write((files / self.path.rpartition("/")[2]).read_bytes())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield files, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_cannot_be_asked_is_not_one_without_the_file():
    from requests.exceptions import HTTPError

    def refuse(error):
        raise error

    module = SimpleNamespace(load_from_hub=refuse)
    patches.raise_error_of_requests(module)
    with pytest.raises(HTTPError):
        module.load_from_hub(EntryNotFoundError("no such file"))
    with pytest.raises(LocalEntryNotFoundError):
        module.load_from_hub(LocalEntryNotFoundError("the Hub does not answer"))


def test_load_from_hub_without_normalization_statistics(wheel_installation, hub, tmp_path):
    files, url = hub
    wheel_installation.zoo("train", "--algo", "bcq", "-n", "10", "--eval-freq", "-1", "-f", "trained", cwd=tmp_path)
    run = tmp_path / "trained/bcq/CartPole-v1_1"
    shutil.copy(run / "CartPole-v1.zip", files / "bcq-CartPole-v1.zip")
    for name in ("args.yml", "config.yml"):
        shutil.copy(run / "CartPole-v1" / name, files)
    (files / "env_kwargs.yml").write_text("{}\n")
    shutil.make_archive(str(files / "train_eval_metrics"), "zip", run, "0.monitor.csv")

    agent = ["--algo", "bcq", "--env", "CartPole-v1", "-f", "logs"]
    offline = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "TRUST_REMOTE_CODE": "True"}
    process = wheel_installation.zoo("load_from_hub", *agent, "-orga", "someone", cwd=tmp_path, **offline)
    assert "No normalization file" in process.stdout
    wheel_installation.zoo("enjoy", *agent, "--no-render", "-n", "5", cwd=tmp_path)
