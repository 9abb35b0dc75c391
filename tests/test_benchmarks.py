"""What can go wrong in benchmarks/ without being seen: resuming, half-written rows, ratios, aggregation, operation counts."""

import json
import math
import multiprocessing
import os
import pickle
import pkgutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

from benchmarks import __main__ as commands
from benchmarks import cases, data, four_rooms, frames, gpu, precision, results
from benchmarks.on_policy import StableBaselines
from benchmarks.online import learning_rate
from benchmarks.options import use_of_options
from benchmarks.peers import DEFAULT_FOLDER, PEERS, RemoteAgent, Worker
from benchmarks.report import frames_section, interquartile_mean, normalized, write
from benchmarks.returns import (
    EVALUATION_SEED,
    N_EVALUATION_ENVS,
    Run,
    _offline_spec,
    execute,
    pending,
    train,
    trained_agent,
    training_command,
)
from benchmarks.soft_values import bias_of_values, soft_returns
from benchmarks.speed import measure_on_policy, paired_ratio, race
from benchmarks.workers import CONTENDERS
from sb3_ext import OptionCritic, SACDiscrete

RUN = Run("study", "bcq", "zoo", "bcq", "CartPole-v1", 1)


def returns_row(run: Run, final: float = 100.0) -> results.Row:
    return {
        "kind": "returns",
        "study": run.study,
        "env": run.env,
        "label": run.label,
        "seed": run.seed,
        "settings": run.settings,
        "n_timesteps": 20,
        "benchmark": "python -m benchmarks returns",
        "wall_time_s": 60.0,
        "eval_steps": [10, 20],
        "eval_returns": [[0.0, 2.0], [final, final]],
        "final_returns": [final] * 3,
        "data": {
            "id": "some/data-v0", "transitions": 5, "episodes": 1, "mean_return": 5.0, "std_return": 0.0,
            "ref_min_score": 0.0, "ref_max_score": 200.0,
        },
        **results.stamp(),
    }  # fmt: skip


def test_a_finished_run_is_skipped_and_a_missing_one_is_not():
    rows = json.loads(json.dumps([returns_row(RUN)]))
    second = replace(RUN, seed=2)
    assert pending([RUN, second], rows) == [second]
    assert pending([replace(RUN, study="other")], rows) == [replace(RUN, study="other")]


def test_a_curve_has_one_setting():
    with pytest.raises(ValueError, match="other settings"):
        pending([replace(RUN, seed=2, params=("batch_size:32",))], [returns_row(RUN)])


def test_a_half_written_row_is_no_row_and_does_not_spoil_the_next(tmp_path: Path):
    path = tmp_path / "page.jsonl"
    assert results.read(path) == []
    results.append(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "retu')
    assert results.read(path) == [{"n": 1}]
    results.append(path, {"n": 3})
    assert results.read(path) == [{"n": 1}, {"n": 3}]


def append_many(path: Path, who: int) -> None:
    for n in range(50):
        results.append(path, {"who": who, "n": n, "filling": "x" * 10_000})


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path):
    path = tmp_path / "page.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, who)) for who in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = results.read(path)
    assert [[row["n"] for row in rows if row["who"] == who] for who in range(2)] == [list(range(50))] * 2


def test_a_slow_round_does_not_change_the_ratio():
    # The machine is at half its speed in the second round, and in the middle of the third; the medians' ratio would be 1
    assert paired_ratio([8.0, 4.0, 2.0], [4.0, 2.0, 4.0]) == 2.0


def test_command_of_a_run():
    run = replace(RUN, dataset="some/data-v0", params=("batch_size:32",), n_timesteps=50, env_kwargs=("max_episode_steps:9",))
    command = training_command(run, "logs")
    assert command[command.index("-params") :] == ["-params", "batch_size:32", "dataset:'some/data-v0'"]
    assert command[command.index("--eval-freq") + 1] == "5"
    assert command.count("max_episode_steps:9") == 2
    assert run.hyperparameters()["dataset"] == "some/data-v0" and run.hyperparameters()["batch_size"] == 32


def test_hyperparameters_of_the_zoo_serve_where_there_are_none_of_ours():
    assert data.settings("ppo", "CartPole-v1", [])["n_steps"] == 32
    assert data.settings("bcq", "Unheard-v0", []) == data.settings("bcq", "AlsoUnheard-v0", [])


def test_contenders_of_one_page_and_a_page_of_ones_own():
    assert results.page_of("trpo") == results.page_of("trpo_fast") == results.page_of("vpg") == "policy_gradient"
    assert results.page_of("bcq") == "bcq"


