"""What can go wrong in benchmarks/ without being seen: resuming, half-written rows, ratios, aggregation, operation counts."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from benchmarks import cases, data, results
from benchmarks.peers import RemoteAgent, Worker
from benchmarks.report import interquartile_mean, normalized, write
from benchmarks.returns import Run, pending, training_command
from benchmarks.speed import paired_ratio

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


def test_operations_of_one_update():
    # Counted by hand for a network of one hidden layer: forward, gradient of both weights, gradient of the hidden layer
    assert cases.gflop(cases.forward(10, 2, 3, 4)) == pytest.approx(2e-9 * 10 * (2 * 3 + 3 * 4))
    assert cases.gflop(cases.backward(10, 2, 3, 4)) == pytest.approx(2e-9 * 10 * (2 * 3 + 3 * 4 + 3 * 4))
    # Convolution: 20 x 20 positions
    assert cases.gflop([(1, 4, 84, 32, 8, 4)]) == pytest.approx(2e-9 * 400 * 4 * 64 * 32)
    counted = {case.name: cases.gflop(case.products(case)) for case in cases.CASES}
    assert counted["bcq-continuous-b100"] == pytest.approx(3.07, rel=0.01)
    assert counted["bcq-pixels-b32"] == pytest.approx(3.3, rel=0.05)


def test_normalized_score():
    assert normalized(np.array([10.0, 60.0, 110.0]), {"ref_min_score": 10, "ref_max_score": 110}).tolist() == [0, 50, 100]
    assert normalized(np.array([1.0]), {"ref_min_score": None, "ref_max_score": None}) is None
    assert normalized(np.array([1.0]), None) is None


@pytest.mark.parametrize("name", ["ours", "offline-ddpg", "behaviour-cloning"])
def test_a_contender_trains_and_acts_in_its_process(tmp_path: Path, name: str):
    case = replace(cases.by_name("bcq-continuous-b100"), observation_shape=(3,), n_actions=2, n_transitions=400)
    cases.synthetic(case, tmp_path / "data.npz")
    with Worker(name, tmp_path) as worker:
        versions = worker.ask("build", spec=case.spec(data=str(tmp_path / "data.npz"), act_batch=4))["versions"]
        assert "torch" in versions
        action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float32)
        agent, observations = RemoteAgent(worker, action_space), np.ones((5, 3), np.float32)
        before, _ = agent.predict(observations)
        assert worker.ask("update", n=5)["seconds"] > 0
        after, _ = agent.predict(observations)
        assert all(action in action_space for action in after) and after.shape == (5, 2)
        assert not np.array_equal(before, after)
        assert worker.ask("peak")["bytes"] > 1e7


def test_a_contender_that_fails_says_why(tmp_path: Path):
    with Worker("ours", tmp_path) as worker, pytest.raises(RuntimeError, match=r"No such file.*nowhere\.npz"):
        worker.ask("build", spec=cases.CASES[0].spec(data="nowhere.npz"))


def test_interquartile_mean_and_report(tmp_path: Path):
    pytest.importorskip("rliable")
    scores = np.array([[0.0, 1.0], [10.0, 1.0], [20.0, 1.0], [1000.0, 1.0]])
    point, low, high = interquartile_mean(scores)
    assert point.tolist() == [15.0, 1.0] and low[0] < 15 < high[0] and low[1] == high[1] == 1

    path = tmp_path / "page.jsonl"
    for seed, final in ((1, 100.0), (2, 120.0)):
        results.append(path, returns_row(replace(RUN, seed=seed), final))
    rates = {"ours": [30.0, 10.0, 30.0], "d3rlpy": [10.0, 5.0, 10.0], "arithmetic": [40.0, 20.0, 40.0]}
    speed = {"kind": "speed", "case": "c", "threads": 1, "gflop": 2.0, "command": "python -m benchmarks speed"}
    results.append(
        path,
        {
            **speed,
            "updates_per_s": rates,
            "observations_per_s": {"ours": [4.0], "d3rlpy": [2.0]},
            "peak_bytes": {"ours": 5e6, "d3rlpy": 6e6},
            **results.stamp(),
        },
    )
    page = write(path, tmp_path / "docs").read_text()
    assert "| bcq | 110.0 ± 10.0 |" in page and "| 55.0 ± 5.0 | 100 120 | 20 | 1.0 |" in page
    assert "| c | 1 | 30.0 | 10.0 (**3.00 x**) | 40.0 (0.75) | 80 |" in page
    assert (tmp_path / "docs" / "page-study-CartPole-v1.png").stat().st_size > 5000
