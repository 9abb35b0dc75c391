"""What is done to the modules of rl-zoo3 and of its Hub integration once they are imported.

Two things: our algorithms are added, and gaps that stop the zoo's commands are closed. Each patch takes the module, leaves
alone what upstream provides itself, and says which gap it is there for, so that it can go when the gap has gone.
"""

import functools
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import sb3_ext
from sb3_ext.zoo import pictures
from sb3_ext.zoo.registry import ALGORITHMS


def register_classes(utils: Any) -> None:
    """``--algo``: all modules of the zoo share this one dict, so it is changed, never rebound."""
    for algorithm in ALGORITHMS:
        if algorithm.key not in utils.ALGOS:
            utils.ALGOS[algorithm.key] = resolve_name(algorithm.class_path)


def register_search_spaces(hyperparams_opt: Any) -> None:
    """``-optimize`` and ``--trial-id``."""
    for algorithm in ALGORITHMS:
        if algorithm.key not in hyperparams_opt.HYPERPARAMS_SAMPLER:
            hyperparams_opt.HYPERPARAMS_SAMPLER[algorithm.key] = resolve_name(algorithm.sampler)
            hyperparams_opt.HYPERPARAMS_CONVERTER[algorithm.key] = resolve_name(algorithm.converter)


def register_environments(import_envs: Any) -> None:
    """Four Rooms is no environment of gymnasium's."""
    import_module("sb3_ext.envs")


def register_minatar(import_envs: Any) -> None:
    """MinAtar announces its environments through an entry point that gymnasium no longer reads since version 1."""
    import gymnasium

    if not find_spec("minatar") or "MinAtar/Breakout-v1" in gymnasium.registry:
        return
    # As its own function, which comes with an import of more than a second
    for game in ("asterix", "breakout", "freeway", "seaquest", "space_invaders"):
        for version, minimal in enumerate((False, True)):
            gymnasium.register(
                f"MinAtar/{game.title().replace('_', '')}-v{version}",
                entry_point="minatar.gym:BaseEnv",
                kwargs={"game": game, "use_minimal_action_set": minimal},
            )


def find_own_hyperparameters(exp_manager: Any) -> None:
    """Without ``--conf-file`` the zoo looks for ``<algo>.yml`` among its own files only."""
    original = exp_manager.ExperimentManager.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        chosen = signature.bind(self, *args, **kwargs).arguments.get("config")
        if not chosen and not os.path.isfile(self.config):
            # In site-packages the folder lies inside the package, in the repository beside it
            package = Path(sb3_ext.__file__).parent
            paths = [folder / f"hyperparams/{self.algo}.yml" for folder in (package, package.parent)]
            self.config = next((str(path) for path in paths if path.is_file()), self.config)

    exp_manager.ExperimentManager.__init__ = init