def test_trpo_of_sb3_contrib_has_the_settings_of_the_zoo_under_the_ids_of_today():
    zoo = yaml.safe_load((files("rl_zoo3") / "hyperparams" / "trpo.yml").read_text())
    own = yaml.safe_load((results.PROJECT / "benchmarks" / "trpo.yml").read_text())
    assert own == {env.replace("-v4", "-v5"): settings for env, settings in zoo.items() if env.endswith("-v4")}

    run = replace(RUN, algo="trpo", env="HalfCheetah-v5")
    command = training_command(run, "logs")
    assert command[command.index("--conf-file") + 1] == "benchmarks/trpo.yml"
    assert run.hyperparameters() == zoo["HalfCheetah-v4"]
    on_cartpole = replace(run, env="CartPole-v1")
    assert "--conf-file" not in training_command(on_cartpole, "logs")
    assert on_cartpole.hyperparameters() == zoo["CartPole-v1"]
    assert "--conf-file" not in training_command(replace(run, algo="trpo_fast"), "logs")


def test_the_final_agent_sees_what_it_saw_in_training_and_rewards_are_those_of_the_environment(tmp_path: Path):
    params = ("normalize:True", "n_steps:64", "n_envs:1", "n_critic_updates:1", "use_sde:False")
    run = replace(RUN, algo="trpo", env="Pendulum-v1", params=params, n_timesteps=64, n_evaluations=1)
    log = train(run, str(tmp_path))
    assert np.load(log / "evaluations.npz")["timesteps"].tolist() == [64]
    agent, env = trained_agent(run, log)
    returns, _ = evaluate_policy(agent, env, n_eval_episodes=N_EVALUATION_ENVS, return_episode_rewards=True)

    statistics = pickle.loads((log / "Pendulum-v1" / "vecnormalize.pkl").read_bytes()).obs_rms
    plain = make_vec_env("Pendulum-v1", N_EVALUATION_ENVS, EVALUATION_SEED)
    observations, expected = plain.reset(), np.zeros(N_EVALUATION_ENVS)
    for _ in range(200):
        seen = np.clip((observations - statistics.mean) / np.sqrt(statistics.var + 1e-8), -10, 10)
        observations, rewards, _, _ = plain.step(agent.predict(seen.astype(np.float32), deterministic=True)[0])
        expected += rewards
    assert sorted(returns) == pytest.approx(sorted(expected), rel=1e-3)


def test_operations_of_one_update():
    # Counted by hand for a network of one hidden layer: forward, gradient of both weights, gradient of the hidden layer
    assert cases.gflop(cases.forward(10, 2, 3, 4)) == pytest.approx(2e-9 * 10 * (2 * 3 + 3 * 4))
    assert cases.gflop(cases.backward(10, 2, 3, 4)) == pytest.approx(2e-9 * 10 * (2 * 3 + 3 * 4 + 3 * 4))
    # Convolution: 20 x 20 positions
    assert cases.gflop([(1, 4, 84, 32, 8, 4)]) == pytest.approx(2e-9 * 400 * 4 * 64 * 32)
    counted = {case.name: cases.gflop(case.products(case)) for case in cases.CASES}
    assert counted["bcq-continuous-b100"] == pytest.approx(3.07, rel=0.01)
    assert counted["bcq-pixels-b32"] == pytest.approx(3.3, rel=0.05)
    # 7.74 million products in the convolutions of one image, 12.2 in their gradients, 1.61 in 512 units behind them
    millions = 3 * (7.74 + 1.61) + 12.2 + 2 * 1.61
    assert counted["dueling-ddqn-pixels-512-b32"] == pytest.approx(2 * 32 * millions * 1e-3, rel=0.01)
    assert counted["dueling-ddqn-pixels-b32"] == pytest.approx(2 * 32 * (millions + 5 * 1.61) * 1e-3, rel=0.01)
    # Yarats et al.: about 12 passes of 11.3 through the encoder; ours saves the actor's convolutions
    assert counted["sac-ae-b128"] == pytest.approx(11 * 11.3, rel=0.05)


def test_normalized_score():
    assert normalized(np.array([10.0, 60.0, 110.0]), {"ref_min_score": 10, "ref_max_score": 110}).tolist() == [0, 50, 100]
    assert normalized(np.array([1.0]), {"ref_min_score": None, "ref_max_score": None}) is None
    assert normalized(np.array([1.0]), None) is None


