"""Base class of algorithms that learn from a fixed data set."""

from __future__ import annotations

import io
import pathlib
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import safe_mean

from sb3_ext.common.arguments import check_range
from sb3_ext.offline import TransitionDataset, load_dataset
from sb3_ext.offline.errors import NormalizedEnvError

if TYPE_CHECKING:
    from minari import MinariDataset

SelfOfflineAlgorithm = TypeVar("SelfOfflineAlgorithm", bound="OfflineAlgorithm")

#: Losses in the log are means over at most this many latest updates.
LOSS_WINDOW = 100


class OfflineAlgorithm(BaseAlgorithm):
    """
    Learns from a data set of transitions, without acting in the environment.

    The environment gives the spaces and serves the callbacks that evaluate. One timestep is one gradient update:
    callbacks run once per update, and ``num_timesteps`` counts updates.

    The data are read and checked when the algorithm is constructed. ``load`` restores a saved model without them, so
    that acting needs no data set; they are read again when ``learn`` is called.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment whose spaces the data must fit (if registered in Gym, can be str)
    :param dataset: A Minari id, a path to a Minari data set folder or to a ``replay_buffer.pkl`` of the zoo, an SB3
        ``ReplayBuffer``, or a ``minari.MinariDataset``
    :param learning_rate: Learning rate of every optimizer, > 0; it can be a function of the current progress
        remaining (from 1 to 0)
    :param batch_size: Number of transitions in one update, >= 1
    :param gamma: Discount factor, in [0, 1]
    :param allow_pickle: Consent to unpickle ``dataset``. A pickle can run any code when it is read: use it only for
        files that you made yourself.
    :param optimize_memory_usage: Read the transitions from disk while training, for data larger than memory
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param stats_window_size: Unused by offline training, accepted as every SB3 algorithm does
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param supported_action_spaces: The action spaces supported by the algorithm
    :raises ValueError: if the action space is not supported, a number is out of range, or the data cannot be used
        (:class:`sb3_ext.offline.DatasetError`)
    """

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        dataset: str | pathlib.Path | ReplayBuffer | MinariDataset | None,
        learning_rate: float | Schedule,
        batch_size: int,
        gamma: float,
        allow_pickle: bool = False,
        optimize_memory_usage: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        supported_action_spaces: tuple[type[spaces.Space], ...] = (),
    ) -> None:
        super().__init__(
            policy=policy,
            env=env,
            learning_rate=learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.dataset = dataset
        self.batch_size = batch_size
        self.gamma = gamma
        self.allow_pickle = allow_pickle
        self.optimize_memory_usage = optimize_memory_usage
        self.transitions: TransitionDataset | None = None
        self._losses: dict[str, deque[th.Tensor]] = {}
        # The generators' states at the time of saving, with the seed and the type of device that they belong to
        self._saved_generators: tuple[int | None, str, list[th.Tensor]] | None = None
        if env is not None and not isinstance(self.action_space, supported_action_spaces):
            names = " or ".join(space.__name__ for space in supported_action_spaces)
            raise ValueError(f"{type(self).__name__} supports {names} action spaces, but got {self.action_space}.")
        check_range(self, 1, float("inf"), "batch_size")
        check_range(self, 0, 1, "gamma")

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        # All randomness of training comes from here: evaluation callbacks, which draw from the global generator, do not
        # change the result of a training run. Batches have a generator of their own, so that they can be read ahead.
        self.batch_generator = th.Generator(device=self.device)
        self.generator = th.Generator(device=self.device)
        for generator in (self.batch_generator, self.generator):
            generator.manual_seed(int(th.randint(2**62, ())))
        if self._saved_generators is not None and self._saved_generators[:2] == (self.seed, self.device.type):
            for generator, state in zip((self.batch_generator, self.generator), self._saved_generators[2], strict=True):
                generator.set_state(state)
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **{**self._policy_arguments(), **self.policy_kwargs}
        )
        self.policy = self.policy.to(self.device)

    def _policy_arguments(self) -> dict[str, Any]:
        """Arguments of the policy that are constructor parameters of the algorithm."""
        return {}

    def _check_env(self) -> None:
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs:
            raise NormalizedEnvError(
                "The training environment normalizes observations (VecNormalize), but the data set holds raw ones. Switch "
                "that off: VecNormalize(env, norm_obs=False), or in the zoo's yml leave `normalize` out or write "
                '`normalize: "dict(norm_obs=False, norm_reward=True)"`.'
            )

    def _load_transitions(self) -> None:
        self._check_env()
        spec = None if self.env is None else self.env.get_attr("spec")[0]
        self.transitions = load_dataset(
            self.dataset,
            self.observation_space,
            self.action_space,
            device=self.device,
            allow_pickle=self.allow_pickle,
            optimize_memory_usage=self.optimize_memory_usage,
            env_id=None if spec is None else spec.id,
        )
        if self.verbose >= 1:
            print(f"Read {len(self.transitions)} transitions ({self.transitions.nbytes / 1e6:.1f} MB)")

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("Learning needs an environment for its spaces and for evaluation: call set_env(env) first.")
        # It may be another one than that for which the data were read
        self._check_env()
        if self.transitions is None:
            self._load_transitions()
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def learn(
        self: SelfOfflineAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineAlgorithm:
        """
        Return a trained model.

        :param total_timesteps: Number of gradient updates
        :param callback: Callback(s) called after every update
        :param log_interval: Number of updates between two writes of the log (None: no writes)
        :param tb_log_name: The name of the run for TensorBoard logging
        :param reset_num_timesteps: Whether or not to reset the count of updates (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        :raises ValueError: if there is no environment, the data cannot be used, or the training has diverged
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        callback.update_locals(locals())

        while self.num_timesteps < total_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.train(gradient_steps=1, batch_size=self.batch_size)
            self.num_timesteps += 1
            if self.num_timesteps % LOSS_WINDOW == 0:
                self._check_finite()
            if not callback.on_step():
                break
            if log_interval is not None and self.num_timesteps % log_interval == 0:
                self.dump_logs()

        self._check_finite()
        callback.on_training_end()
        return self

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """
        Sample the data set and do the updates.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions in one update
        """
        raise NotImplementedError

    def _record_losses(self, **losses: th.Tensor) -> None:
        """
        Keep the latest losses for the log; they stay on the device until the log is written.

        :param losses: Scalars by name
        """
        for name, loss in losses.items():
            self._losses.setdefault(name, deque(maxlen=LOSS_WINDOW)).append(loss.detach())

    def _check_finite(self) -> None:
        latest = {name: losses[-1].item() for name, losses in self._losses.items()}
        if not all(abs(loss) < float("inf") for loss in latest.values()):
            raise ValueError(
                f"Training diverged: the losses are {latest} after {self.num_timesteps} updates. Try a smaller learning rate."
            )

    def dump_logs(self) -> None:
        """Write the log: losses as means over the latest updates, speed in updates per second."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, losses in self._losses.items():
            self.logger.record(f"train/{name}", safe_mean([loss.item() for loss in losses]))
        self.logger.dump(step=self.num_timesteps)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        states = [generator.get_state() for generator in (self.batch_generator, self.generator)]
        self._saved_generators = (self.seed, self.device.type, states)
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        excluded = [*super()._excluded_save_params(), "transitions", "batch_generator", "generator", "_losses"]
        # A name can be resolved again; data in memory would be copied into every checkpoint.
        if not isinstance(self.dataset, (str, pathlib.Path)):
            excluded.append("dataset")
        return excluded
