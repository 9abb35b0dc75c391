"""Trains agents, through the zoo or in a peer, evaluates them, and keeps one row for each finished run."""

import inspect
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from benchmarks import data, results
from benchmarks.options import use_of_options
from benchmarks.peers import DEFAULT_FOLDER, RemoteAgent, Worker
from benchmarks.results import Row
from benchmarks.soft_values import bias_of_values, entropy_in_training
from benchmarks.workers import CONTENDERS, ONLINE_CONTENDERS

# Far from the seeds of training, and the same for everyone: all agents start from the same states
EVALUATION_SEED = 1_000_000
N_EVALUATION_ENVS = 10
CURVE_EPISODES = 5
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Run:
    """
    One training with one seed.

    :param study: Runs of one study and environment share a figure
    :param label: Name of the curve
    :param contender: ``zoo``, or a key of ``benchmarks.workers.CONTENDERS``
    :param algo: Key in the zoo; a peer or a control takes its data and hyperparameters
    :param env: Environment id
    :param seed: Of the training
    :param dataset: Minari id (None: as in the hyperparameters, if at all)
    :param params: ``key:value``, as for ``-params`` of the zoo
    :param env_kwargs: ``key:value``, as for ``--env-kwargs`` of the zoo
    :param n_timesteps: Instead of the hyperparameters'
    :param n_evaluations: During the training, evenly spaced
    :param n_episodes: Of the evaluation at the end
    """

    study: str
    label: str
    contender: str
    algo: str
    env: str
    seed: int
    dataset: str | None = None
    params: tuple[str, ...] = ()
    env_kwargs: tuple[str, ...] = ()
    n_timesteps: int | None = None
    n_evaluations: int = 10
    n_episodes: int = 100

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells runs apart; the rest must agree among the runs of a curve."""
        return self.study, self.env, self.label, self.seed

    @property
    def settings(self) -> Row:
        """Everything else, as in the rows of results."""
        return {key: value for key, value in _plain(asdict(self)).items() if key not in ("study", "env", "label", "seed")}

    def all_params(self) -> list[str]:
        """:return: ``params``, with the data set among them"""
        return [*self.params, *([f"dataset:{self.dataset!r}"] if self.dataset else [])]

    def hyperparameters(self) -> Row:
        """:return: those with which the zoo trains"""
        return data.settings(self.algo, self.env, self.all_params())

    def timesteps(self) -> int:
        """:return: steps of the training; of offline algorithms, gradient updates"""
        return self.n_timesteps or int(self.hyperparameters()["n_timesteps"])


def _plain(mapping: Row) -> Row:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in mapping.items()}


def pending(runs: Iterable[Run], rows: list[Row]) -> list[Run]:
    """
    :param runs: That are wanted
    :param rows: That are there
    :return: The runs that are missing
    :raises ValueError: if a row belongs to the same curve as a run, but was made with other settings
    """
    done, missing = [row for row in rows if row["kind"] == "returns"], []
    for run in runs:
        for row in done:
            same_curve = (row["study"], row["env"], row["label"]) == run.identity[:3]
            if same_curve and row["settings"] != run.settings:
                raise ValueError(
                    f"The curve {run.identity[:3]} has runs with other settings: {row['settings']}, not {run.settings}. "
                    "Choose another --label or --study, or take those rows out of the file."
                )
        if run.identity not in [(row["study"], row["env"], row["label"], row["seed"]) for row in done]:
            missing.append(run)
    return missing


def execute(run: Run, folder: Path = DEFAULT_FOLDER) -> Row:
    """
    :param run: What to train and evaluate
    :param folder: Of the peers' environments
    :return: The row of results
    """
    import torch as th

    th.set_num_threads(1)
    commit = results.commit()
    outcome = _zoo(run) if run.contender == "zoo" else _contender(run, folder)
    return {
        "kind": "returns",
        "study": run.study,
        "env": run.env,
        "label": run.label,
        "seed": run.seed,
        "settings": run.settings,
        "n_timesteps": run.timesteps(),
        **outcome,
        # That which it began with
        "commit": commit,
    }


def training_command(run: Run, logs: str) -> list[str]:
    """
    :param run: Of the zoo
    :param logs: Folder for the logs
    :return: Arguments of ``python``
    """
    command = ["-m", "rl_zoo3.train", "--algo", run.algo, "--env", run.env, "--seed", str(run.seed), "--num-threads", "1"]
    conf_file = data.additional_conf_file(run.algo, run.env)
    command += ["--conf-file", conf_file] if conf_file else []
    command += ["-f", logs, "--eval-freq", str(max(run.timesteps() // run.n_evaluations, 1))]
    command += ["--eval-episodes", str(CURVE_EPISODES), "--n-eval-envs", str(CURVE_EPISODES)]
    command += ["-n", str(run.n_timesteps)] if run.n_timesteps else []
    command += ["--tensorboard-log", str(Path(logs, TENSORBOARD))] if run.algo == "sac_discrete" else []
    for option in ("--env-kwargs", "--eval-env-kwargs"):
        command += [option, *run.env_kwargs] if run.env_kwargs else []
    return command + (["-params", *run.all_params()] if run.all_params() else [])


def _zoo(run: Run) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        log = train(run, scratch)
        seconds = time.perf_counter() - begin
        curve = np.load(log / "evaluations.npz")
        final = _evaluate(*trained_agent(run, log), run.n_episodes)
        use = _use_of_options(run, log) if run.algo == "option_critic" else None
        soft = _soft_values(run, log) if run.algo == "sac_discrete" else None
    dataset = run.hyperparameters().get("dataset")
    return {
        "command": shlex.join(["python", *training_command(run, "logs")]),
        "wall_time_s": round(seconds, 1),
        "eval_steps": curve["timesteps"].tolist(),
        "eval_returns": results.rounded(curve["results"]),
        "final_returns": final,
        **({"options": use} if use else {}),
        **({"soft_values": soft} if soft else {}),
        "data": _description(run, dataset) if isinstance(dataset, str) else None,
        **results.stamp(),
    }


def _use_of_options(run: Run, log: Path) -> Row:
    model, env = trained_agent(run, log)
    use = use_of_options(model, env)
    with_random_options = use_of_options(*trained_agent(run, log), epsilon=model.exploration_rate)
    return {**use, "usage_entropy_in_training": with_random_options["usage_entropy"]}


def _soft_values(run: Run, log: Path) -> Row:
    from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize

    model, env = trained_agent(run, log)
    normalize = unwrap_vec_normalize(env)
    if normalize is not None:
        saved = VecNormalize.load(str(log / log.name.removesuffix("_1") / "vecnormalize.pkl"), normalize.venv)
        normalize.norm_reward = saved.norm_reward
    return {**bias_of_values(model, env), **entropy_in_training(log.parents[1] / TENSORBOARD)}


def train(run: Run, folder: str) -> Path:
    """
    :param run: Of the zoo
    :param folder: For the logs
    :return: The zoo's folder of this training
    :raises RuntimeError: if the training fails, with the end of what it printed
    """
    command = [sys.executable, *training_command(run, folder)]
    trained = subprocess.run(command, cwd=results.PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if trained.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with status {trained.returncode}:\n{trained.stdout[-3000:]}")
    return next(Path(folder, run.algo).glob("*_1"))


def trained_agent(run: Run, log: Path) -> tuple[Any, Any]:
    """
    :param run: Of the zoo
    :param log: See :func:`train`
    :return: The agent at the end of its training, and the environments that judge it. What VecNormalize learned of the
        observations in training is applied and no longer changed; rewards are those of the environment.
    """
    from sb3_ext.zoo import register

    register()
    from rl_zoo3.utils import ALGOS, create_test_env, get_saved_hyperparams
    from stable_baselines3.common.vec_env import DummyVecEnv

    name = log.name.removesuffix("_1")
    hyperparameters, stats_path = get_saved_hyperparams(str(log / name), test_mode=True)
    env_kwargs = {**hyperparameters.pop("env_kwargs", {}), **_env_kwargs(run)}
    env = create_test_env(
        run.env,
        n_envs=N_EVALUATION_ENVS,
        stats_path=stats_path,
        seed=EVALUATION_SEED,
        should_render=False,
        hyperparams=hyperparameters,
        env_kwargs=env_kwargs,
        vec_env_cls=DummyVecEnv,
    )
    return ALGOS[run.algo].load(log / f"{name}.zip", device="cpu"), env


def _env_kwargs(run: Run) -> Row:
    return {key: data.literal(text) for key, text in (pair.split(":", 1) for pair in run.env_kwargs)}


def _evaluate(agent: Any, env: Any, n_episodes: int) -> list[float]:
    from stable_baselines3.common.evaluation import evaluate_policy

    returns, _ = evaluate_policy(agent, env, n_eval_episodes=n_episodes, return_episode_rewards=True, warn=False)
    env.close()
    return results.rounded(returns)


def _make_env(run: Run, n_envs: int, seed: int) -> Any:
    from stable_baselines3.common.env_util import make_vec_env

    return make_vec_env(run.env, n_envs=n_envs, seed=seed, env_kwargs=_env_kwargs(run))


def _description(run: Run, dataset: str) -> Row:
    env = _make_env(run, 1, 0)
    return data.arrays(dataset, env.observation_space, env.action_space)[1]


def _offline_spec(run: Run, env: Any, folder: Path) -> tuple[Row, Row]:
    hyperparameters = run.hyperparameters()
    table, description = data.arrays(hyperparameters["dataset"], env.observation_space, env.action_space)
    path = folder / "data.npz"
    np.savez(path, **table)  # type: ignore[arg-type]
    spec = data.spec(run.algo, hyperparameters, env.observation_space, env.action_space, seed=run.seed, data=str(path))
    policy_kwargs = eval(hyperparameters.get("policy_kwargs", "{}"))  # as the zoo does
    # For the controls; the defaults are BCQ's
    spec["net_arch"] = policy_kwargs.get("net_arch", [256, 256] if spec["discrete"] else [400, 300])
    spec["tau"], spec["gamma"] = hyperparameters.get("tau", 0.005), hyperparameters.get("gamma", 0.99)
    return spec, description


def _online_spec(run: Run) -> Row:
    from sb3_ext.zoo import register

    register()
    from rl_zoo3.utils import ALGOS

    parameters = inspect.signature(ALGOS[run.algo]).parameters.values()
    settings = run.hyperparameters()
    del settings["n_timesteps"]
    if "policy_kwargs" in settings:
        settings["policy_kwargs"] = eval(settings["policy_kwargs"])  # as the zoo does
    return {
        "algo": run.algo,
        "env": run.env,
        "env_kwargs": _env_kwargs(run),
        "settings": settings,
        "defaults": {one.name: one.default for one in parameters if isinstance(one.default, (int, float, str))},
        "n_timesteps": run.timesteps(),
        "seed": run.seed,
        "threads": 1,
    }


def _contender(run: Run, folder: Path) -> Row:
    offline = isinstance(run.hyperparameters().get("dataset"), str)
    if not offline and run.contender not in ONLINE_CONTENDERS:
        raise ValueError(f"{run.contender} needs data: give --dataset, {run.algo} has none for {run.env}.")
    if offline and run.contender not in CONTENDERS:
        raise ValueError(f"{run.contender} learns online only, and {run.algo} on {run.env} learns from data.")
    env = _make_env(run, 1, run.seed)
    total, step = run.timesteps(), max(run.timesteps() // run.n_evaluations, 1)
    with tempfile.TemporaryDirectory() as scratch, Worker(run.contender, folder) as worker:
        spec, description = _offline_spec(run, env, Path(scratch)) if offline else (_online_spec(run), None)
        begin = time.perf_counter()
        versions = worker.ask("build", spec=spec)["versions"]
        agent, steps, curve = RemoteAgent(worker, env.action_space), [], []
        for done in range(step, total + 1, step):
            worker.ask("update", n=step)
            steps.append(done)
            curve.append(_evaluate(agent, _make_env(run, CURVE_EPISODES, run.seed), CURVE_EPISODES))
        if total % step:
            worker.ask("update", n=total % step)
        seconds = time.perf_counter() - begin
        final = _evaluate(agent, _make_env(run, N_EVALUATION_ENVS, EVALUATION_SEED), run.n_episodes)
    return {
        "command": results.own_command(),
        "wall_time_s": round(seconds, 1),
        "eval_steps": steps,
        "eval_returns": curve,
        "final_returns": final,
        "data": description,
        **results.stamp(**versions),
    }


def end_with_parent() -> None:
    """A worker whose parent was killed would go on with the next runs, whose rows nobody writes."""

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def run_all(runs: list[Run], page: str, folder: Path, jobs: int) -> None:
    """
    Make the rows that are missing.

    :param runs: That are wanted
    :param page: File of results to add to
    :param folder: Of the peers' environments
    :param jobs: Runs at a time
    :raises ValueError: see :func:`pending`
    :raises SystemExit: at the end, if a run has failed
    """
    path = results.path_of(page)
    missing = pending(runs, results.read(path))
    print(f"{path.name}: {len(runs) - len(missing)} of {len(runs)} runs are there", flush=True)
    own_command, failed = results.own_command(), []
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        futures = {pool.submit(execute, run, folder): run for run in missing}
        for future in as_completed(futures):
            run = futures[future]
            try:
                row = {**future.result(), "benchmark": own_command}
            except Exception as error:  # the others go on
                failed.append(f"{run.label} on {run.env}, seed {run.seed}: {error}")
                print(f"FAILED {failed[-1]}", file=sys.stderr, flush=True)
                continue
            results.append(path, row)
            mean = np.mean(row["final_returns"])
            print(f"{run.label} on {run.env}, seed {run.seed}: {mean:.1f} in {row['wall_time_s']:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(missing)} runs failed. The same command tries them again.")


def controls(run: Run) -> list[Run]:
    """
    :param run: Of an offline algorithm through the zoo
    :return: The same with behaviour cloning, and with plain DQN or DDPG
    """
    import gymnasium as gym

    off_policy = "offline-dqn" if isinstance(gym.make(run.env).action_space, gym.spaces.Discrete) else "offline-ddpg"
    return [replace(run, label=name, contender=name) for name in ("behaviour-cloning", off_policy)]


def peers(run: Run, names: list[str]) -> list[Run]:
    """
    :param run: Of an offline algorithm through the zoo
    :param names: Of peers
    :return: The same in the peers
    """
    return [replace(run, label=name, contender=name) for name in names]