@pytest.mark.parametrize("name", ["ours", "offline-ddpg", "behaviour-cloning"])
def test_a_contender_trains_and_acts_in_its_process(tmp_path: Path, name: str):
    case = replace(cases.by_name("bcq-continuous-b100"), observation_shape=(3,), n_actions=2, n_transitions=400)
    cases.synthetic(case, tmp_path / "data.npz")
    with Worker(name, tmp_path) as worker:
        of_controls = {} if name == "ours" else {"net_arch": [8], "tau": 0.1, "gamma": 0.9}
        spec = case.spec(data=str(tmp_path / "data.npz"), act_batch=4, **of_controls)
        assert "torch" in worker.ask("build", spec=spec)["versions"]
        action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float32)
        agent, observations = RemoteAgent(worker, action_space), np.ones((5, 3), np.float32)
        before, _ = agent.predict(observations)
        assert worker.ask("update", n=5)["seconds"] > 0
        after, _ = agent.predict(observations)
        assert all(action in action_space for action in after) and after.shape == (5, 2)
        assert not np.array_equal(before, after)
        assert worker.ask("peak")["bytes"] > 1e7


def test_controls_have_the_settings_of_the_algorithm(tmp_path: Path):
    for env, name, net_arch, gamma in (
        ("CartPole-v1", "offline-dqn", [256, 256], 0.99),
        ("Pendulum-v1", "offline-ddpg", [128, 128], 0.98),
    ):
        run = Run("shipped", name, name, "bcq", env, seed=1)
        spec, _ = _offline_spec(run, gym.make(env), tmp_path)
        assert (spec["net_arch"], spec["gamma"], spec["tau"]) == (net_arch, gamma, 0.02)
        model = pkgutil.resolve_name(CONTENDERS[name])(spec).model
        assert (model.gamma, model.tau, model.policy.net_arch) == (gamma, 0.02, net_arch)


def test_a_contender_that_fails_says_why(tmp_path: Path):
    with Worker("ours", tmp_path) as worker, pytest.raises(RuntimeError, match=r"No such file.*nowhere\.npz"):
        worker.ask("build", spec=cases.CASES[0].spec(data="nowhere.npz"))


def small(name: str, **settings: object) -> cases.OnPolicyCase:
    """A case of on-policy learning with other settings and little data."""
    case = cases.by_name(name)
    assert isinstance(case, cases.OnPolicyCase)
    contenders = {
        who: contender if who == "tianshou" else replace(contender, settings={**contender.settings, **settings})
        for who, contender in case.contenders.items()
    }
    return replace(case, contenders=contenders, observation_shape=(3,), n_actions=2, n_transitions=case.n_transitions and 400)


def test_cases_have_names_of_their_own_and_fit_into_json():
    names = [case.name for case in cases.ALL_CASES]
    assert len(set(names)) == len(names)
    for case in cases.ON_POLICY_CASES:
        for name in case.contenders:
            assert json.loads(json.dumps(case.spec(name)))["measured"] == case.measured


def test_settings_of_the_zoo_and_what_a_case_changes():
    case, zoo = small("learn-cartpole-vpg-4000"), data.settings("vpg", "CartPole-v1", [])
    assert case.n_envs == zoo.pop("n_envs") and zoo.pop("n_timesteps") > 0
    assert zoo["n_steps"] != 500 and case.spec("ours")["settings"] == {**zoo, "n_steps": 500}
    with pytest.raises(ValueError, match="another number of environments"):
        replace(case, n_envs=3).spec("ours")


def test_both_collectors_collect_the_same_and_learn_nothing():
    case, rollouts = small("collect-cartpole-8", n_steps=4), []
    for name in ("ours", "sb3"):
        contender = StableBaselines(case.spec(name))
        policy, values = contender.model.policy, []
        policy.register_forward_hook(lambda *arguments: values.append(arguments))  # noqa: B023
        before = policy.action_net.weight.tolist()
        assert contender.update(40) == 64  # two rollouts
        assert policy.action_net.weight.tolist() == before
        # SB3 evaluates all of the policy at each step
        assert len(values) == (8 if name == "sb3" else 0)
        rollouts.append(contender.model.rollout_buffer.observations)
    assert np.allclose(*rollouts, atol=1e-5)


def test_training_on_the_same_rollout_from_the_same_parameters(tmp_path: Path):
    case, path = small("train-trpo-2048"), tmp_path / "data.npz"
    cases.synthetic(case, path)
    actors = []
    for name in case.contenders:
        contender = StableBaselines({**case.spec(name), "data": str(path)})
        weights, rollout = contender.model.policy.action_net.weight, contender.model.rollout_buffer
        actors.append([weights.tolist(), rollout.advantages.copy()])
        for _ in range(2):
            assert contender.update(1) == 1
            actors[-1].append(weights.tolist())
    ours, contrib = actors
    assert ours[0] == contrib[0] and np.allclose(ours[1].flatten(), contrib[1].flatten(), atol=1e-5)
    for start, _, first, second in actors:
        assert np.allclose(first, second, atol=1e-5) and not np.allclose(start, first, atol=1e-3)


