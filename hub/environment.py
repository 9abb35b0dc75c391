"""The environment of a saved agent: its id, and the wrappers between it and the agent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize, VecTransposeImage
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from .allowed import Classes, check_allowed, resolve, shown, wrappers
from .errors import SafeFormatError
from .files import Tensors
from .values import check_object, check_type, decode, encode, is_finite

_NORMALIZATION: dict[str, Any] = {
    "norm_obs": bool,
    "norm_reward": bool,
    "clip_obs": float,
    "clip_reward": float,
    "gamma": float,
    "epsilon": float,
    "norm_obs_keys": list[str] | None,
}
_STATISTICS = ("mean", "var", "count")


@dataclass(frozen=True)
class SavedEnv:
    """
    What is needed to build the environment that a saved agent acts in.

    :param env_id: Gymnasium id (None: none was saved)
    :param env_kwargs: Arguments of the environment
    :param env_wrappers: Wrappers of each single environment with their arguments, the innermost first
    :param vec_wrappers: SB3's wrappers of the vectorized environment as the configuration describes them, the innermost first
    :param statistics: Of ``VecNormalize``: of the returns under ``None``, of observations under ``""`` or their keys
    """

    env_id: str | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    env_wrappers: Sequence[tuple[type[gym.Wrapper], dict[str, Any]]] = ()
    vec_wrappers: Sequence[dict[str, Any]] = ()
    statistics: Mapping[str | None, RunningMeanStd] = field(default_factory=dict)

    def make(self, n_envs: int = 1, seed: int | None = None, training: bool = False) -> VecEnv:
        """
        Make the environment by its id and wrap it. This runs the code of the environment, which has to be installed, with
        arguments from the file.

        :param n_envs: Number of environments
        :param seed: Of the environments
        :param training: See ``wrap``
        :return: The environment as the agent knows it
        :raises SafeFormatError: if no id was saved, or no environment has this id
        """
        if self.env_id is None:
            raise SafeFormatError("No environment id was saved: make the environment yourself, and wrap it with wrap(env).")
        if self.env_id not in gym.registry:
            raise SafeFormatError(f"There is no environment {shown(self.env_id)}. Import the package that registers it first.")
        return self.wrap(
            make_vec_env(self.env_id, n_envs, seed, env_kwargs=self.env_kwargs, wrapper_class=self._wrap_single), training
        )

    def wrap(self, env: VecEnv, training: bool = False) -> VecEnv:
        """
        :param env: With the wrappers of each single environment, but none of SB3's
        :param training: Whether the statistics of ``VecNormalize`` go on changing, and rewards are normalized if they were.
            Otherwise observations are normalized as they were at the end, and rewards are those of the environment.
        :return: The environment in SB3's wrappers
        :raises SafeFormatError: if the statistics are of other observations
        """
        for described in self.vec_wrappers:
            if described["type"] == "VecNormalize":
                env = self._normalize(env, described, training)
            elif described["type"] == "VecFrameStack":
                env = VecFrameStack(env, described["n_stack"], described["channels_order"])
            else:
                env = VecTransposeImage(env)
        return env

    def with_statistics(self, tensors: Tensors) -> SavedEnv:
        """
        :param tensors: Among them the statistics of ``VecNormalize``
        :return: The same with them
        :raises SafeFormatError: if they are missing, or no statistics
        """
        settings = [described for described in self.vec_wrappers if described["type"] == "VecNormalize"]
        return replace(self, statistics=_read_statistics(settings[0], tensors)) if settings else self

    def _wrap_single(self, env: gym.Env) -> gym.Env:
        for wrapper, kwargs in self.env_wrappers:
            env = wrapper(env, **kwargs)
        return env

    def _normalize(self, env: VecEnv, described: dict[str, Any], training: bool) -> VecNormalize:
        settings = {name: described[name] for name in _NORMALIZATION}
        normalized = VecNormalize(env, training, **settings)
        normalized.norm_reward = training and normalized.norm_reward
        for key, own in _statistics_of(normalized).items():
            saved = self.statistics.get(key)
            if saved is None or np.shape(saved.mean) != np.shape(own.mean):
                raise SafeFormatError(
                    f"The saved statistics of VecNormalize do not fit observations of {env.observation_space}. Wrap the kind "
                    "of environment that the agent was trained in."
                )
            own.mean, own.var, own.count = np.array(saved.mean), np.array(saved.var), saved.count
        return normalized


def describe_env(
    env: VecEnv | None,
    env_id: str | None,
    env_kwargs: dict[str, Any] | None,
    env_wrappers: Iterable[type[gym.Wrapper] | tuple[type[gym.Wrapper], dict[str, Any]]],
    allow: Classes,
) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """
    :param env: Whose wrappers are saved
    :param env_id: See ``save_safe``
    :param env_kwargs: See ``save_safe``
    :param env_wrappers: See ``save_safe``
    :param allow: Classes beyond the allow-list
    :return: JSON, and the statistics of ``VecNormalize``
    :raises SafeFormatError: if something cannot be saved
    """
    tensors: dict[str, th.Tensor] = {}
    vec_wrappers: list[dict[str, Any]] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            settings = {name: encode(getattr(env, name), {}, f"VecNormalize.{name}") for name in _NORMALIZATION}
            vec_wrappers.append({"type": "VecNormalize", **settings})
            for key, statistics in _statistics_of(env).items():
                arrays = {name: np.array(getattr(statistics, name), np.float64) for name in _STATISTICS}
                tensors.update({_tensor_name(key, name): th.from_numpy(array) for name, array in arrays.items()})
        elif isinstance(env, VecFrameStack):
            stack = env.stacked_obs
            vec_wrappers.append({"type": "VecFrameStack", "n_stack": stack.n_stack, "channels_order": _channels_order(stack)})
        elif isinstance(env, VecTransposeImage):
            vec_wrappers.append({"type": "VecTransposeImage"})
        # Others, such as monitors and video recorders, are no part of the agent
        env = env.venv
    pairs = (wrapper if isinstance(wrapper, tuple) else (wrapper, {}) for wrapper in env_wrappers)
    allowed = {**wrappers(), **allow}
    described = {
        "id": env_id,
        "kwargs": encode(env_kwargs or {}, {}, "env_kwargs"),
        "wrappers": [
            {"class": check_allowed(cls, allowed, "env_wrappers"), "kwargs": encode(kwargs, {}, f"kwargs of {cls.__name__}")}
            for cls, kwargs in pairs
        ],
        "vec_wrappers": vec_wrappers[::-1],
    }
    return described, tensors


def read_env(node: Any, allow: Classes) -> SavedEnv:
    """
    :param node: JSON
    :param allow: Classes beyond the allow-list
    :return: The environment that it describes, without statistics; nothing of it is made
    :raises SafeFormatError: if it is not what ``describe_env`` writes
    """
    check_object(node, "env", ("id", "kwargs", "wrappers", "vec_wrappers"))
    env_wrappers = []
    for described in check_type(node["wrappers"], list[Any], "env.wrappers"):
        check_object(described, "env.wrappers", ("class", "kwargs"))
        cls = resolve(described["class"], {**wrappers(), **allow}, "env.wrappers")
        env_wrappers.append((cls, _read_kwargs(described["kwargs"], "env.wrappers")))
    vec_wrappers = [_read_vec_wrapper(each) for each in check_type(node["vec_wrappers"], list[Any], "env.vec_wrappers")]
    n_normalizations = sum(described["type"] == "VecNormalize" for described in vec_wrappers)
    if n_normalizations > 1 or len(vec_wrappers) > _MAX_VEC_WRAPPERS:
        raise SafeFormatError(f"env.vec_wrappers may hold one VecNormalize and {_MAX_VEC_WRAPPERS} wrappers at most.")
    return SavedEnv(
        env_id=_check_text(check_type(node["id"], str | None, "env.id"), "env.id", others=":"),
        env_kwargs=_read_kwargs(node["kwargs"], "env.kwargs"),
        env_wrappers=env_wrappers,
        vec_wrappers=vec_wrappers,
    )


_MAX_VEC_WRAPPERS = 8
_MAX_STACK = 1000


def _read_vec_wrapper(node: Any) -> dict[str, Any]:
    where, kind = "env.vec_wrappers", node.get("type") if isinstance(node, dict) else None
    if kind == "VecNormalize":
        settings = decode(check_object(node, where, ("type", *_NORMALIZATION)), {}, where)
        for name, hint in _NORMALIZATION.items():
            check_type(settings[name], hint, f"VecNormalize.{name}")
        is_limit = settings["clip_obs"] > 0 and settings["clip_reward"] > 0
        if not (is_limit and settings["epsilon"] > 0 and is_finite([settings["epsilon"], settings["gamma"]])):
            raise SafeFormatError("VecNormalize must have limits and an epsilon above 0, and finite numbers.")
        return settings
    if kind == "VecFrameStack":
        check_object(node, where, ("type", "n_stack", "channels_order"))
        if not 1 <= check_type(node["n_stack"], int, "VecFrameStack.n_stack") <= _MAX_STACK:
            raise SafeFormatError(f"VecFrameStack.n_stack must be between 1 and {_MAX_STACK}, but is {node['n_stack']}.")
        orders = node["channels_order"]
        for order in orders.values() if isinstance(orders, dict) else [orders]:
            if order not in ("first", "last"):
                raise SafeFormatError(f'VecFrameStack.channels_order must be "first" or "last", but is {shown(order)}.')
        return node
    if kind == "VecTransposeImage":
        return check_object(node, where, ("type",))
    raise SafeFormatError(f"{where}: there is no wrapper {shown(kind)} here.")


def _read_statistics(settings: dict[str, Any], tensors: Tensors) -> dict[str | None, RunningMeanStd]:
    keys: list[str | None] = [None]
    if settings["norm_obs"]:
        keys += [""] if settings["norm_obs_keys"] is None else settings["norm_obs_keys"]
    read = {}
    for key in keys:
        # The configuration does not say which shape the observations have behind other wrappers
        _, shape = tensors.layout.get(_tensor_name(key, "mean"), ("", ()))
        shapes = {"mean": shape, "var": shape, "count": ()}
        arrays = {name: tensors.read(_tensor_name(key, name), th.float64, shapes[name]).numpy().copy() for name in _STATISTICS}
        if (arrays["var"] < 0).any() or arrays["count"] <= 0:
            raise SafeFormatError("The statistics of VecNormalize have a negative variance, or a count that is not above 0.")
        statistics = RunningMeanStd(shape=shape)
        statistics.mean, statistics.var, statistics.count = arrays["mean"], arrays["var"], float(arrays["count"])
        read[key] = statistics
    return read


def _statistics_of(env: VecNormalize) -> dict[str | None, RunningMeanStd]:
    """:return: of the returns under None, of observations under "" or their keys"""
    of_obs: Any = getattr(env, "obs_rms", {}) if env.norm_obs else {}
    return {None: env.ret_rms, **(of_obs if isinstance(of_obs, dict) else {"": of_obs})}


def _tensor_name(key: str | None, name: str) -> str:
    return f"vec_normalize/returns/{name}" if key is None else f"vec_normalize/observations/{key}/{name}"


def _channels_order(stack: StackedObservations) -> Any:
    if hasattr(stack, "sub_stacked_observations"):
        return {key: _channels_order(part) for key, part in stack.sub_stacked_observations.items()}
    return "first" if stack.channels_first else "last"


def _read_kwargs(node: Any, where: str) -> dict[str, Any]:
    kwargs = decode(check_type(node, dict[str, Any], where), {}, where)
    _check_text(check_type(kwargs, dict[str, Any], where), where, others=":~")
    return kwargs


def _check_text(value: Any, where: str, others: str) -> Any:
    """Environments may import what comes before a colon, and open what looks like a path."""
    if isinstance(value, dict):
        _check_text([*value.keys(), *value.values()], where, others)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item, where, others)
    elif isinstance(value, str) and (value.startswith(("/", "\\")) or ".." in value or any(char in value for char in others)):
        raise SafeFormatError(
            f"{where}: {shown(value)} looks like a path or a module. Make the environment yourself if you trust it."
        )
    return value
