"""The gaps of the zoo that this package closes: each test fails when its patch, or the dependency, is taken out."""

import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution

import pytest
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_ext.zoo import register


@pytest.fixture(autouse=True)
def registered():
    register()


def requirements(name: str, extras: frozenset[str] = frozenset(), seen: set | None = None) -> dict[str, list[Requirement]]:
    """Everything that installing ``name[extras]`` installs, with the requirements that ask for it."""
    found: dict[str, list[Requirement]] = {}
    seen = set() if seen is None else seen
    seen.add((canonicalize_name(name), extras))
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        key = canonicalize_name(requirement.name)
        found.setdefault(key, []).append(requirement)
        if (key, frozenset(requirement.extras)) not in seen:
            for other, needed in requirements(key, frozenset(requirement.extras), seen).items():
                found.setdefault(other, []).extend(needed)
    return found


@pytest.mark.parametrize(
    "name", ["requests", "pandas", "plotly", "seaborn", "scipy", "matplotlib", "tensorboard", "pygame-ce"]
)
def test_what_the_zoo_imports_is_installed(name):
    assert name in requirements("sb3-ext")


def test_only_one_distribution_of_huggingface_sb3_is_installed():
    installed = requirements("sb3-ext")
    assert "sb3-team-hf-integration" in installed and "huggingface-sb3" not in installed


def test_no_second_array_library_is_installed():
    assert not {"jax", "jaxlib"} & set(requirements("sb3-ext"))


def test_pandas_stays_below_3():
    assert any(Version("3.0") not in requirement.specifier for requirement in requirements("sb3-ext")["pandas"])


def test_mujoco_stays_below_4():
    assert any(Version("4.0") not in r.specifier for r in requirements("sb3-ext", frozenset({"mujoco"}))["mujoco"])


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