def report_unusable_data(exp_manager: Any) -> None:
    """A data set that cannot be used is the user's to mend: a message and an exit status, no traceback."""
    from optuna.trial import Trial, TrialState

    from sb3_ext.offline.errors import DatasetError

    manager = exp_manager.ExperimentManager
    setup_experiment, learn, objective = manager.setup_experiment, manager.learn, manager.objective

    def leave(error: DatasetError) -> NoReturn:
        print(f"sb3-ext: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status)

    @functools.wraps(setup_experiment)
    def setup_or_leave(self: Any) -> Any:
        try:
            return setup_experiment(self)
        except DatasetError as error:
            leave(error)

    @functools.wraps(learn)
    def learn_or_leave(self: Any, model: Any) -> None:
        try:
            learn(self, model)
        except DatasetError as error:
            # A trained agent, given with -i, reads its data only now
            leave(error)

    @functools.wraps(objective)
    def evaluate_or_leave(self: Any, trial: Trial) -> float:
        try:
            return objective(self, trial)
        except DatasetError as error:
            # Optuna ends trials for exceptions only, and SystemExit is none: without this the trial would run forever
            trial.study.tell(trial, state=TrialState.FAIL)
            leave(error)

    manager.setup_experiment, manager.learn, manager.objective = setup_or_leave, learn_or_leave, evaluate_or_leave


def read_schedules(exp_manager: Any) -> None:
    """In a yml, ``lin_0.02`` falls linearly to 0 for the arguments that the zoo knows; our algorithms have more."""
    manager = exp_manager.ExperimentManager
    original = manager._preprocess_schedules

    @functools.wraps(original)
    def preprocess(hyperparams: dict[str, Any]) -> dict[str, Any]:
        for key in ("actor_learning_rate", "critic_learning_rate", "ent_coef", "target_kl", "termination_learning_rate"):
            value = hyperparams.get(key)
            if not isinstance(value, str):
                continue
            if value.startswith("lin_"):
                hyperparams[key] = exp_manager.SimpleLinearSchedule(value.removeprefix("lin_"))
            # YAML takes 1e-2 for text. SB3's SAC takes text for ent_coef, numbers as well as "auto".
            elif key != "ent_coef":
                raise ValueError(f"{key} must be a number, such as 0.01 or !!float 1e-2, or lin_0.01, but got {value!r}.")
        return original(hyperparams)

    manager._preprocess_schedules = staticmethod(preprocess)


def supply_generate_metadata(push_to_hub: Any) -> None:
    """``rl_zoo3.push_to_hub`` wants this name, for a dict; sb3-team-hf-integration 3 made it private and returns an object."""
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """While it is open, the command ``ffmpeg`` exists: the system's, or else the binary that imageio-ffmpeg brings."""
    if shutil.which("ffmpeg"):
        yield
        return
    from imageio_ffmpeg import get_ffmpeg_exe

    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because symbolic links need rights on Windows
        shutil.copy(get_ffmpeg_exe(), Path(folder, "ffmpeg.exe" if os.name == "nt" else "ffmpeg"))
        os.environ["PATH"] = folder + os.pathsep + path
        try:
            yield
        finally:
            os.environ["PATH"] = path


def find_ffmpeg(push_to_hub: Any) -> None:
    """The replay video is converted by the command ``ffmpeg``, and when there is none the model goes up without its video."""
    original = push_to_hub._generate_replay

    @functools.wraps(original)
    def generate_replay(*args: Any, **kwargs: Any) -> None:
        with ffmpeg_on_path():
            original(*args, **kwargs)

    push_to_hub._generate_replay = generate_replay


def draw_pictures(push_to_hub: Any) -> None:
    """Pictures that an algorithm has beside the video are drawn where the agent is evaluated for its model card,"""
    original = push_to_hub._evaluate_agent

    @functools.wraps(original)
    def evaluate(model: Any, eval_env: Any, n_eval_episodes: int, is_deterministic: bool, local_path: Path) -> Any:
        result = original(model, eval_env, n_eval_episodes, is_deterministic, local_path)
        pictures.draw(model, eval_env, is_deterministic, Path(local_path))
        return result

    push_to_hub._evaluate_agent = evaluate


def show_pictures(repocard: Any) -> None:
    """and shown by the card, to which ``rl_zoo3.push_to_hub`` adds nothing after its text but metadata, with this function."""
    original = repocard.metadata_save

    @functools.wraps(original)
    def save(local_path: Any, data: Any) -> None:
        with Path(local_path).open("a", encoding="utf-8") as card:
            card.write(pictures.section(Path(local_path).parent))
        original(local_path, data)

    repocard.metadata_save = save


def raise_error_of_requests(load_from_hub: Any) -> None:
    """
    ``rl_zoo3.load_from_hub`` takes an ``HTTPError`` of requests for "no such file", for agents trained without VecNormalize;
    huggingface_hub has left requests, so that downloading any of those ends in a traceback.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from requests.exceptions import HTTPError

    original = load_from_hub.load_from_hub

    @functools.wraps(original)
    def download(*args: Any, **kwargs: Any) -> str:
        try:
            return original(*args, **kwargs)
        except LocalEntryNotFoundError:
            # That the Hub could not be asked
            raise
        except EntryNotFoundError as error:
            raise HTTPError(str(error)) from error

    load_from_hub.load_from_hub = download


PATCHES: dict[str, tuple[Callable[[Any], None], ...]] = {
    "huggingface_hub.repocard": (show_pictures,),
    "huggingface_sb3.load_from_hub": (raise_error_of_requests,),
    "huggingface_sb3.push_to_hub": (supply_generate_metadata, find_ffmpeg, draw_pictures),
    "rl_zoo3.exp_manager": (find_own_hyperparameters, report_unusable_data, read_schedules),
    "rl_zoo3.hyperparams_opt": (register_search_spaces,),
    "rl_zoo3.import_envs": (register_environments, register_minatar),
    "rl_zoo3.utils": (register_classes,),
}


def apply(module: Any) -> None:
    """
    Patch a module of the zoo. Doing it again changes nothing.

    :param module: One of the modules named in ``PATCHES``
    """
    if not hasattr(module, "_patched_by_sb3_ext"):
        for patch in PATCHES[module.__name__]:
            patch(module)
        module._patched_by_sb3_ext = True