def test_learning_counts_its_steps_and_changes_the_policy():
    contender = StableBaselines(small("learn-cartpole-vpg", n_steps=8).spec("ours"))
    before = contender.model.policy.action_net.weight.tolist()
    assert [contender.update(1), contender.update(65)] == [64, 128]
    assert contender.model.policy.action_net.weight.tolist() != before


def test_a_case_of_on_policy_learning_is_measured_without_the_peers_that_are_not_wanted():
    row = measure_on_policy(small("train-npg-full-2048"), DEFAULT_FOLDER, 1, 0.01, 2, peers=[])
    assert set(row["rates"]) == set(row["specs"]) == {"ours"}
    assert len(row["rates"]["ours"]) == 2 and min(row["rates"]["ours"]) > 0


@pytest.mark.skipif(not (DEFAULT_FOLDER / "tianshou").exists(), reason="needs `python -m benchmarks peers`")
@pytest.mark.parametrize("name", ["learn-cartpole-vpg", "train-npg-full-2048", "train-trpo-full-2048"])
def test_tianshou_learns_on_policy(tmp_path: Path, name: str):
    case, path = small(name), tmp_path / "data.npz"
    cases.synthetic(case, path, n_transitions=400)
    with Worker("tianshou", DEFAULT_FOLDER) as worker:
        worker.ask("build", spec={**case.spec("tianshou"), "data": str(path)})
        assert worker.ask("update", n=3)["done"] >= 3


OFF_POLICY_CASES = [case for case in cases.CASES if case.off_policy and not case.image]


@pytest.mark.parametrize("case", OFF_POLICY_CASES, ids=lambda case: case.name)
def test_off_policy_contenders_update_and_act(tmp_path: Path, case: cases.Case):
    path = tmp_path / "data.npz"
    cases.synthetic(case, path, 300)
    spec = json.loads(json.dumps(case.spec(data=str(path))))
    for name in ("ours", *case.contenders):
        if name in PEERS and not (DEFAULT_FOLDER / name).exists():
            continue
        with Worker(name, DEFAULT_FOLDER) as worker:
            worker.ask("build", spec=spec)
            observations = np.random.default_rng(0).standard_normal((200, *case.observation_shape)).tolist()
            before = worker.ask("predict", observations=observations)["actions"]
            worker.ask("update", n=200)
            after = worker.ask("predict", observations=observations)["actions"]
        assert before != after, name
        assert set(after) <= set(range(case.n_actions))


@pytest.mark.parametrize("algo, name", [("dqn", "sbx"), ("sac_discrete", "tianshou")])
def test_peers_learn_online(algo: str, name: str):
    if not (DEFAULT_FOLDER / name).exists():
        pytest.skip("needs `python -m benchmarks peers`")
    params = ("learning_starts:50", "train_freq:4", "gradient_steps:2", "buffer_size:1000")
    run = Run("default", name, name, algo, "CartPole-v1", 1, params=params, n_timesteps=200, n_evaluations=2, n_episodes=10)
    row = execute(run)
    assert row["eval_steps"] == [100, 200] and len(row["final_returns"]) == 10 and min(row["final_returns"]) > 0


@pytest.mark.parametrize("setting, expected", [("lin_0.002", (0.002, True)), ("0.002", (0.002, False)), (1e-3, (1e-3, False))])
def test_learning_rate_of_a_peer_falls_if_the_zoos_does(setting: float | str, expected: tuple[float, bool]):
    assert learning_rate(setting) == expected


@pytest.mark.parametrize("algo, contender, error", [("bcq", "sbx", "online only"), ("ddqn", "d3rlpy", "needs data")])
def test_a_contender_learns_online_or_from_data(algo: str, contender: str, error: str):
    with pytest.raises(ValueError, match=error):
        execute(Run("default", contender, contender, algo, "CartPole-v1", 1))


def test_a_worker_ends_with_its_parent(tmp_path: Path):
    code = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from benchmarks.returns import end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60)
    time.sleep(60)
