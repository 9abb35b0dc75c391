"""The virtual environments of the peers, and the processes that run in them."""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gymnasium import spaces

PROJECT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = PROJECT / ".peers"

# One environment each: d3rlpy pins gymnasium==1.0.0. The same torch in all of them.
TORCH = "torch==2.13.0"
PEERS = {
    "d3rlpy": ["d3rlpy==2.8.1", "gymnasium==1.0.0"],
    "tianshou": ["tianshou==2.0.1", "gymnasium[box2d]"],
    "torchrl": ["torchrl==0.14.1"],
    "sbx": ["sbx-rl==0.28.0", "gymnasium[box2d]"],
}


def interpreter(name: str, folder: Path) -> Path:
    """
    :param name: A contender
    :param folder: Where ``python -m benchmarks peers`` made the environments
    :return: The Python to run it with
    :raises FileNotFoundError: if the peer has no environment there
    """
    if name not in PEERS:
        return Path(sys.executable)
    python = folder / name / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} does not exist: run `python -m benchmarks peers --dir {folder}` first.")
    return python


def install(folder: Path, names: list[str]) -> None:
    """
    :param folder: Where to make one virtual environment for each peer; one that is there is brought up to date
    :param names: Keys of ``PEERS``
    """
    for name in names:
        if not (folder / name / "pyvenv.cfg").exists():
            venv.create(folder / name, with_pip=True, symlinks=os.name != "nt")
        pip = [str(interpreter(name, folder)), "-m", "pip", "install", "--quiet", TORCH]
        # torch alone first, so that a wheel that pip can find locally is taken before the peer's own choice
        subprocess.run(pip, check=True)
        subprocess.run([*pip, *PEERS[name]], check=True)
        print(f"{name}: {interpreter(name, folder)}")


class Worker:
    """
    A contender in a process of its own, waiting for requests until it is closed.

    :param name: A key of ``CONTENDERS`` or ``ON_POLICY_CONTENDERS`` in :mod:`benchmarks.workers`
    :param folder: Where the peers' environments are
    :param threads: Of OpenMP
    """

    def __init__(self, name: str, folder: Path, threads: int = 1) -> None:
        self.name = name
        # What libraries print is of interest only if they fail
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [interpreter(name, folder), "-m", "benchmarks.workers", name],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """
        :param verb: See :func:`benchmarks.workers.serve`
        :param arguments: Of the verb
        :return: The answer
        :raises RuntimeError: if the process has died
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"verb": verb, **arguments}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"The worker {self.name} ended with status {status}:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()
        self.log.close()


class RemoteAgent:
    """
    A trained contender, as SB3's ``evaluate_policy`` wants an agent.

    :param worker: That has been built
    :param action_space: Of the environment in which it acts
    """

    def __init__(self, worker: Worker, action_space: spaces.Space) -> None:
        self.worker = worker
        self.action_space = action_space

    def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
        """
        :param observation: (batch, ...)
        :return: Actions in the environment's units, and no state
        """
        answer = self.worker.ask("predict", observations=observation.tolist(), image=observation.dtype == np.uint8)
        actions = np.array(answer["actions"])
        if isinstance(self.action_space, spaces.Box):
            low, high = self.action_space.low, self.action_space.high
            actions = np.clip(low + 0.5 * (actions + 1.0) * (high - low), low, high).astype(np.float32)
        return actions, None
