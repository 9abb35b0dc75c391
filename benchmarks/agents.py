"""The trained agents in ``hub/agents``: one of each algorithm, with its card, as the zoo's commands find them."""

import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch as th
from huggingface_hub import ModelCard

from benchmarks.data import settings
from benchmarks.results import PROJECT
from sb3_ext.zoo.registry import ALGORITHMS

FOLDER = PROJECT / "hub" / "agents"
# The zoo's first run of an environment, and the seed of all of these agents
SEED = 1
MAX_WEIGHTS = 1_000_000
ENVIRONMENTS = {
    **{algorithm.key: "CartPole-v1" for algorithm in ALGORITHMS},
    "option_critic": "FourRooms-v0",
    "sac_ae": "PixelPendulum-v1",
}


def make(algos: Iterable[str]) -> None:
    """
    Train agents and write their cards. An older agent is there until the new one is complete.

    :param algos: Keys in the zoo
    """
    for algo in algos:
        env = ENVIRONMENTS[algo]
        with tempfile.TemporaryDirectory(dir=PROJECT) as scratch:
            of_agent = ["--algo", algo, "--env", env, "-f", "agents"]
            every = int(settings(algo, env, [])["n_timesteps"]) // 10
            evaluations = ["--eval-freq", str(every), "--eval-episodes", "5"]
            _run("rl_zoo3.train", *of_agent, "--seed", str(SEED), "--num-threads", "1", *evaluations, cwd=scratch)
            _run("sb3_ext.hub.push", *of_agent, "--dry-run", "card", "--video-steps", "300", cwd=scratch)
            trained = Path(scratch, "agents", algo, f"{env}_1")
            _keep(trained, Path(scratch, "card"))
            target = FOLDER / algo / trained.name
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            trained.rename(target)
        print(f"{algo}: {target.relative_to(PROJECT)}", flush=True)
    write_index()


def write_index() -> None:
    """The page that lists the agents that are there, with their cards and their returns."""
    lines = [
        "# Trained agents",
        "One of each algorithm, trained by `python -m benchmarks agents` with the hyperparameters of this package and the\n"
        f"seed {SEED}, saved without the state of their optimizers. The zoo plays them:",
        "```sh\npython -m rl_zoo3.enjoy --algo vpg --env CartPole-v1 -f hub/agents\n```",
    ]
    rows = ["| agent | environment | mean return |", "|---|---|---|"]
    for path in sorted(FOLDER.glob("*/*/README.md")):
        (result,) = ModelCard.load(path).data.eval_results
        link = path.parent.relative_to(FOLDER).as_posix()
        rows.append(f"| [{link.split('/')[0]}]({link}/README.md) | {result.dataset_name} | {result.metric_value} |")
    (FOLDER / "README.md").write_text("\n\n".join([*lines, "\n".join(rows)]) + "\n")


def _run(module: str, *arguments: str, cwd: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-m", module, *arguments], cwd=cwd, check=True)


def drop_optimizer_state(path: Path) -> None:
    """
    The state of an optimizer is twice as large as what it trains, and no agent needs it to be played.

    :param path: A model that SB3 has saved, replaced by one whose optimizers have not done a step
    """
    temporary = path.with_suffix(".tmp")
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            content = before.read(name)
            if name.endswith("optimizer.pth"):
                buffer = io.BytesIO()
                th.save({**th.load(io.BytesIO(content), weights_only=True), "state": {}}, buffer)
                content = buffer.getvalue()
            after.writestr(name, content)
    temporary.replace(path)


def _keep(trained: Path, card: Path) -> None:
    """What the zoo needs to play the agent, and of the card what is small."""
    model = trained / f"{trained.name.removesuffix('_1')}.zip"
    drop_optimizer_state(model)
    shown = [path for path in card.iterdir() if path.suffix in (".md", ".png", ".gif")]
    weights = list(card.glob("agent-*.safetensors"))
    if sum(path.stat().st_size for path in weights) <= MAX_WEIGHTS:
        shown += [*weights, card / "agent.json"]
    for path in trained.iterdir():
        if path.is_file() and path != model:
            path.unlink()
    # Where this repository lies on the machine that trained
    for path in trained.glob("*/command.txt"):
        path.unlink()
    for path in shown:
        shutil.copy(path, trained / path.name)