"""
    script = tmp_path / "pool.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(results.PROJECT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_settings_of_dqn_are_compared_with_the_same_numbers_of_updates():
    for name in ("learn-cartpole-ddqn", "learn-cartpole-dueling-ddqn"):
        case = cases.by_name(name)
        assert isinstance(case, cases.OnPolicyCase)
        ours, sb3 = (case.spec(who)["settings"] for who in ("ours", "sb3"))
        for key in ("train_freq", "gradient_steps", "batch_size", "learning_starts", "policy_kwargs"):
            assert ours[key] == sb3[key], key


def test_frame_memory_is_measured():
    # As from the shell, in a process of its own: this one may have memory left from other tests, which shrinks or is used
    # again. 6000 are enough for memory that comes from the system.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row = pool.apply(frames.measure, (6000, 50, 2, 0.01))
    assert row["array_bytes"] == pytest.approx(1.03 * 6000 * 84 * 84, rel=0.01)
    # Frames that are written become resident
    assert 0.5 < row["resident_bytes"] / row["array_bytes"] < 2
    assert row["array_bytes_of_a_million"] < 7.5e9 < 56e9 < row["sb3_bytes_of_a_million"]
    assert f"{row['array_bytes_of_a_million'] / 1e9:.2f} GB" in frames_section([{**row, "command": "c"}])


def stacked_images() -> VecFrameStack:
    images = {"screen_height": 40, "screen_width": 40, "n_channels": 1, "discrete": True}
    return VecFrameStack(make_vec_env(FakeImageEnv, env_kwargs=images, seed=0), 4)


def test_what_mixed_precision_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    env = stacked_images()
    monkeypatch.setattr(precision, "pong", lambda seed: env)
    row = precision.measure(n_training=60, n_transitions=60, n_updates=20, n_seeds=2)
    assert 0.9 < row["choices"]["agreement"] <= 1.0 and 0.0 <= row["choices"]["loss"] < 0.1 * row["choices"]["advantage"]
    for part in row["gradients"].values():
        assert 0.0 < part["bias"] < part["error"] < 0.5 * part["noise"]
    for of_seeds in row["fit_errors"].values():
        assert all(errors[-1] < errors[0] for errors in of_seeds)
    results.append(tmp_path / "page.jsonl", {**row, "command": "python -m benchmarks precision"})
    page = write(tmp_path / "page.jsonl", tmp_path / "docs").read_text()
    assert "| precision | 0 updates | 4 updates | 8 updates | 12 updates | 16 updates | 20 updates |\n" in page
    assert "\n| last layers | " in page and "\n| mixed | " in page


def test_mixed_precision_is_compared_with_itself():
    env = stacked_images()
    model = precision.agent(env, False, seed=0, learning_starts=0, gradient_steps=0, buffer_size=40).learn(40)
    batch = model.replay_buffer.sample(8)
    chosen = precision.choices(model, model, batch)
    assert chosen["agreement"] == 1.0 and chosen["loss"] == 0.0 < chosen["advantage"]
    for part in precision.gradients(model, model, [batch, model.replay_buffer.sample(8)]).values():
        assert part["error"] == part["bias"] == 0.0 < part["noise"]


def test_four_rooms_agents_play_as_many_episodes_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    labels = ["4 options", "actor-critic", "SARSA"]
    four_rooms.run_missing(labels, range(1, 3), 3)
    rows = results.read(tmp_path / "option_critic.jsonl")
    assert [(row["label"], row["seed"]) for row in rows] == [(label, seed) for label in labels for seed in (1, 2)]
    assert all(len(row["lengths"]) == 3 and all(0 < length <= 1000 for length in row["lengths"]) for row in rows)
    # What is there is not done again, and the same seed does the same
    four_rooms.run_missing(labels, range(1, 3), 3)
    assert len(results.read(tmp_path / "option_critic.jsonl")) == 6
    assert [four_rooms.run(row["label"], row["seed"], 3)["lengths"] for row in rows] == [row["lengths"] for row in rows]


def test_the_tables_of_the_actor_critic_are_those_of_a_single_option():
    settings, batches = four_rooms.zoo_settings(), []
    model = four_rooms.make_option_critic(four_rooms.make_env(), 1, 0, settings)
    policy, sample, train = model.policy, model._sample, model.train
    values = policy.critic.values[0].weight.data[0].double().numpy()
    preferences = policy.actor[0].weight.data.T.double().numpy().copy()

    def record(batch_size: int) -> Any:
        batches.append(sample(batch_size))
        return batches[-1]

    def as_tables(data: Any, actions: Any) -> Any:
        states, next_states = data.observations.argmax(dim=1), data.next_observations.argmax(dim=1)
        columns = [states, actions, data.rewards, next_states, 1 - data.dones]
        rows = np.zeros(len(actions), four_rooms.TRANSITION)
        for (name, _), column in zip(four_rooms.TRANSITION, columns, strict=True):
            rows[name] = column.numpy().ravel()
        return rows

    def train_both(*args: Any, **kwargs: Any) -> None:
        rollout = model._latest_rollout()
        train(*args, **kwargs)
        (latest,) = as_tables(rollout, rollout.actions)
        four_rooms.update_tables(values, preferences, latest, as_tables(batches[-1], batches[-1].actions), settings)

    model._sample, model.train = record, train_both
    model.learn(3000)
    assert len(batches) == 2900
    # More than the tables began with: the goal has been found, and its value has spread
    assert values.max() > 0.5
    np.testing.assert_allclose(policy.critic.values[0].weight.data[0].numpy(), values, atol=1e-3)
    np.testing.assert_allclose(policy.actor[0].weight.data.T.numpy(), preferences, atol=1e-3)


@pytest.mark.parametrize("agent", [four_rooms.sarsa, four_rooms.actor_critic])
def test_flat_agents_learn_four_rooms(agent: Any):
    lengths = agent(seed=0, n_episodes=200)
    assert np.mean(lengths[:10]) > 60 > 40 > np.mean(lengths[150:])


def test_report_of_four_rooms(tmp_path: Path):
    lengths = [100] * 900 + [10] * 100 + [50] * 1000
    path = tmp_path / "option_critic.jsonl"
    for seed in (1, 2):
        row = {"kind": "four rooms", "label": "SARSA", "seed": seed, "lengths": lengths, "wall_time_s": 60.0, "command": "c"}
        results.append(path, {**row, **results.stamp()})
    page = write(path, tmp_path / "out").read_text()
    assert "| SARSA | 2 | 10.0 ± 0.0 | 50.0 ± 0.0 |" in page
    assert (tmp_path / "out" / "option_critic-four-rooms.png").is_file()


class InRollouts:
    """A worker that does work in multiples of 8, 100 of it in a second."""

    name = "ours"

    def ask(self, verb: str, n: int) -> dict[str, float]:
        done = -(-n // 8) * 8
        return {"done": done, "seconds": done / 100}


def test_the_rate_counts_what_was_done_not_what_was_asked_for():
    assert race([InRollouts()], "update", 0.3, 2) == {"ours": [100.0, 100.0]}  # type: ignore[list-item]


def test_interquartile_mean_and_report(tmp_path: Path):
    metrics = pytest.importorskip("rliable.metrics")
    scores = np.array([[0.0, 1.0], [10.0, 1.0], [20.0, 1.0], [1000.0, 1.0]])
    point, low, high = interquartile_mean(scores)
    assert point.tolist() == [15.0, 1.0] and low[0] < 15 < high[0] and low[1] == high[1] == 1
    for n_seeds in range(1, 11):
        scores = np.random.default_rng(n_seeds).normal(size=(n_seeds, 2))
        np.testing.assert_allclose(interquartile_mean(scores)[0], [metrics.aggregate_iqm(column) for column in scores.T])

    path = tmp_path / "page.jsonl"
    for seed, final in ((1, 100.0), (2, 120.0)):
        results.append(path, returns_row(replace(RUN, seed=seed), final))
    rates = {"ours": [30.0, 10.0, 30.0], "d3rlpy": [10.0, 5.0, 10.0], "arithmetic": [40.0, 20.0, 40.0]}
    speed = {"kind": "speed", "case": "c", "threads": 1, "gflop": 2.0, "command": "python -m benchmarks speed"}
    row = {
        **speed,
        "updates_per_s": rates,
        "observations_per_s": {"ours": [4.0], "d3rlpy": [2.0]},
        "peak_bytes": {"ours": 5e6, "d3rlpy": 6e6},
        **results.stamp(),
    }
    for maker, ours in (("A", [1.0, 1.0, 1.0]), ("A", rates["ours"]), ("B (family 6)", [20.0, 10.0, 20.0])):
        updates = {**rates, "ours": ours}
        results.append(path, {**row, "updates_per_s": updates, "machine": f"{maker}, 2 cores, Linux"})
    page = write(path, tmp_path / "docs").read_text()
    assert "| bcq | 110.0 ± 10.0 |" in page and "| 55.0 ± 5.0 | 100 120 | 20 | 1.0 |" in page
    assert "| c | A | 1 | 30.0 | 10.0 (**3.00 x**) | 40.0 (0.75) | 80 |" in page
    assert "| c | B (family 6) | 1 | 20.0 | 10.0 (**2.00 x**) | 40.0 (0.50) | 80 |" in page
    # Only the latest of a machine
    assert page.count("| c | A | 1 |") == 3
    assert (tmp_path / "docs" / "page-study-CartPole-v1.png").stat().st_size > 5000


def test_use_of_options_is_that_of_the_drawn_ones():
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    model = OptionCritic("MlpPolicy", env, n_options=2, policy_kwargs={"net_arch": []}, seed=0, device="cpu")
    # The one of the larger value ends with probability 1/5 and is chosen again
    with th.no_grad():
        model.policy.termination_net[0].weight.zero_()
        model.policy.termination_net[0].bias[:] = math.log(1 / 4)
        model.policy.critic.values[0].weight.zero_()
        model.policy.critic.values[0].bias[:] = th.tensor([0.0, 1.0])
    use = use_of_options(model, env, 4000)
    assert use["usage_entropy"] == 0.0 == use["switches_per_episode"]
    assert use["termination_probability"] == pytest.approx(0.2)
    assert use["duration"] == pytest.approx(5.0, rel=0.1)
    # One of four options is then the other one
    env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2.0)
    assert use_of_options(model, env, 8000, epsilon=0.5)["usage_entropy"] == pytest.approx(quarter, abs=0.03)


def test_report_of_options(tmp_path: Path):
    pytest.importorskip("rliable")
    runs = [replace(RUN, seed=seed) for seed in (2, 1)]
    uses = [{"usage_entropy": entropy, "duration": duration} for entropy, duration in ((0.5, 2.0), (1.0, 6.0))]
    path = tmp_path / "option_critic.jsonl"
    for in_training, expected in (
        ({}, "0.75 (1.00 0.50)"),
        ({"usage_entropy_in_training": 0.6}, "0.75 (1.00 0.50) | 0.60 (0.60 0.60)"),
    ):
        rows = [{**returns_row(run), "options": {**use, **in_training}} for run, use in zip(runs, uses, strict=True)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        text = write(path, tmp_path / "docs").read_text()
        assert f"| bcq | {expected} | 4.00 (6.00 2.00) |" in text
        assert ("as in training" in text) == bool(in_training)


@pytest.mark.parametrize("env", ["MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1"])
def test_dqn_has_the_settings_of_double_dqn_on_minatar(env):
    of_dqn = data.settings("dqn", env, [])
    assert of_dqn and of_dqn == data.settings("ddqn", env, [])


def test_report_of_on_policy_algorithms(tmp_path: Path):
    pytest.importorskip("rliable")
    path = tmp_path / "page.jsonl"
    for algo in ("trpo", "trpo_fast"):
        for seed, final in ((1, 100.0), (2, 120.0)):
            run = replace(RUN, study="default", env="MinAtar/Breakout-v1", label=algo, algo=algo, seed=seed)
            results.append(path, {**returns_row(run, final), "data": None})
    for case, rates in (("a", {"ours": [30.0], "sb3": [10.0]}), ("b", {"ours": [8.0], "tianshou": [4.0]})):
        specs = {name: {"algo": f"algo-{name}"} for name in rates}
        row = {"kind": "on-policy speed", "case": case, "measured": "learn", "threads": 1, "rates": rates, "specs": specs}
        stamp = {**results.stamp(), "machine": "A, 2 cores, Linux"}
        results.append(path, {**row, "command": "python -m benchmarks speed", **stamp})
    page = write(path, tmp_path / "docs").read_text()
    assert "### MinAtar/Breakout-v1\n" in page and "normalised" not in page
    assert "| trpo_fast | 110.0 ± 10.0 |" in page and "| 100 120 | 20 | 1.0 |" in page
    assert "| a | A | 1 | algo-ours 30.0 | algo-sb3 10.0 (**3.00 x**) |  |" in page
    assert "| b | A | 1 | algo-ours 8.0 |  | algo-tianshou 4.0 (**2.00 x**) |" in page
    assert (tmp_path / "docs" / "page-default-MinAtar-Breakout-v1.png").stat().st_size > 5000


def test_report_of_gpus(tmp_path: Path):
    path = tmp_path / "page.jsonl"
    for name, rates in (("A", [1.0]), ("B", [60.0, 50.0, 40.0]), ("A", [30.0, 20.0, 10.0])):
        updates = {"eager": rates, "graph": [2 * rate for rate in rates]}
        if name == "B":
            updates |= {"searched": [3 * rate for rate in rates], "tf32": [4 * rate for rate in rates]}
        row = {"kind": "gpu", "case": "c", "gpu": name, "updates_per_s": updates, "peak_bytes": 5_000_000}
        results.append(path, {**row, "command": "python -m benchmarks gpu", **results.stamp()})
    page = write(path, tmp_path / "docs").read_text()
    assert "| c | A | 20 | 40 (**2.00 x**) |  |  | 5 |\n" in page
    assert "| c | B | 50 | 100 (**2.00 x**) | 150 (**3.00 x**) | 200 (**4.00 x**) | 5 |\n\n" in page


def test_gpu_is_not_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    commands.gpu(commands.parse(["gpu"]))
    assert "no GPU" in capsys.readouterr().out


def test_updates_that_are_timed_on_a_gpu():
    model, batch = gpu.make_model("cpu", net_arch=[4], features_extractor_kwargs={"n_filters": 1, "features_dim": 2})
    gpu.two_updates(model, batch)
    assert model._n_updates == 2


def test_ways_of_launching_updates():
    def switches() -> tuple[bool, bool, bool]:
        return cudnn.benchmark, cudnn.deterministic, products.allow_tf32

    cudnn, products = th.backends.cudnn, th.backends.cuda.matmul
    before, seen = switches(), {}
    try:
        for name, way in gpu.WAYS.items():
            way.choose()
            seen[name] = switches()
    finally:
        cudnn.benchmark, cudnn.deterministic, products.allow_tf32 = before
    as_sb3 = (False, True, False)
    assert seen == {"eager": as_sb3, "graph": as_sb3, "searched": (True, False, False), "tf32": (True, False, True)}


@pytest.mark.parametrize(
    ("n_steps", "expected"),
    [
        (1, [1 + 0.5 * (0.25 + 2 + 0.5 * (2 + 16)), 2 + 0.5 * (2 + 16), 16, 4, 8]),
        # The bonus of every second state only
        (2, [1 + 0.5 * (2 + 0.5 * (2 + 16)), 2 + 0.5 * 16, 16, 4, 8]),
        (3, [1 + 0.5 * (2 + 0.5 * 16), 2 + 0.5 * 16, 16, 4, 8]),
    ],
)
def test_soft_returns_by_hand(n_steps: int, expected: list[float]):
    # One environment: three steps, the last of which terminates, a step cut by a time limit, and one that the arrays cut
    returns, unseen = soft_returns(
        rewards=np.array([[1.0], [2.0], [16.0], [4.0], [8.0]]),
        bonuses=np.array([[0.5], [0.25], [2.0], [0.125], [1.0]]),
        terminated=np.array([[False], [False], [True], [False], [False]]),
        done=np.array([[False], [False], [True], [True], [False]]),
        gamma=0.5,
        n_steps=n_steps,
    )
    np.testing.assert_allclose(returns[:, 0], expected)
    np.testing.assert_allclose(unseen[:, 0], [0, 0, 0, 0.5, 0.5])


@pytest.mark.parametrize(("n_steps", "bonuses"), [(1, 1.0), (2, 1 / 3)])
def test_bias_of_values_is_that_of_the_critics(n_steps: int, bonuses: float):
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    model = SACDiscrete(
        "MlpPolicy", env, gamma=0.5, n_steps=n_steps, ent_coef=2.0, policy_kwargs={"net_arch": []}, seed=0, device="cpu"
    )
    # Chance acts, so that the bonus is 2 log 2 a step, and with this discount the end of an episode is nearly never in sight
    for network, bias in zip([*model.policy.actor.networks, *model.policy.critic.networks], (0.0, 5.0, 3.0), strict=True):
        with th.no_grad():
            network[0].weight.zero_()
            network[0].bias[:] = bias
    measured = bias_of_values(model, env, 1000)
    assert measured["value"] == 3.0
    assert measured["soft_return"] == pytest.approx(2 + bonuses * 2 * math.log(2), abs=0.3)


def test_rows_of_sac_discrete_tell_its_values_and_entropy():
    run = replace(RUN, algo="sac_discrete", params=("learning_starts:50", "gamma:0.5"), dataset=None, n_timesteps=400)
    soft = execute(run)["soft_values"]
    assert 0 < soft["entropy"] <= math.log(2) + 1e-3 and soft["entropy_deviation"] >= 0
    assert np.isfinite([soft["value"], soft["soft_return"]]).all()


def test_report_of_soft_values(tmp_path: Path):
    pytest.importorskip("rliable")
    runs = [replace(RUN, seed=seed) for seed in (1, 2)]
    soft = [{"value": v, "soft_return": 2 * v, "entropy": 0.5, "entropy_deviation": 0.1} for v in (1.0, 2.0)]
    rows = [{**returns_row(run), "soft_values": one} for run, one in zip(runs, soft, strict=True)]
    # Of this one only the entropy is known
    rows.append({**returns_row(replace(RUN, label="other")), "soft_values": {"entropy": 0.5, "entropy_deviation": 0.1}})
    path = tmp_path / "q_learning.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = write(path, tmp_path / "docs").read_text()
    assert "| bcq | 1.50 | 3.00 | 0.50 | 0.10 |" in page and "| other |  |  | 0.50 | 0.10 |" in page
