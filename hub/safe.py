"""Saving and loading agents without pickle: tensors in safetensors, everything else in JSON.

The configuration is read as untrusted input. Classes come from an allow-list, values must have the types of the arguments that
they are for, and the policy is first built without memory, to compare it with the tensors that are there.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her import HerReplayBuffer
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from .allowed import Classes, algorithms, buffers, check_allowed, noises, policies, policy_parts, resolve, shown, table
from .environment import SavedEnv, describe_env, read_env
from .errors import SafeFormatError
from .files import CONFIG_NAME, Tensors, open_tensors, read_config, write_agent
from .values import check_object, check_type, decode, decode_space, encode, encode_space, is_finite

FORMAT, VERSION = "sb3-ext agent", 1
MAX_ENVS = 10_000

_KEYS = (
    "format",
    "version",
    "libraries",
    "algorithm",
    "policy",
    "observation_space",
    "action_space",
    "n_envs",
    "arguments",
    "progress",
    "learning_rates",
    "env",
    "weights_sha256",
)
_LIBRARIES = ("sb3-ext", "stable-baselines3", "sb3-contrib", "gymnasium", "torch", "numpy")
# Where training is
_PROGRESS: dict[str, type] = {
    "num_timesteps": int,
    "_total_timesteps": int,
    "_num_timesteps_at_start": int,
    "_episode_num": int,
    "_n_updates": int,
    "_n_calls": int,
    "_current_progress_remaining": float,
    "exploration_rate": float,
}
# What is saved in another place, and what belongs to the machine: data to read, files to write, consent to unpickle
_NOT_SAVED = {
    "self",
    "policy",
    "env",
    "device",
    "dataset",
    "allow_pickle",
    "tensorboard_log",
    "_init_setup_model",
}
_MAY_BE_INFINITE = {"max_grad_norm", "latent_clip", "target_kl"}


def save_safe(
    model: BaseAlgorithm,
    folder: str | Path,
    env: VecEnv | None = None,
    env_id: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    env_wrappers: Iterable[type[gym.Wrapper] | tuple[type[gym.Wrapper], dict[str, Any]]] = (),
    allow: Iterable[type] = (),
) -> None:
    """
    Save an agent as ``agent.json`` and ``agent-<hash>.safetensors``, which ``load_safe`` reads without unpickling anything.

    Saved are the parameters of all networks, the state of all optimizers, learned numbers such as SAC's entropy coefficient,
    the constructor's arguments, the counters of training, and the environment's wrappers with the statistics of
    ``VecNormalize``. Not saved are the replay buffer, the data set of an offline algorithm, the states of random generators
    and environments, ``tensorboard_log``, and schedules that are neither constant nor linear: those are saved as their
    present value, with a warning.

    An interrupted save leaves what was there before as it was.

    :param model: An algorithm of this package, of SB3, or of sb3-contrib except ARS
    :param folder: Created if it does not exist; an agent that is there is replaced
    :param env: Whose ``VecNormalize``, ``VecFrameStack`` and ``VecTransposeImage`` are saved (None: the model's own)
    :param env_id: Gymnasium id of the environment
    :param env_kwargs: Arguments of the environment
    :param env_wrappers: Wrappers of each single environment, or pairs of wrapper and arguments, the innermost first
    :param allow: Classes beyond the allow-list; whoever loads the agent has to allow them, too
    :raises SafeFormatError: if the agent has something that cannot be saved, such as a class beyond the allow-list, or
        parameters that are not finite
    :raises OSError: if the files cannot be written
    """
    extra = table(allow)
    algorithm = type(model)
    described_env, statistics = describe_env(model.get_env() if env is None else env, env_id, env_kwargs, env_wrappers, extra)
    state, learning_rates = _state(model)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "algorithm": check_allowed(algorithm, {**algorithms(), **extra}, "algorithm"),
        "policy": check_allowed(model.policy_class, {**policies(algorithm), **extra}, "policy"),
        "observation_space": encode_space(model.observation_space, "observation_space"),
        "action_space": encode_space(model.action_space, "action_space"),
        "n_envs": model.n_envs,
        "arguments": _encode_arguments(model, extra),
        # Steps can have been given as 1e6
        "progress": {name: kind(getattr(model, name)) for name, kind in _PROGRESS.items() if hasattr(model, name)},
        "learning_rates": learning_rates,
        "env": described_env,
    }
    # Whatever is wrong is better found now than by whoever loads it
    _Agent.read(config, extra)
    write_agent(Path(folder), config, {**state, **statistics})


def load_safe(
    folder: str | Path,
    env: GymEnv | None = None,
    device: th.device | str = "auto",
    allow: Iterable[type] = (),
    **arguments: Any,
) -> tuple[Any, SavedEnv]:
    """
    Load what ``save_safe`` has written. Nothing is unpickled, and no code runs that the files choose: they can come from
    anybody. What comes next is up to you: ``SavedEnv.make`` runs the code of an environment.

    The model acts as the saved one did, and its training can go on once it has an environment. Not all of a
    training comes along, see ``save_safe``.

    :param folder: With ``agent.json``
    :param env: As for SB3's ``load``: the environment to go on training in, in all of its wrappers (None: none yet)
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param allow: Classes beyond the allow-list that you trust
    :param arguments: Arguments of the algorithm in the place of those in the file, such as ``buffer_size`` or ``dataset``
    :return: The model, and what is needed to build its environment
    :raises SafeFormatError: if the files are damaged, incomplete or contradictory, or name something that is not allowed
    :raises ValueError: if the spaces of ``env`` are not those of the agent
    """
    extra = table(allow)
    config = read_config(Path(folder))
    agent = _Agent.read({key: value for key, value in config.items() if key != "weights_sha256"}, extra)
    unknown = sorted(arguments.keys() - inspect.signature(agent.algorithm).parameters)
    if unknown:
        raise TypeError(f"{agent.algorithm.__name__} has no arguments {unknown}.")
    if env is not None:
        env = agent.algorithm._wrap_env(env, verbose=0)
        check_for_correct_spaces(env, agent.observation_space, agent.action_space)
    sha256 = check_type(config.get("weights_sha256"), str, "weights_sha256")
    with open_tensors(Path(folder), sha256) as tensors:
        saved_env = agent.env.with_statistics(tensors)
        with _refusing_errors(agent.algorithm.__name__):
            model = agent.build(env, device, arguments, tensors)
            _restore(model, agent.learning_rates, tensors)
            tensors.check_all_read()
            if model.use_sde:
                # As SB3's load
                model.policy.reset_noise()  # type: ignore[operator]
            # There are spaces and numbers with which everything but this works
            model.predict(model.observation_space.sample(), deterministic=True)
    return model, saved_env


@contextmanager
def _refusing_errors(name: str) -> Iterator[None]:
    """Arguments, spaces and numbers from a file can make an algorithm fail in any way."""
    try:
        yield
    except SafeFormatError:
        raise
    except Exception as error:
        raise SafeFormatError(
            f"There is no such {name} agent as the files describe ({type(error).__name__}: {error}). If a number is out of "
            "the ordinary: load_safe takes arguments that replace those of the file, such as buffer_size=..."
        ) from error


# ---- Configuration ----


@dataclass(frozen=True)
class _Agent:
    """
    What a configuration says about the agent, checked as far as that is possible without its tensors.

    The fields are those of the configuration.
    """

    algorithm: type[BaseAlgorithm]
    policy: type[BasePolicy]
    observation_space: spaces.Space
    action_space: spaces.Space
    n_envs: int
    arguments: dict[str, Any]
    progress: dict[str, float]
    learning_rates: dict[str, list[float]]
    env: SavedEnv

    @classmethod
    def read(cls, config: dict[str, Any], extra: Classes) -> _Agent:
        """
        :param config: JSON, without the hash of the tensors
        :param extra: Classes beyond the allow-list
        :return: What it says
        :raises SafeFormatError: if something in it is unknown, missing, of the wrong type, or not allowed
        """
        if config.get("format") != FORMAT or type(config.get("version")) is not int:
            raise SafeFormatError(f"{CONFIG_NAME} does not describe an agent: its format is {shown(config.get('format'))}.")
        if config["version"] != VERSION:
            raise SafeFormatError(
                f"{CONFIG_NAME} has version {config['version']} of the format, but this is for {VERSION}. Upgrade sb3-ext."
            )
        check_object(config, CONFIG_NAME, [key for key in _KEYS if key != "weights_sha256"])
        check_type(config["libraries"], dict[str, str], "libraries")
        algorithm = resolve(config["algorithm"], {**algorithms(), **extra}, "algorithm")
        if not issubclass(algorithm, BaseAlgorithm):
            raise SafeFormatError(f"algorithm: {algorithm.__name__} is no algorithm.")
        policy = resolve(config["policy"], {**policies(algorithm), **extra}, "policy")
        if not issubclass(policy, BasePolicy):
            raise SafeFormatError(f"policy: {policy.__name__} is no policy.")
        n_envs = check_type(config["n_envs"], int, "n_envs")
        if not 1 <= n_envs <= MAX_ENVS:
            raise SafeFormatError(f"n_envs must be between 1 and {MAX_ENVS}, but is {n_envs}.")
        return cls(
            algorithm=algorithm,
            policy=policy,
            observation_space=decode_space(config["observation_space"], "observation_space"),
            action_space=decode_space(config["action_space"], "action_space", may_be_dict=False),
            n_envs=n_envs,
            arguments=_decode_arguments(config["arguments"], algorithm, extra),
            progress=_read_progress(config["progress"]),
            learning_rates=check_type(config["learning_rates"], dict[str, list[float]], "learning_rates"),
            env=read_env(config["env"], extra),
        )

    def build(self, env: GymEnv | None, device: th.device | str, arguments: dict[str, Any], tensors: Tensors) -> BaseAlgorithm:
        """
        :param env: Wrapped, its spaces checked
        :param device: Of the model
        :param arguments: In the place of those in the configuration
        :param tensors: Of the agent
        :return: The model as the configuration describes it, with the initial parameters
        :raises SafeFormatError: if there is no such model, or the tensors are not those of its policy
        """
        # As SB3's load: attributes are set between constructor and setup
        constructor: Callable[..., BaseAlgorithm] = self.algorithm
        model = constructor(policy=self.policy, env=env, device=device, _init_setup_model=False)
        attributes = {_attribute(name): value for name, value in {**self.arguments, **arguments}.items()}
        vars(model).update(attributes)
        model.observation_space, model.action_space = self.observation_space, self.action_space
        model.n_envs = self.n_envs if model.env is None else model.env.num_envs
        model.policy_class = _compared_with(tensors, self.policy)
        buffer = {name: attributes.get(name) for name in ("replay_buffer_class", "replay_buffer_kwargs")}
        # Hindsight asks the environment for rewards. An agent that only acts has none, and no memory
        lacks_env = env is None and issubclass(buffer["replay_buffer_class"] or object, HerReplayBuffer)
        if lacks_env:
            vars(model).update(replay_buffer_class=None, replay_buffer_kwargs={})
        model._setup_model()
        if lacks_env:
            vars(model).update(buffer, replay_buffer=None)
        model.policy_class = self.policy
        vars(model).update(self.progress)
        return model


def _attribute(argument: str) -> str:
    return "_stats_window_size" if argument == "stats_window_size" else argument


@lru_cache(maxsize=64)
def _hints(algorithm: type[BaseAlgorithm]) -> dict[str, Any]:
    """:return: types of the arguments that are saved"""
    parameters = inspect.signature(algorithm).parameters
    # Without the others, whose types are not all there when the program runs
    annotations = {name: parameter.annotation for name, parameter in parameters.items() if name not in _NOT_SAVED}
    return get_type_hints(type("Arguments", (), {"__annotations__": annotations}), vars(inspect.getmodule(algorithm.__init__)))


def _allowed_in(argument: str, extra: Classes) -> Classes:
    """:return: the classes that an argument may name"""
    if argument in ("replay_buffer_class", "rollout_buffer_class"):
        return {**buffers(), **extra}
    if argument == "policy_kwargs":
        return {**policy_parts(), **extra}
    return {**noises(), **extra} if argument == "action_noise" else {}


def _encode_arguments(model: BaseAlgorithm, extra: Classes) -> dict[str, Any]:
    names = [name for name in _hints(type(model)) if hasattr(model, _attribute(name))]
    progress = model._current_progress_remaining
    return {name: encode(getattr(model, _attribute(name)), _allowed_in(name, extra), name, progress) for name in names}


def _decode_arguments(node: Any, algorithm: type[BaseAlgorithm], extra: Classes) -> dict[str, Any]:
    hints = _hints(algorithm)
    arguments = {}
    for name, described in check_type(node, dict[str, Any], "arguments").items():
        if name not in hints:
            raise SafeFormatError(f"{algorithm.__name__} has no argument {shown(name)}, or it is one that is not loaded.")
        value = check_type(decode(described, _allowed_in(name, extra), name), hints[name], name)
        if name not in _MAY_BE_INFINITE and not is_finite(value):
            raise SafeFormatError(f"{name} must be finite. Save the agent again with a number.")
        arguments[name] = value
    return arguments


def _read_progress(node: Any) -> dict[str, float]:
    for name, value in check_type(node, dict[str, Any], "progress").items():
        if name not in _PROGRESS:
            raise SafeFormatError(f"progress has the unknown key {shown(name)}. Known: {', '.join(_PROGRESS)}.")
        # The remaining progress falls below 0 where training took more steps than it was told to
        if check_type(value, _PROGRESS[name], name) < 0 and _PROGRESS[name] is int:
            raise SafeFormatError(f"{name} must be at least 0, but is {value}.")
    return node


# ---- The policy, compared with its tensors before it takes memory ----


def _compared_with(tensors: Tensors, policy_class: type[BasePolicy]) -> Any:
    """
    :param tensors: Of an agent
    :param policy_class: Of the agent
    :return: What makes the policy if its parameters fit the tensors, in the place of the class while an algorithm sets up
    """

    @wraps(policy_class, updated=())
    def make(*args: Any, **kwargs: Any) -> BasePolicy:
        n_tensors = sum(name.startswith("policy/") for name in tensors.layout)
        # Some networks register parameters that they do not keep
        with _limited_parameters(2 * n_tensors + 64), th.device("meta"), _WithoutMemory():
            declared: Any = policy_class(*args, **{**kwargs, "optimizer_class": _NoOptimizer})
        for name, tensor in _named_tensors("policy", declared).items():
            tensors.check(name, tensor.dtype, tuple(tensor.shape))
        if "ortho_init" not in inspect.signature(policy_class).parameters:
            return policy_class(*args, **kwargs)
        # It takes time, and several times the memory of a layer, for parameters that are about to be replaced
        policy: Any = policy_class(*args, **{**kwargs, "ortho_init": False})
        policy.ortho_init = declared.ortho_init
        return policy

    return make


class _WithoutMemory(TorchFunctionMode):
    """Keeps tensors on the meta device, whatever a policy does to move them, and answers its questions about their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is th.Tensor.__bool__:
            # "Are these arguments of a distribution valid?"
            return True
        if func is th.Tensor.to:
            args = tuple("meta" if isinstance(arg, (str, th.device)) else arg for arg in args)
            kwargs = {name: "meta" if name == "device" else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


class _NoOptimizer:
    """Takes the place of an optimizer: some refuse parameters without memory."""

    def __init__(self, params: Iterable[th.Tensor], **kwargs: Any) -> None:
        self.param_groups: list[dict[str, Any]] = []


@contextmanager
def _limited_parameters(limit: int) -> Iterator[None]:
    """Parameters without memory still take time: a small file can ask for any number of layers."""
    count, thread = 0, threading.get_ident()

    def check(module: nn.Module, name: str, param: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise SafeFormatError("The configuration describes a policy with many more layers than there are tensors.")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


# ---- The state of a model ----


def _named_tensors(name: str, module: nn.Module) -> dict[str, th.Tensor]:
    """
    :param name: Of the module
    :param module: A network
    :return: Its parameters and buffers themselves, not copies. What has several names is there under the first.
    """
    found: dict[int, tuple[str, th.Tensor]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (f"{name}/{key}", tensor))
    return dict(found.values())


def _parts(model: BaseAlgorithm) -> tuple[dict[str, th.Tensor], dict[str, th.optim.Optimizer]]:
    """:return: the tensors of networks and learned numbers, and the optimizers, by SB3's names for them"""
    names, variables = model._get_torch_save_params()
    tensors: dict[str, th.Tensor] = {}
    optimizers: dict[str, th.optim.Optimizer] = {}
    for name in names:
        part = recursive_getattr(model, name)
        if isinstance(part, th.optim.Optimizer):
            optimizers[name] = part
        else:
            # A compiled network
            tensors.update(_named_tensors(name, getattr(part, "_orig_mod", part)))
    tensors.update({name: recursive_getattr(model, name) for name in variables})
    return tensors, optimizers


def _state(model: BaseAlgorithm) -> tuple[dict[str, th.Tensor], dict[str, list[float]]]:
    """:return: copies of everything that training changes, and the present learning rates of each optimizer"""
    tensors, optimizers = _parts(model)
    learning_rates = {}
    for name, optimizer in optimizers.items():
        described = optimizer.state_dict()
        # The last rollout can go past the end of the training, where a falling rate is below 0
        learning_rates[name] = [max(float(group["lr"]), 0.0) for group in described["param_groups"]]
        for index, entries in described["state"].items():
            stored = {key: th.as_tensor(value) for key, value in entries.items() if value is not None}
            tensors.update({_entry_name(name, index, key): value for key, value in stored.items()})
    copies = {name: tensor.detach().cpu().clone(memory_format=th.contiguous_format) for name, tensor in tensors.items()}
    return copies, learning_rates


def _entry_name(optimizer: str, index: int, key: str) -> str:
    return f"{optimizer}/{index}/{key}"


def _restore(model: BaseAlgorithm, learning_rates: dict[str, list[float]], tensors: Tensors) -> None:
    """:raises SafeFormatError: if a tensor is missing, has another shape or type, or is not finite"""
    targets, optimizers = _parts(model)
    with th.no_grad():
        for name, target in targets.items():
            target.copy_(tensors.read(name, target.dtype, tuple(target.shape)))
    check_object(learning_rates, "learning_rates", optimizers)
    for name, optimizer in optimizers.items():
        _restore_optimizer(name, optimizer, learning_rates[name], tensors)


def _restore_optimizer(name: str, optimizer: th.optim.Optimizer, learning_rates: list[float], tensors: Tensors) -> None:
    groups = optimizer.state_dict()["param_groups"]
    if len(learning_rates) != len(groups) or min(learning_rates, default=0.0) < 0:
        raise SafeFormatError(
            f"{name} needs {len(groups)} learning rates that are at least 0, but has {shown(learning_rates)}."
        )
    state = {}
    for group, described in zip(optimizer.param_groups, groups, strict=True):
        layout = _entry_layout(optimizer, group)
        for param, index in zip(group["params"], described["params"], strict=True):
            # A parameter that has never been optimized has none
            if any(_entry_name(name, index, key) in tensors for key in layout):
                state[index] = {
                    key: _read_entry(tensors, _entry_name(name, index, key), example, param) for key, example in layout.items()
                }
    groups = [{**group, "lr": float(rate)} for group, rate in zip(groups, learning_rates, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


_EXAMPLE_SHAPE = (2, 3)


def _entry_layout(optimizer: th.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """:return: what the optimizer keeps for a parameter of the example's shape, found out by a step of a copy"""
    example = nn.Parameter(th.zeros(_EXAMPLE_SHAPE, dtype=group["params"][0].dtype, device=group["params"][0].device))
    example.grad = th.zeros_like(example)
    other = copy.copy(optimizer)
    other.state = defaultdict(dict)
    other.param_groups = [{**group, "params": [example]}]
    other.step()
    return {key: value for key, value in other.state[example].items() if value is not None}


def _read_entry(tensors: Tensors, name: str, example: Any, param: th.Tensor) -> Any:
    as_tensor = th.as_tensor(example)
    shape = tuple(param.shape if as_tensor.shape == _EXAMPLE_SHAPE else as_tensor.shape)
    entry = tensors.read(name, as_tensor.dtype, shape)
    if not isinstance(example, th.Tensor):
        return entry.item()
    # In the layout of the parameter: fused Adam on CPU goes through memory without a look at it
    return th.empty_like(param, dtype=entry.dtype, device="cpu").copy_(entry) if shape == tuple(param.shape) else entry.clone()
