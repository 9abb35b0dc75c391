"""
Records the episodes of an agent of the RL Zoo as a Minari data set: ``python -m sb3_ext.offline.collect --help``.

Every episode depends only on the seed, its number and the settings, never on when the command was killed and started again:
episodes are played in rounds, one per parallel environment, and a round is seeded, played and kept as a whole.
"""

import argparse
import hashlib
import importlib
import itertools
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import rl_zoo3.import_envs  # noqa: F401
import torch as th
from gymnasium import spaces
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, StoreDict
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, sync_envs_normalization
from tqdm import tqdm

import sb3_ext
from sb3_ext.offline.catalog import local_root
from sb3_ext.offline.errors import AgentError, DatasetError, EmptyDatasetError
from sb3_ext.offline.recording import Episode, EpisodeRecorder, insert_recorder
from sb3_ext.offline.writing import EpisodeStore
from sb3_ext.zoo import register
from sb3_ext.zoo.agents import add_choice_of_agent, find_agent, load_agent

NOISES = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}
VEC_ENVS: dict[str, type[VecEnv]] = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}


def parse(argv: list[str]) -> argparse.Namespace:
    """
    :param argv: the arguments of the command
    :return: the checked arguments
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_ext.offline.collect",
        description="Record the episodes of an agent of the RL Zoo as a Minari data set. "
        "Killed, it goes on where it was when the same command is run again.",
    )
    parser.add_argument("--algo", help="RL algorithm of the agent", default="ppo", choices=list(ALGOS.keys()))
    parser.add_argument("--env", help="environment ID", type=EnvironmentName, default="CartPole-v1")
    parser.add_argument("--dataset-id", help="Minari id of the new data set, e.g. halfcheetah/noisy-v0", required=True)
    parser.add_argument("--output", help="folder to write the data set to, instead of Minari's folder", type=Path)

    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--n-episodes", help="number of episodes to record", type=int)
    amount.add_argument(
        "--while-learning",
        help="train the agent from scratch for this number of steps, with the zoo's hyperparameters, and record all of them; "
        "algorithms that collect whole rollouts finish the last one",
        type=int,
        metavar="N_TIMESTEPS",
    )

    agent = parser.add_argument_group("the agent, as for rl_zoo3.enjoy")
    add_choice_of_agent(agent)
    choice = agent.add_mutually_exclusive_group()
    choice.add_argument("--deterministic", help="use deterministic actions (default, but for Atari)", action="store_true")
    choice.add_argument("--stochastic", help="sample actions from the policy", action="store_true")

    noise = parser.add_argument_group("exploration")
    noise.add_argument("--epsilon", help="probability of a uniformly random action, 0 to 1", type=float, default=0.0)
    noise.add_argument("--noise-type", help="noise added to the actions (Box only)", choices=list(NOISES))
    noise.add_argument(
        "--noise-std",
        help="its standard deviation, where [-1, 1] is the range of every action; clipped",
        type=float,
        default=0.1,
    )

    envs = parser.add_argument_group("environments")
    envs.add_argument("--n-envs", help="number of parallel environments", default=1, type=int)
    envs.add_argument("--vec-env", help="VecEnv type", default="dummy", choices=list(VEC_ENVS))
    envs.add_argument("--max-episode-steps", help="truncate episodes after this number of steps", type=int)
    envs.add_argument("--env-kwargs", help="keyword arguments for the environment", nargs="+", action=StoreDict, default={})
    envs.add_argument("--gym-packages", help="packages that register environments", nargs="+", default=[])

    parser.add_argument("--seed", help="random generator seed", type=int, default=0)
    parser.add_argument(
        "--ref-max-score", help="return that counts as 100 (default: the agent's mean, without exploration)", type=float
    )
    parser.add_argument("--n-ref-episodes", help="episodes for the reference scores", type=int, default=20)
    parser.add_argument("--num-threads", help="number of threads for PyTorch", default=1, type=int)
    args = parser.parse_args(argv)

    for package in args.gym_packages:
        importlib.import_module(package)
    if not re.fullmatch(r"([-\w][-\w/]*[-\w]/)?[-\w]+-v\d+", args.dataset_id):
        parser.error(f"--dataset-id must look like name-v0 or folder/name-v0, not {args.dataset_id}")
    if args.env.gym_id not in gym.registry:
        parser.error(f"{args.env} is not in the gymnasium registry (see --gym-packages)")
    if not 0 <= args.epsilon <= 1:
        parser.error(f"--epsilon must be between 0 and 1, not {args.epsilon}")
    if args.while_learning and (args.epsilon or args.noise_type or args.stochastic):
        parser.error("--while-learning records the algorithm's own exploration: no --epsilon, --noise-type or --stochastic")
    for name in ("n_episodes", "while_learning", "n_envs", "n_ref_episodes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def episode_seed(seed: int, purpose: int, index: int) -> int:
    """
    :param seed: of the command
    :param purpose: 0 for the data set, 1 for the reference scores
    :param index: number of the episode
    :return: the seed of the environment for this episode
    """
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0] >> 1) + index


class Agent:
    """
    Chooses actions in rounds of one episode per environment.

    :param model: trained agent
    :param env: the environments, as the model sees them
    :param deterministic: whether the policy's mode is taken
    :param epsilon: probability of a uniformly random action
    :param noise_type: key of ``NOISES``
    :param noise_std: standard deviation, in the policy's units, in which all actions range over [-1, 1]
    :raises AgentError: with noise for actions that are not a bounded Box
    """

    def __init__(
        self,
        model: BaseAlgorithm,
        env: VecEnv,
        deterministic: bool = True,
        epsilon: float = 0.0,
        noise_type: str | None = None,
        noise_std: float = 0.0,
    ) -> None:
        self.model = model
        self.env = env
        self.deterministic = deterministic
        self.epsilon = epsilon
        self.noise: VectorizedActionNoise | None = None
        if noise_type is not None:
            space = env.action_space
            if not isinstance(space, spaces.Box) or not space.is_bounded():
                raise AgentError(f"Action noise needs a bounded Box action space, not {space}; --epsilon works with any.")
            mean, sigma = np.zeros(space.shape), np.full(space.shape, noise_std)
            self.noise = VectorizedActionNoise(NOISES[noise_type](mean, sigma), env.num_envs)

    def start(self, seed: int) -> None:
        """
        Begin a round.

        :param seed: of everything the agent draws in it
        """
        set_random_seed(seed)
        self.env.action_space.seed(seed)
        self._state: tuple[np.ndarray, ...] | None = None
        self._episode_starts = np.ones(self.env.num_envs, dtype=bool)
        if self.noise is not None:
            self.noise.reset()

    def act(self, observations: Any) -> np.ndarray:
        """
        :param observations: of all environments
        :return: their actions, in the environment's units
        """
        actions, self._state = self.model.predict(observations, self._state, self._episode_starts, self.deterministic)
        self._episode_starts = np.zeros_like(self._episode_starts)
        if self.noise is not None:
            policy: Any = self.model.policy
            actions = policy.unscale_action(np.clip(policy.scale_action(actions) + self.noise(), -1, 1))
        if self.epsilon > 0:
            for i in np.flatnonzero(np.random.random(len(actions)) < self.epsilon):
                actions[i] = self.env.action_space.sample()
        return actions


def play_round(agent: Agent, recorder: EpisodeRecorder, first_seed: int) -> list[Episode]:
    """
    Play one episode in every environment; those that are done early go on, unrecorded, until all are.

    :param agent: chooses the actions
    :param recorder: in the agent's environments
    :param first_seed: seed of the first environment; the others count on from it
    :return: the episodes, in the order of the environments
    """
    episodes: dict[int, Episode] = {}
    # Of each environment the first episode
    recorder.on_episode = episodes.setdefault  # type: ignore[assignment]
    agent.start(first_seed)
    if agent.env.has_attr("was_real_done"):
        # EpisodicLifeEnv would go on with the game before, whatever the seed
        agent.env.env_method("set_wrapper_attr", "was_real_done", True)
    agent.env.seed(first_seed)
    observations = agent.env.reset()
    while len(episodes) < agent.env.num_envs:
        observations, _, _, _ = agent.env.step(agent.act(observations))
    return [episodes[i] for i in range(agent.env.num_envs)]


def mean_return(agent: Agent, recorder: EpisodeRecorder, seed: int, n_episodes: int) -> float:
    """
    :param agent: to evaluate
    :param recorder: in its environments
    :param seed: of the command
    :param n_episodes: number of episodes
    :return: the mean of their undiscounted returns
    """
    returns: list[float] = []
    while len(returns) < n_episodes:
        episodes = play_round(agent, recorder, episode_seed(seed, 1, len(returns)))
        returns += [float(episode.rewards.sum(dtype=np.float64)) for episode in episodes]
    return float(np.mean(returns[:n_episodes]))


def reference_scores(args: argparse.Namespace, model: BaseAlgorithm, env: VecEnv, recorder: EpisodeRecorder) -> dict[str, Any]:
    """
    :return: metadata for normalised returns: means of a random and of the trained agent, unless the latter is given
    """
    maximum = args.ref_max_score
    if maximum is None:
        maximum = mean_return(Agent(model, env), recorder, args.seed, args.n_ref_episodes)
    minimum = mean_return(Agent(model, env, epsilon=1.0), recorder, args.seed, args.n_ref_episodes)
    return {"ref_min_score": minimum, "ref_max_score": maximum, "num_episodes_average_score": args.n_ref_episodes}


def env_kwargs_of(args: argparse.Namespace) -> dict[str, Any]:
    """:return: the keyword arguments of the command line for the environment"""
    limit = {} if args.max_episode_steps is None else {"max_episode_steps": args.max_episode_steps}
    return {**args.env_kwargs, **limit}


def collect_episodes(args: argparse.Namespace, target: Path, metadata: dict[str, Any]) -> None:
    """
    Record episodes of a trained agent.

    :param args: of the command
    :param target: folder of the data set
    :param metadata: of the command
    :raises DatasetError: when the agent, the target or the room on the disk is missing
    """
    model_path, log_path = find_agent(args)
    model_hash = hashlib.sha256(Path(model_path).read_bytes()).hexdigest()
    store = EpisodeStore(target, settings_of(args, model=model_hash))
    vec_env_cls = ExperimentManager.default_vec_env_cls or VEC_ENVS[args.vec_env]
    model, env, env_kwargs = load_agent(args, model_path, log_path, args.n_envs, vec_env_cls, env_kwargs_of(args))
    env, recorder = insert_recorder(env, lambda index, episode: None)

    random_env = ExperimentManager.is_atari(args.env.gym_id) or ExperimentManager.is_minigrid(args.env.gym_id)
    deterministic = not (args.stochastic or (random_env and not args.deterministic))
    agent = Agent(model, env, deterministic, args.epsilon, args.noise_type, args.noise_std)
    with tqdm(total=args.n_episodes, initial=len(store), unit="episode", disable=None) as progress:
        for first in range(0, args.n_episodes, args.n_envs):
            indices = range(first, min(first + args.n_envs, args.n_episodes))
            missing = [index for index in indices if index not in store]
            if missing:
                episodes = play_round(agent, recorder, episode_seed(args.seed, 0, first))
                for index in missing:
                    store.add(index, episodes[index - first], episode_seed(args.seed, 0, index))
                    progress.update()
    finish(args, store, {**metadata, **reference_scores(args, model, env, recorder)}, recorder, env_kwargs)
    env.close()


class _RecordingManager(ExperimentManager):
    on_episode: Callable[[int, Episode], None]
    recorder: EpisodeRecorder

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        env, self.recorder = insert_recorder(super().create_envs(n_envs, eval_env, no_log), self.on_episode)
        return env


def collect_learning(args: argparse.Namespace, target: Path, metadata: dict[str, Any]) -> None:
    """
    Train an agent from scratch and record everything it experiences. A killed training starts again from its beginning.

    :param args: of the command
    :param target: folder of the data set
    :param metadata: of the command
    :raises DatasetError: when the target exists, nothing was experienced or the disk is full
    """
    store = EpisodeStore(target, settings_of(args))
    store.clear()
    set_random_seed(args.seed)
    env_kwargs = env_kwargs_of(args)
    with tempfile.TemporaryDirectory() as log_folder:
        manager = _RecordingManager(
            args,
            args.algo,
            args.env,
            log_folder,
            n_timesteps=args.while_learning,
            eval_freq=-1,
            log_interval=-2,
            # Some hyperparameters come with keyword arguments for the environment, which the manager changes
            env_kwargs=deepcopy(env_kwargs),
            seed=args.seed,
            device=args.device,
            vec_env_type=args.vec_env,
            show_progress=sys.stderr.isatty(),
            verbose=0,
        )
        numbers = itertools.count()
        manager.on_episode = lambda _, episode: store.add(next(numbers), episode, None)
        experiment = manager.setup_experiment()
        assert experiment is not None, "the manager returns no model only when it optimises hyperparameters"
        model = experiment[0]
        manager.learn(model)
        if model.num_timesteps < args.while_learning:
            # The manager has taken the interrupt for the wish to end the training early
            raise KeyboardInterrupt
        manager.recorder.finish()
        if len(store) == 0:
            raise EmptyDatasetError(
                f"{args.algo} does not act in the environment while it learns: there is nothing to record."
            )
        learning_env = model.get_env()
        manager.on_episode = lambda *_: None
        env = manager.create_envs(1, eval_env=True, no_log=True)
        assert learning_env is not None
        sync_envs_normalization(learning_env, env)
    finish(
        args, store, {**metadata, **reference_scores(args, model, env, manager.recorder)}, manager.recorder, manager.env_kwargs
    )
    env.close()


def settings_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """:return: what an unfinished collection must have in common with one that continues it, as JSON types"""
    unrelated = ("dataset_id", "output", "folder", "exp_id", "load_best", "load_checkpoint", "load_last_checkpoint")
    settings = {key: value for key, value in vars(args).items() if key not in unrelated}
    return {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in {**settings, **more}.items()}


def finish(
    args: argparse.Namespace,
    store: EpisodeStore,
    metadata: dict[str, Any],
    recorder: EpisodeRecorder,
    env_kwargs: dict[str, Any],
) -> None:
    """Write the data set and say what it is."""
    spec = deepcopy(gym.spec(args.env.gym_id))
    kwargs = dict(env_kwargs)
    spec.max_episode_steps = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    spec.kwargs.update(kwargs)
    returns = store.returns()
    metadata = {
        **metadata,
        "env_spec": spec.to_json(),
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
    }
    store.finish(recorder.observation_space, recorder.action_space, metadata)
    print(f"{len(returns)} episodes, mean return {returns.mean():.1f} +/- {returns.std():.1f}, in {store.target}")


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the arguments, those of the process by default
    """
    argv = sys.argv[1:] if argv is None else argv
    # The start-up hook may be switched off
    register()
    args = parse(argv)
    th.set_num_threads(args.num_threads)
    metadata = {
        "dataset_id": args.dataset_id,
        "algorithm_name": args.algo,
        "command": shlex.join(["python", "-m", "sb3_ext.offline.collect", *argv]),
        "seed": args.seed,
        "sb3_ext_version": sb3_ext.__version__,
    }
    collect = collect_learning if args.while_learning else collect_episodes
    try:
        collect(args, args.output or local_root() / args.dataset_id, metadata)
    except DatasetError as error:
        print(f"sb3-ext: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
