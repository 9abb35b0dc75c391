import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_ext.offline import collect, errors, load_dataset
from sb3_ext.offline.recording import Episode, insert_recorder

PENDULUM = ["--algo", "ppo", "--env", "Pendulum-v1", "--max-episode-steps", "30", "--n-ref-episodes", "2"]
CARTPOLE = ["--algo", "ppo", "--env", "CartPole-v1", "--n-ref-episodes", "2"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two agents that the zoo has trained a little; the first one's observations are normalised."""
    folder = tmp_path_factory.mktemp("agents")
    for env_id, *hyperparams in (("Pendulum-v1", "n_envs:2", "n_steps:64", "normalize:True"), ("CartPole-v1", "n_steps:16")):
        command = ["-m", "rl_zoo3.train", "--algo", "ppo", "--env", env_id, "-n", "200", "--eval-freq", "-1", "-f", "logs"]
        command += ["--seed", "1", "-params", *hyperparams]
        subprocess.run([sys.executable, *command], cwd=folder, env=ENV, check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def working_folder(agents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the agents are, and where commands write ``data`` when they do not say otherwise."""
    (tmp_path / "logs").symlink_to(agents / "logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, output: str = "data") -> minari.MinariDataset:
    collect.main([*arguments, "--dataset-id", "test/data-v0", "--output", output])
    return minari.MinariDataset(Path(output) / "data")


def fails(*arguments: str, output: str = "data") -> int:
    """:return: the exit status"""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, output=output)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def content(folder: Path | str) -> dict[str, Any]:
    """Everything in a data set: arrays, attributes of the episodes, metadata."""
    everything: dict[str, Any] = {"metadata": json.loads((Path(folder) / "data" / "metadata.json").read_text())}

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        everything[name] = item[()].tolist() if isinstance(item, h5py.Dataset) else sorted(item.attrs.items())

    with h5py.File(Path(folder) / "data" / "main_data.hdf5") as file:
        file.visititems(add)
    return everything


def agent_of(env_id: str) -> tuple[PPO, VecNormalize | None]:
    folder = Path("logs", "ppo", f"{env_id}_1")
    env = DummyVecEnv([lambda: gym.make(env_id)])
    statistics = folder / env_id / "vecnormalize.pkl"
    return PPO.load(folder / f"{env_id}.zip"), VecNormalize.load(str(statistics), env) if statistics.exists() else None


def test_raw_observations_of_a_normalised_agent():
    dataset = run(*PENDULUM, "--n-episodes", "5", "--n-envs", "2", "--seed", "3")
    model, normalizer = agent_of("Pendulum-v1")
    assert normalizer is not None
    env = gym.make("Pendulum-v1", max_episode_steps=30)
    seeds = [metadata["seed"] for metadata in dataset.storage.get_episode_metadata(range(5))]
    assert len(set(seeds)) == 5
    for seed, episode in zip(seeds, dataset.iterate_episodes(), strict=True):
        # Played again, the environment gives what was recorded, to the last observation
        observation, _ = env.reset(seed=seed)
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(episode.observations[t], observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            assert episode.rewards[t] == np.float32(reward)
            assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
        np.testing.assert_array_equal(episode.observations[-1], observation)
        assert truncated and len(episode) == 30
        # The agent acted on what its statistics made of it
        actions, _ = model.predict(normalizer.normalize_obs(episode.observations[:-1]), deterministic=True)
        np.testing.assert_allclose(episode.actions, actions, atol=1e-5)


def test_metadata(capsys: pytest.CaptureFixture[str]):
    arguments = [*CARTPOLE, "--n-episodes", "3", "--seed", "7", "--ref-max-score", "500"]
    dataset = run(*arguments)
    metadata = dataset.storage.metadata
    returns = [episode.rewards.sum() for episode in dataset.iterate_episodes()]
    assert (dataset.total_episodes, dataset.total_steps, dataset.id) == (3, int(sum(returns)), "test/data-v0")
    assert metadata["command"] == "python -m sb3_ext.offline.collect " + " ".join(
        [*arguments, "--dataset-id", "test/data-v0", "--output", "data"]
    )
    assert metadata["mean_return"] == pytest.approx(np.mean(returns))
    assert metadata["ref_max_score"] == 500
    assert 8 < metadata["ref_min_score"] < 60, "random CartPole"
    assert dataset.env_spec is not None and dataset.env_spec.id == "CartPole-v1"
    assert f"mean return {np.mean(returns):.1f}" in capsys.readouterr().out
    env = dataset.recover_environment()
    assert len(load_dataset("data", env.observation_space, env.action_space)) == dataset.total_steps
    assert run(*PENDULUM, "--n-episodes", "1", output="other").env_spec.max_episode_steps == 30


def test_reference_score_of_the_agent():
    metadata = run(*PENDULUM, "--n-episodes", "1", "--noise-type", "normal").storage.metadata
    noiseless = run(*PENDULUM, "--n-episodes", "1", output="other").storage.metadata
    assert metadata["ref_max_score"] == noiseless["ref_max_score"], "the noise is no part of it"


def test_seeds():
    first, again, other = (
        run(*CARTPOLE, "--n-episodes", "4", "--stochastic", "--epsilon", "0.2", "--seed", seed, output=f"data{i}")
        for i, seed in enumerate(("0", "0", "1"))
    )
    actions = [[episode.actions.tolist() for episode in dataset.iterate_episodes()] for dataset in (first, again, other)]
    assert actions[0] == actions[1] != actions[2]


def noise_of(dataset: minari.MinariDataset) -> np.ndarray:
    """(episodes, steps), in units of half the action range"""
    model, normalizer = agent_of("Pendulum-v1")
    assert normalizer is not None
    noise = []
    for episode in dataset.iterate_episodes():
        actions, _ = model.predict(normalizer.normalize_obs(episode.observations[:-1]), deterministic=True)
        noise.append((episode.actions - actions)[:, 0] / 2)
    return np.array(noise)


def test_normal_noise():
    noise = noise_of(run(*PENDULUM, "--n-episodes", "20", "--noise-type", "normal", "--noise-std", "0.1"))
    assert noise.std() == pytest.approx(0.1, rel=0.15)
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.7, "each round draws its own"
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.2


def test_ornstein_uhlenbeck_noise():
    """It starts at zero in each episode and drifts; one step has a standard deviation of std * sqrt(dt), dt = 0.01."""
    noise = noise_of(
        run(*PENDULUM, "--n-episodes", "20", "--n-envs", "5", "--noise-type", "ornstein-uhlenbeck", "--noise-std", "0.5")
    )
    assert noise[:, 0].std() == pytest.approx(0.05, rel=0.5)
    assert np.diff(noise, axis=1).std() == pytest.approx(0.05, rel=0.15)
    assert noise[:, -1].std() > 2 * noise[:, 0].std()


def test_noise_is_clipped():
    dataset = run(*PENDULUM, "--n-episodes", "2", "--noise-type", "normal", "--noise-std", "5")
    actions = np.concatenate([episode.actions for episode in dataset.iterate_episodes()])
    assert actions.min() == -2 and actions.max() == 2


def test_epsilon_greedy():
    """Half of the random actions are the greedy one of two."""
    dataset = run(*CARTPOLE, "--n-episodes", "60", "--n-envs", "6", "--epsilon", "0.4")
    model, _ = agent_of("CartPole-v1")
    episodes = list(dataset.iterate_episodes())
    greedy, _ = model.predict(np.concatenate([episode.observations[:-1] for episode in episodes]), deterministic=True)
    differs = np.concatenate([episode.actions for episode in episodes]) != greedy
    assert differs.mean() == pytest.approx(0.2, abs=0.05)


def subprocess_of(*arguments: str, output: str, before: str = "") -> subprocess.Popen[str]:
    command = [*arguments, "--dataset-id", "test/data-v0", "--output", output]
    code = f"import sys; from sb3_ext.offline.collect import main\n{before}\nmain({command!r})"
    return subprocess.Popen([sys.executable, "-c", code], env=ENV, stderr=subprocess.PIPE, text=True)


LONG = [*PENDULUM, "--n-episodes", "60", "--n-envs", "2", "--stochastic", "--noise-type", "ornstein-uhlenbeck"]


def without_output(everything: dict[str, Any], output: str) -> dict[str, Any]:
    metadata = dict(everything["metadata"])
    metadata["command"] = metadata["command"].replace(f"--output {output}", "")
    return {**everything, "metadata": metadata}


def test_killed_and_resumed(monkeypatch: pytest.MonkeyPatch):
    process = subprocess_of(*LONG, output="killed")
    kept = Path(".killed.partial", "episodes")
    while len(list(kept.glob("*.npz"))) < 7:
        assert process.poll() is None, "it was too fast to be killed"
        time.sleep(0.001)
    process.kill()
    process.communicate()
    n_kept = len(list(kept.glob("*.npz")))
    assert 7 <= n_kept < 60
    assert not Path("killed").exists()

    rounds = []
    play_round = collect.play_round
    monkeypatch.setattr(collect, "play_round", lambda *args: rounds.append(args) or play_round(*args))
    run(*LONG, output="killed")
    # Two episodes a round; two more rounds for the reference scores, of the agent and of a random one
    assert len(rounds) == (60 - n_kept + 1) // 2 + 2, "what was kept is not played again"
    assert not Path(".killed.partial").exists()

    run(*LONG, output="undisturbed")
    assert without_output(content("killed"), "killed") == without_output(content("undisturbed"), "undisturbed")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file-size limit")
@pytest.mark.parametrize("limit", [1500, 20000], ids=["episodes", "dataset"])
def test_disk_full(limit: int):
    """No file may be longer: the episodes do not fit, or only the data set made of them."""
    arguments = [*PENDULUM, "--n-episodes", "8", "--noise-type", "normal"]
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    process = subprocess_of(*arguments, output="data", before=before)
    _, stderr = process.communicate()
    assert process.returncode == errors.DiskFullError.exit_status, stderr
    kept = sorted(path.name for path in Path(".data.partial", "episodes").iterdir())
    assert kept == ([] if limit == 1500 else [f"{i}.npz" for i in range(8)])
    assert f"The {len(kept)} episodes finished so far are kept in .data.partial" in stderr
    assert "Traceback" not in stderr
    assert not Path("data").exists()

    run(*arguments)
    run(*arguments, output="undisturbed")
    assert without_output(content("data"), "data") == without_output(content("undisturbed"), "undisturbed")


def test_dataset_exists(capsys: pytest.CaptureFixture[str]):
    run(*CARTPOLE, "--n-episodes", "1")
    earlier = content("data")
    assert fails(*CARTPOLE, "--n-episodes", "2") == errors.DatasetExistsError.exit_status
    assert "sb3-ext: error: data exists already" in capsys.readouterr().err
    assert content("data") == earlier


def test_resumed_with_other_settings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> list[Episode]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect, "play_round", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*CARTPOLE, "--n-episodes", "2")
    assert fails(*CARTPOLE, "--n-episodes", "2", "--seed", "5") == errors.ResumeError.exit_status
    assert "seed was 0 and is 5" in capsys.readouterr().err
    assert run(*CARTPOLE, "--n-episodes", "2").total_episodes == 2


def test_agent_is_missing(capsys: pytest.CaptureFixture[str]):
    status = fails("--algo", "a2c", "--env", "CartPole-v1", "--n-episodes", "1")
    assert status == errors.AgentError.exit_status
    assert "python -m rl_zoo3.train --algo a2c --env CartPole-v1 -f logs" in capsys.readouterr().err


def test_noise_for_discrete_actions(capsys: pytest.CaptureFixture[str]):
    assert fails(*CARTPOLE, "--n-episodes", "1", "--noise-type", "normal") == errors.AgentError.exit_status
    assert "--epsilon works with any" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-episodes", "0"], "at least 1"),
        (["--n-episodes", "1", "--epsilon", "1.5"], "between 0 and 1"),
        (["--n-episodes", "1", "--while-learning", "9"], "not allowed with"),
        (["--while-learning", "9", "--epsilon", "0.1"], "its own exploration"),
        (["--n-episodes", "1", "--env", "NoSuchEnv-v0"], "not in the gymnasium registry"),
        ([], "required"),
    ],
    ids=str,
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert fails("--algo", "ppo", *arguments) == 2
    assert message in capsys.readouterr().err.replace("algorithm's own exploration", "its own exploration")


def test_dataset_id_is_malformed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        collect.main([*CARTPOLE, "--n-episodes", "1", "--dataset-id", "no-version"])
    assert "must look like" in capsys.readouterr().err


def test_found_by_its_id(working_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(working_folder / "root"))
    collect.main([*CARTPOLE, "--n-episodes", "1", "--dataset-id", "some/where/data-v2"])
    assert minari.load_dataset("some/where/data-v2").total_episodes == 1
    assert list(minari.list_local_datasets()) == ["some/where/data-v2"]


def test_while_learning():
    """All steps of a learner whose observations are normalised, twice the same; what is unfinished at the end is truncated."""
    arguments = ["--algo", "a2c", "--env", "Pendulum-v1", "--while-learning", "800", "--n-ref-episodes", "1"]
    dataset = run(*arguments, "--max-episode-steps", "60")
    # The zoo's a2c.yml: rollouts of 8 steps in 8 environments, the last of which is finished
    assert dataset.total_steps == 832
    episodes = list(dataset.iterate_episodes())
    assert all(episode.truncations.tolist() == [False] * (len(episode) - 1) + [True] for episode in episodes)
    assert sum(len(episode) < 60 for episode in episodes) > 0
    for episode in episodes:
        # Cosine and sine: raw
        np.testing.assert_allclose((episode.observations[:, :2] ** 2).sum(axis=1), 1, rtol=1e-5)
    run(*arguments, "--max-episode-steps", "60", output="again")
    assert without_output(content("data"), "data") == without_output(content("again"), "again")


def test_interrupted_while_learning(monkeypatch: pytest.MonkeyPatch):
    """Learning starts again from its beginning, and nothing is left of the first attempt."""
    arguments = ["--algo", "ppo", "--env", "CartPole-v1", "--while-learning", "300", "--n-ref-episodes", "1"]

    class FullStore(collect.EpisodeStore):
        def add(self, index: int, episode: Episode, seed: int | None) -> None:
            # Leaves an episode that the second attempt has no such number for
            super().add(index + 1000, episode, seed)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect, "EpisodeStore", FullStore)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)
    assert len(list(Path(".data.partial", "episodes").iterdir())) == 1
    assert not Path("data").exists()
    run(*arguments)
    run(*arguments, output="undisturbed")
    assert without_output(content("data"), "data") == without_output(content("undisturbed"), "undisturbed")


def test_while_learning_off_policy():
    dataset = run("--algo", "dqn", "--env", "CartPole-v1", "--while-learning", "256", "--n-ref-episodes", "1")
    assert dataset.total_steps == 256
    episodes = list(dataset.iterate_episodes())
    assert all(episode.terminations[-1] for episode in episodes[:-1])


def test_images_are_recorded_as_the_environment_gives_them():
    """Channel-last, under VecTransposeImage; stacked frames are stacked."""
    episodes: list[Episode] = []
    env: Any = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=40, n_channels=1, discrete=True)])
    env, recorder = insert_recorder(VecTransposeImage(VecFrameStack(env, 3)), lambda _, episode: episodes.append(episode))
    env.seed(0)
    observations = [env.reset()]
    while not episodes:
        observation, _, _, infos = env.step(np.array([0]))
        observations.append(infos[0].get("terminal_observation", observation[0])[None])
    assert recorder.observation_space.shape == (36, 40, 3)
    assert episodes[0].observations[""].shape == (len(episodes[0]) + 1, 36, 40, 3)
    np.testing.assert_array_equal(episodes[0].observations[""].transpose(0, 3, 1, 2), np.concatenate(observations))


def test_recorded_below_all_that_changes_observations():
    plain: Any = DummyVecEnv([SimpleMultiObsEnv])
    for env in (VecTransposeImage(VecNormalize(plain, norm_obs_keys=["vec"])), VecTransposeImage(plain)):
        assert insert_recorder(env, lambda *_: None)[1].venv is plain


def test_normalised_and_stacked_observations_are_refused():
    env = VecFrameStack(VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")])), 2)
    with pytest.raises(errors.AgentError, match="frame_stack"):
        insert_recorder(env, lambda *_: None)
    rewards_only = VecFrameStack(VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]), norm_obs=False), 2)
    episodes: list[Episode] = []
    env, recorder = insert_recorder(rewards_only, lambda _, episode: episodes.append(episode))
    assert isinstance(recorder.observation_space, spaces.Box) and recorder.observation_space.shape == (8,)
    env.reset()
    while not episodes:
        _, rewards, _, _ = env.step(np.array([0]))
    # As the environment gives them, and not what the agent learns from
    assert rewards[0] != 1.0 and (episodes[0].rewards == 1.0).all()


class Lives(gym.Env):
    """A game of three lives of random lengths, each of them an episode."""

    observation_space, action_space = spaces.Box(0, 1, (1,)), spaces.Discrete(2)

    def __init__(self) -> None:
        # As in Atari
        self.ale = SimpleNamespace(lives=lambda: self.n_lives)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_lives = 3
        return self._observation(), {}

    def _observation(self) -> np.ndarray:
        return self.np_random.random(1).astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_lives -= int(self.np_random.random() < 0.3)
        return self._observation(), 1.0, self.n_lives == 0, False, {}


def test_a_round_depends_on_its_seed_only_where_lives_are_episodes():
    def play(first_seeds: list[int]) -> Episode:
        env, recorder = insert_recorder(DummyVecEnv([lambda: EpisodicLifeEnv(Lives())]), lambda *_: None)
        agent = collect.Agent(PPO("MlpPolicy", env, n_steps=8, batch_size=8, seed=0), env)
        return [collect.play_round(agent, recorder, seed)[0] for seed in first_seeds][-1]

    np.testing.assert_array_equal(play([1, 2, 3]).observations[""], play([3]).observations[""])
