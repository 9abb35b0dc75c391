"""Agents saved without pickle: what comes back, and what is refused."""

import copy
import hashlib
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import sb3_contrib
import torch as th
from algo_cases import CASES, OBSERVATIONS, SMALL_ACTOR_CRITIC, SMALL_DDQN, SMALL_SAC, AlgoCase, seed_observations
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeAwareObservation
from rl_zoo3.utils import linear_schedule as zoo_schedule
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from test_algos import N_STEPS, assert_same_weights, observations, weights
from torch import nn

from sb3_ext import DDQN, OptionCritic, SACDiscrete
from sb3_ext.hub import SafeFormatError, load_safe, save_safe

SMALL_TD3 = {key: value for key, value in SMALL_DDQN.items() if key != "target_update_interval"}
SMALL_PPO = {**SMALL_ACTOR_CRITIC, "batch_size": 6, "n_epochs": 2}
OTHERS = [
    AlgoCase(A2C, spaces.Box, SMALL_ACTOR_CRITIC),
    AlgoCase(PPO, spaces.Discrete, SMALL_PPO),
    AlgoCase(PPO, spaces.Box, SMALL_PPO),
    AlgoCase(DQN, spaces.Discrete, SMALL_DDQN),
    AlgoCase(DDPG, spaces.Box, SMALL_TD3),
    AlgoCase(TD3, spaces.Box, SMALL_TD3),
    AlgoCase(SAC, spaces.Box, SMALL_SAC),
    AlgoCase(sb3_contrib.CrossQ, spaces.Box, SMALL_SAC, observations=("vector",)),
    AlgoCase(sb3_contrib.MaskablePPO, spaces.Discrete, SMALL_PPO),
    AlgoCase(sb3_contrib.QRDQN, spaces.Discrete, SMALL_DDQN),
    AlgoCase(sb3_contrib.RecurrentPPO, spaces.Box, SMALL_PPO),
    AlgoCase(sb3_contrib.TQC, spaces.Box, SMALL_SAC),
    AlgoCase(sb3_contrib.TRPO, spaces.Box, {**SMALL_ACTOR_CRITIC, "batch_size": 6}),
]
ALL_CASES = [*CASES, *OTHERS]


def name_of(case):
    return f"{case.algo.__module__[:3]}-{case}"


def case_of(algo):
    return next(case for case in CASES if case.algo is algo)


each_case = pytest.mark.parametrize("case", ALL_CASES, ids=name_of)


@pytest.fixture
def no_pickle(monkeypatch):
    """Whatever could unpickle raises."""

    def fail(*args, **kwargs):
        raise AssertionError("something was unpickled")

    class Unpickler:
        __init__ = fail

    for module in (pickle, cloudpickle):
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, fail)
    for name in ("Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, Unpickler)
    for owner in (th, th.serialization):
        monkeypatch.setattr(owner, "load", fail)


def learn(model):
    # Its rollouts need an environment that says which actions are allowed
    kwargs = {"use_masking": False} if isinstance(model, sb3_contrib.MaskablePPO) else {}
    return model.learn(N_STEPS, reset_num_timesteps=False, **kwargs)


def make(case, observation=None, env=None, **kwargs):
    policy, make_env = OBSERVATIONS[observation or case.observations[0]]
    if case.algo is sb3_contrib.RecurrentPPO:
        policy = policy.replace("Policy", "LstmPolicy")
    # SB3 changes what it is given
    kwargs.setdefault("policy_kwargs", copy.deepcopy(case.kwargs["policy_kwargs"]))
    return case.make(make_env(case) if env is None else env, policy, **kwargs)


def actions(model, deterministic, n_steps=3):
    """With the state of recurrent agents carried on, from fixed seeds."""
    th.manual_seed(0)
    np.random.seed(0)
    if model.use_sde:
        model.policy.reset_noise()
    obs, state, taken = observations(model), None, []
    for _ in range(n_steps):
        action, state = model.predict(obs, state, np.zeros(5, bool) if state is not None else None, deterministic)
        taken.append(action)
    return np.array(taken)


def assert_same_actions(first, second):
    second.observation_space.seed(0)
    for deterministic in (True, False):
        seeded = []
        for model in (first, second):
            model.observation_space.seed(0)
            seeded.append(actions(model, deterministic))
        np.testing.assert_array_equal(*seeded)


def config_of(folder):
    return json.loads((folder / "agent.json").read_text())


def weights_path(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def replace_config(folder, **changes):
    (folder / "agent.json").write_text(json.dumps({**config_of(folder), **changes}))


def replace_weights(folder, data):
    """With the right hash, as an attacker would."""
    weights_path(folder).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / f"agent-{sha256[:16]}.safetensors").write_bytes(data)
    replace_config(folder, weights_sha256=sha256)


# ---- What comes back ----


@pytest.mark.parametrize(
    ("case", "observation"),
    [(case, observation) for case in ALL_CASES for observation in case.observations],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_same_agent_without_pickle(case, observation, tmp_path, no_pickle):
    model = learn(make(case, observation))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert type(loaded) is case.algo
    assert type(loaded.policy) is type(model.policy)
    assert_same_weights(model, loaded)
    for name in model._get_torch_save_params()[1]:
        assert th.equal(getattr(loaded, name), getattr(model, name))
    for name in ("observation_space", "action_space", "n_envs", "num_timesteps", "_n_updates", "gamma", "policy_kwargs"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert_same_actions(model, loaded)


@each_case
def test_training_goes_on(case, tmp_path, no_pickle):
    env = make(case).get_env()
    model = learn(make(case, env=env))
    save_safe(model, tmp_path)
    with_dataset = {"dataset": model.dataset} if case.is_offline else {}
    loaded, _ = load_safe(tmp_path, env=env, **with_dataset)
    if case.is_off_policy:
        loaded.replay_buffer = copy.deepcopy(model.replay_buffer)
    before = copy.deepcopy(weights(loaded))
    for each in (model, loaded):
        # What is not saved: the states of environments and random generators
        each.set_env(env, force_reset=True)
        each.set_random_seed(1)
        each.action_space = env.action_space
        env.action_space.seed(1)
        seed_observations(env, 1)
        if case.is_offline:
            each.batch_generator.manual_seed(1), each.generator.manual_seed(1)
        learn(each)
    assert loaded.num_timesteps == model.num_timesteps
    assert_same_weights(model, loaded)
    assert any(not th.equal(value, before[name]) for name, value in weights(loaded).items())


@pytest.mark.parametrize("env", [IdentityEnvMultiDiscrete(3, 5), IdentityEnvMultiBinary(3, 5)], ids=["discrete", "binary"])
@pytest.mark.parametrize("algo", [PPO, CASES[2].algo], ids=["PPO", "VPG"])
def test_several_actions_at_once(algo, env, tmp_path):
    model = algo("MlpPolicy", env, n_steps=4, policy_kwargs={"net_arch": [8]}, device="cpu").learn(8)
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert loaded.action_space == model.action_space
    assert_same_actions(model, loaded)


@pytest.mark.parametrize("case", [OTHERS[2], OTHERS[6], CASES[2]], ids=str)
def test_state_dependent_exploration(case, tmp_path):
    model = learn(make(case, use_sde=True))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert loaded.use_sde
    assert_same_actions(model, loaded)


def test_learned_entropy_coefficient(tmp_path):
    model = learn(make(case_of(SACDiscrete)))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert loaded.log_ent_coef.item() == model.log_ent_coef.item() != 0.0
    loaded.set_env(model.get_env())
    # The optimizer's parameter is the loaded one
    assert learn(loaded).log_ent_coef.item() != model.log_ent_coef.item()


@pytest.mark.parametrize(
    "optimizer",
    [getattr(th.optim, name) for name in "ASGD Adadelta Adagrad AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split()]
    + [RMSpropTFLike, partial(th.optim.SGD, momentum=0.9), partial(th.optim.Adam, amsgrad=True)],
    ids=lambda optimizer: getattr(optimizer, "__name__", str(getattr(optimizer, "keywords", ""))),
)
def test_optimizers(optimizer, tmp_path):
    kwargs = optimizer.keywords if isinstance(optimizer, partial) else {}
    optimizer = getattr(optimizer, "func", optimizer)
    policy_kwargs = {"net_arch": [4], "optimizer_class": optimizer, "optimizer_kwargs": kwargs}
    model = learn(make(OTHERS[3], policy_kwargs=policy_kwargs))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    expected, found = model.policy.optimizer.state_dict(), loaded.policy.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for index, entries in expected["state"].items():
        for key, value in entries.items():
            assert type(found["state"].get(index, {}).get(key)) is type(value)
            assert value is None or th.equal(th.as_tensor(found["state"][index][key]), th.as_tensor(value)), key


def test_architecture(tmp_path):
    policy_kwargs = {
        "net_arch": {"pi": [5], "vf": [6, 7]},
        "activation_fn": nn.ELU,
        "ortho_init": True,
        "features_extractor_class": NatureCNN,
        "features_extractor_kwargs": {"features_dim": 9},
        "share_features_extractor": False,
        "optimizer_class": RMSpropTFLike,
        "optimizer_kwargs": {"eps": 1e-5, "alpha": 0.9},
    }
    model = make(OTHERS[1], "image", policy_kwargs=policy_kwargs)
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert loaded.policy_kwargs == policy_kwargs
    assert loaded.policy.ortho_init
    assert str(loaded.policy) == str(model.policy)


def test_shared_layers_are_written_once(tmp_path):
    model = make(OTHERS[1], "image")
    save_safe(model, tmp_path)
    names = safetensors.torch.load_file(weights_path(tmp_path))
    assert "policy/features_extractor.cnn.0.weight" in names
    assert "policy/pi_features_extractor.cnn.0.weight" not in names


def test_schedules(tmp_path):
    linear = LinearSchedule(1e-3, 1e-4, 0.5)
    model = make(OTHERS[1], learning_rate=linear, clip_range=lambda progress: 0.3 * progress, clip_range_vf=0.4)
    learn(model)
    model._current_progress_remaining = 0.5
    with pytest.warns(UserWarning, match=r"clip_range: only linear .* 0\.15"):
        save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    for progress in (1.0, 0.7, 0.1):
        assert loaded.lr_schedule(progress) == linear(progress)
        assert loaded.clip_range(progress) == 0.15
        assert loaded.clip_range_vf(progress) == 0.4
    rates = [each.policy.optimizer.param_groups[0]["lr"] for each in (model, loaded)]
    assert rates[0] == rates[1] != 1e-3


def test_schedules_of_the_zoo(tmp_path):
    model = make(OTHERS[1], learning_rate=zoo_schedule(1e-3), clip_range=zoo_schedule(0.3))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    for progress in (1.0, 0.7, 0.0):
        assert loaded.lr_schedule(progress) == pytest.approx(1e-3 * progress)
        assert loaded.clip_range(progress) == pytest.approx(0.3 * progress)


@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_action_noise(noise, tmp_path):
    model = make(OTHERS[5], action_noise=noise(np.zeros(1), np.array([0.3])), train_freq=(2, "episode"))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert type(loaded.action_noise) is noise
    assert repr(loaded.action_noise) == repr(model.action_noise)
    assert loaded.train_freq == model.train_freq


def test_arguments_that_are_not_saved(tmp_path):
    model = make(CASES[1], tensorboard_log="/somewhere")
    model.dataset, model.allow_pickle = "/data/replay_buffer.pkl", True
    save_safe(model, tmp_path)
    assert not {"dataset", "allow_pickle", "tensorboard_log", "device"} & config_of(tmp_path)["arguments"].keys()
    loaded, _ = load_safe(tmp_path)
    assert (loaded.dataset, loaded.allow_pickle, loaded.tensorboard_log) == (None, False, None)


def test_arguments_of_the_caller(tmp_path):
    save_safe(make(OTHERS[3]), tmp_path)
    loaded, _ = load_safe(tmp_path, device="cpu", buffer_size=7, tensorboard_log="here", stats_window_size=3)
    assert (loaded.replay_buffer.buffer_size, loaded.tensorboard_log, loaded._stats_window_size) == (7, "here", 3)
    with pytest.raises(TypeError, match="DQN has no arguments"):
        load_safe(tmp_path, bufer_size=7)


def test_nothing_stays_in_the_file(tmp_path):
    model = learn(make(OTHERS[6]))
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    path = weights_path(tmp_path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_weights(model, loaded)


def test_environment_with_other_spaces(tmp_path):
    save_safe(make(OTHERS[3]), tmp_path)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        load_safe(tmp_path, env=OTHERS[3].image_env())


class DoubledObservations(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=observation_space.shape[0])

    def forward(self, observations):
        return 2 * observations


def test_classes_of_the_caller(tmp_path):
    model = make(OTHERS[2], policy_kwargs={"features_extractor_class": DoubledObservations})
    with pytest.raises(SafeFormatError, match=r"DoubledObservations' is not on the list .* allow=\[TheClass\]"):
        save_safe(model, tmp_path)
    save_safe(model, tmp_path, allow=[DoubledObservations])
    with pytest.raises(SafeFormatError, match="DoubledObservations' is not on the list"):
        load_safe(tmp_path)
    loaded, _ = load_safe(tmp_path, allow=[DoubledObservations])
    assert type(loaded.policy.features_extractor) is DoubledObservations


# ---- Environments ----


def normalized_env(make_env, n_envs=1, **kwargs):
    return VecNormalize(DummyVecEnv([make_env] * n_envs), **kwargs)


def same_statistics(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("mean", "var", "count"))


def test_normalization(tmp_path, no_pickle):
    case = OTHERS[2]
    settings = {"clip_obs": float("inf"), "clip_reward": 3.0, "gamma": 0.9, "epsilon": 1e-5}
    env = normalized_env(case.vector_env, n_envs=2, **settings)
    model = learn(make(case, env=env))
    save_safe(model, tmp_path)
    loaded, saved_env = load_safe(tmp_path)
    for training in (True, False):
        wrapped = saved_env.wrap(DummyVecEnv([case.vector_env]), training)
        assert same_statistics(wrapped.obs_rms, env.obs_rms)
        assert same_statistics(wrapped.ret_rms, env.ret_rms)
        assert {name: getattr(wrapped, name) for name in settings} == settings
        assert (wrapped.training, wrapped.norm_obs, wrapped.norm_reward) == (training, True, training)
        raw = np.full((1, 1), 0.3, np.float32)
        np.testing.assert_array_equal(wrapped.normalize_obs(raw), env.normalize_obs(raw))
    loaded.set_env(saved_env.wrap(DummyVecEnv([case.vector_env] * 2), training=True))
    learn(loaded)
    assert loaded.get_env().ret_rms.count > env.ret_rms.count
    # Nothing is shared
    assert saved_env.statistics[None].count == env.ret_rms.count


def test_normalization_of_some_observations(tmp_path):
    case = OTHERS[2]
    env = normalized_env(case.dict_env, norm_obs_keys=["vec"], norm_reward=False)
    save_safe(learn(make(case, "dict", env)), tmp_path)
    _, saved_env = load_safe(tmp_path)
    wrapped = saved_env.wrap(DummyVecEnv([case.dict_env]))
    assert wrapped.get_attr("spec") is not None and list(wrapped.venv.obs_rms) == ["vec"]
    assert same_statistics(wrapped.venv.obs_rms["vec"], env.obs_rms["vec"])
    with pytest.raises(SafeFormatError, match="do not fit"):
        saved_env.wrap(DummyVecEnv([lambda: TallVectors(case.dict_env())]))


class TallVectors(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        parts = {**env.observation_space.spaces, "vec": spaces.Box(0, 1, (99,))}
        self.observation_space = spaces.Dict(parts)


def test_normalization_of_an_environment_of_its_own(tmp_path):
    """As the zoo's commands have it: the model was loaded without one."""
    case = OTHERS[2]
    env = normalized_env(case.vector_env, norm_reward=False, norm_obs=False)
    save_safe(make(case), tmp_path, env=VecFrameStack(env, 3))
    wrapped = load_safe(tmp_path)[1].wrap(DummyVecEnv([case.vector_env]))
    assert isinstance(wrapped, VecFrameStack) and isinstance(wrapped.venv, VecNormalize)
    assert (wrapped.stacked_obs.n_stack, wrapped.venv.norm_obs) == (3, False)


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_frame_stack(observation, tmp_path):
    case, make_env = OTHERS[3], OBSERVATIONS[observation][1]
    model = learn(make(case, observation, VecFrameStack(DummyVecEnv([partial(make_env, case)]), 2)))
    save_safe(model, tmp_path)
    loaded, saved_env = load_safe(tmp_path)
    wrapped = saved_env.wrap(DummyVecEnv([partial(make_env, case)]))
    assert wrapped.observation_space == model.get_env().observation_space
    loaded.set_env(wrapped)
    assert loaded.get_env() is wrapped
    learn(loaded)


def test_hindsight_needs_its_environment_only_to_go_on_learning(tmp_path):
    env = BitFlippingEnv(n_bits=4, continuous=False)
    buffer = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = DDQN("MultiInputPolicy", env, **SMALL_DDQN, **buffer, seed=0, device="cpu").learn(60)
    save_safe(model, tmp_path)
    obs = observations(model)
    expected = model.predict(obs, deterministic=True)[0]
    acting, learning = load_safe(tmp_path, device="cpu")[0], load_safe(tmp_path, env=env, device="cpu")[0]
    for loaded in (acting, learning):
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    assert acting.replay_buffer is None and acting.replay_buffer_class is HerReplayBuffer
    learning.learn(60)
    assert learning.replay_buffer.n_sampled_goal == 2


def test_observations_of_bits(tmp_path):
    class Bits(gym.Env):
        # As in MinAtar
        observation_space, action_space = spaces.Box(0.0, 1.0, (3,), np.bool_), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.array([True, False, True]), {}

        def step(self, action):
            return np.array([False, True, True]), 1.0, False, True, {}

    model = PPO("MlpPolicy", Bits(), **SMALL_PPO, device="cpu")
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path, Bits())
    assert loaded.observation_space == Bits.observation_space


def test_learning_rates_that_fell_below_zero_in_the_last_rollout(tmp_path):
    model = PPO("MlpPolicy", "CartPole-v1", learning_rate=LinearSchedule(1e-3, 0.0, 1.0), **SMALL_PPO, device="cpu")
    for group in model.policy.optimizer.param_groups:
        group["lr"] = -1e-6
    save_safe(model, tmp_path)
    loaded, _ = load_safe(tmp_path)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.0


def test_environment_by_id(tmp_path):
    env_wrappers = [(TimeAwareObservation, {"normalize_time": True})]
    kwargs = {"g": 3.0}

    def wrapped(env):
        return TimeAwareObservation(env, normalize_time=True)

    env = VecNormalize(make_vec_env("Pendulum-v1", env_kwargs=kwargs, wrapper_class=wrapped))
    model = PPO("MlpPolicy", env, **SMALL_PPO, device="cpu").learn(N_STEPS)
    save_safe(model, tmp_path, env_id="Pendulum-v1", env_kwargs=kwargs, env_wrappers=env_wrappers)
    loaded, saved_env = load_safe(tmp_path)
    made = saved_env.make(n_envs=2, seed=0)
    assert (made.num_envs, made.get_attr("g")) == (2, [3.0, 3.0])
    assert made.observation_space == env.observation_space
    loaded.predict(made.reset())
    assert load_safe(tmp_path, env=made)[0].n_envs == 2

    save_safe(model, tmp_path, env_id="Nowhere-v1", env_wrappers=[FlattenObservation])
    with pytest.raises(SafeFormatError, match=r"no environment 'Nowhere-v1'\. Import"):
        load_safe(tmp_path)[1].make()
    save_safe(model, tmp_path)
    with pytest.raises(SafeFormatError, match=r"No environment id was saved.* wrap\(env\)"):
        load_safe(tmp_path)[1].make()


# ---- Saving ----


@pytest.fixture
def folder(tmp_path):
    """A saved agent: A2C with statistics of observations."""
    env = VecFrameStack(normalized_env(OTHERS[0].vector_env), 2)
    save_safe(learn(make(OTHERS[0], env=env)), tmp_path / "agent", env_id="Pendulum-v1")
    return tmp_path / "agent"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_again_replaces_the_agent(folder):
    earlier = content(folder)
    (folder / "README.md").write_text("A card")
    save_safe(make(OTHERS[5]), folder)
    assert type(load_safe(folder)[0]) is TD3
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 3 and "README.md" in names and weights_path(folder).name not in earlier


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file-size limit")
@pytest.mark.parametrize("part", ["weights", "configuration"])
def test_disk_full(folder, part):
    earlier = content(folder)
    # Without optimizer and hidden layers, the tensors take less than the configuration
    model = A2C("MlpPolicy", OTHERS[0].vector_env(), policy_kwargs={"net_arch": []}, device="cpu", use_rms_prop=False)
    save_safe(model, folder.parent / "other")
    sizes = [len(data) for _, data in sorted(content(folder.parent / "other").items())]
    assert sizes[0] < sizes[1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - (part == "weights"), limits[1]))
    try:
        with pytest.raises(OSError, match=rf"Could not write the agent .*too large.* before is as it was.*{folder}"):
            save_safe(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = content(folder)
    assert {name: left[name] for name in earlier} == earlier
    assert len(left) == len(earlier) + (part == "configuration")
    load_safe(folder)


def set_nan(model):
    next(model.policy.parameters()).data[0] = float("nan")


UNSAVABLE = {
    "diverged": (set_nan, r"not finite: training has diverged"),
    "nan_argument": (lambda model: setattr(model, "gamma", float("nan")), r"gamma is not a number"),
    "infinite_argument": (lambda model: setattr(model, "gamma", float("inf")), r"gamma must be finite"),
    "type": (lambda model: setattr(model, "gamma", "0.9"), r"gamma must be of type float, but is '0.9'"),
    "object": (lambda model: model.policy_kwargs.update(net_arch=[object()]), r"policy_kwargs: .* cannot be saved"),
    "array": (lambda model: model.policy_kwargs.update(x=np.zeros(3)), r"policy_kwargs: .* cannot be saved"),
    "class": (lambda model: model.policy_kwargs.update(activation_fn=nn.Linear), r"linear:Linear' is not on the list"),
    "long": (lambda model: model.policy_kwargs.update(net_arch=list(range(10**6))), r"more than the limit of 1048576"),
    "space": (
        lambda model: setattr(model, "observation_space", spaces.Tuple([spaces.Discrete(2)])),
        r"observation_space: Tuple spaces cannot be saved",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_refuses_to_save(change, message, tmp_path):
    model = make(OTHERS[0])
    change(model)
    with pytest.raises(SafeFormatError, match=message):
        save_safe(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_to_save_other_algorithms(tmp_path):
    model = sb3_contrib.ARS("LinearPolicy", OTHERS[0].vector_env())
    with pytest.raises(SafeFormatError, match="ARS' is not on the list"):
        save_safe(model, tmp_path)
    with pytest.raises(SafeFormatError, match=r"env\.kwargs: '/etc/passwd' looks like a path"):
        save_safe(make(OTHERS[0]), tmp_path, env_kwargs={"xml_file": "/etc/passwd"})


# ---- Loading what is no agent ----


def change(path, value):
    """:return: function that sets one value of a configuration"""

    def apply(config):
        *parents, last = path.split(".")
        for key in parents:
            config = config[int(key) if isinstance(config, list) else key]
        config[last] = value

    return apply


def kwargs_of_policy(**kwargs):
    return change("arguments.policy_kwargs", kwargs)


MALICIOUS = [
    "os:system",
    "builtins:eval",
    "builtins.eval",
    "torch.nn:Module.__init__",
    "torch.nn.modules.activation:ReLU.__init__.__globals__",
    "torch:load",
    "subprocess:Popen",
    "stable_baselines3.a2c.a2c:A2C.load",
    "stable_baselines3.a2c.a2c:__builtins__",
    "../os:system",
    "",
    "os",
    ["os", "system"],
    None,
    5,
]
PLACES = {
    "algorithm": change,
    "policy": change,
    "arguments.rollout_buffer_class": lambda path, name: change(path, {"$class": name}),
    "arguments.policy_kwargs": lambda path, name: kwargs_of_policy(activation_fn={"$class": name}),
    "env.wrappers": lambda path, name: change(path, [{"class": name, "kwargs": {}}]),
}


@pytest.mark.parametrize("name", MALICIOUS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_refuses_classes(place, name, folder):
    config = config_of(folder)
    PLACES[place](place, name)(config)
    replace_config(folder, **config)
    with pytest.raises(SafeFormatError, match=r"is not on the list of classes allowed here"):
        load_safe(folder)


DISCRETE = {"type": "Discrete", "start": 0, "dtype": "int64"}
REFUSED = {
    "format": (change("format", "other"), "does not describe an agent: its format is 'other'"),
    "version": (change("version", 2), "version 2 of the format, but this is for 1. Upgrade sb3-ext"),
    "unknown_key": (change("pickle", "cos"), r"unknown keys \['pickle'\]"),
    "missing_key": (lambda config: config.pop("n_envs"), r"lacks \['n_envs'\]"),
    "class_of_another_place": (change("algorithm", "torch.optim.adam:Adam"), "algorithm: .* not on the list"),
    "policy_of_another_algorithm": (
        change("policy", "stable_baselines3.dqn.policies:DQNPolicy"),
        "policy: .* not on the list",
    ),
    "argument": (change("arguments._logger", 1), "A2C has no argument '_logger'"),
    "argument_not_saved": (
        change("arguments.tensorboard_log", "/tmp"),
        "no argument 'tensorboard_log', or it is one that is not",
    ),
    "argument_type": (change("arguments.gamma", "0.99"), "gamma must be of type float, but is '0.99'"),
    "boolean_number": (change("arguments.n_steps", True), "n_steps must be of type int, but is True"),
    "infinite": (change("arguments.gamma", {"$float": "inf"}), "gamma must be finite"),
    "nan": (change("arguments.gamma", {"$float": "nan"}), "gamma: .* means nothing"),
    "tag": (change("arguments.gamma", {"$eval": "1"}), "gamma: .* means nothing"),
    "tag_beside_others": (kwargs_of_policy(x={"$class": "os:system", "y": 1}), r"begins with \$ beside others"),
    "schedule": (change("arguments.learning_rate", {"$schedule": {"start": "a"}}), "learning_rate has unknown keys"),
    "policy_kwargs": (kwargs_of_policy(net=[4]), "There is no such A2C agent .*unexpected keyword argument 'net'"),
    "learning_rates": (change("learning_rates", {}), r"learning_rates .*lacks \['policy.optimizer'\]"),
    "progress": (change("progress.num_timesteps", -1), "num_timesteps must be at least 0"),
    "progress_key": (change("progress.policy", 1), "progress has the unknown key 'policy'"),
    "n_envs": (change("n_envs", 10**9), "n_envs must be between 1 and 10000"),
    "space": (change("observation_space", {"type": "Text"}), "no space of type 'Text'"),
    "nested_dict_space": (
        change("observation_space", {"type": "Dict", "spaces": {"a": {"type": "Dict", "spaces": {}}}}),
        "no space of type 'Dict' here",
    ),
    "space_bounds": (change("observation_space.low", [1.0]), "must be one number or 2 of them"),
    "space_order": (change("observation_space.low", "inf"), "gymnasium accepts no such Box space"),
    "space_dtype": (change("observation_space.dtype", "object"), "no supported dtype"),
    "other_space": (change("observation_space.shape", [3]), r"describes the tensor .* as .*, but in agent-.* it is"),
    "dead_space": (
        change("observation_space", {"type": "Discrete", "n": 2, "start": 5, "dtype": "int64"}),
        "no such A2C agent",
    ),
    "env_id": (change("env.id", "os:CartPole-v1"), "env.id: 'os:CartPole-v1' looks like a path or a module"),
    "env_kwargs": (change("env.kwargs", {"a": [{"b": "../x"}]}), "env.kwargs: '../x' looks like a path or a module"),
    "env_kwargs_class": (change("env.kwargs", {"a": {"$class": "os:system"}}), "env.kwargs: 'os:system' is not on the list"),
    "vec_wrapper": (change("env.vec_wrappers", [{"type": "SubprocVecEnv"}]), "no wrapper 'SubprocVecEnv' here"),
    "vec_wrappers": (change("env.vec_wrappers", [{"type": "VecTransposeImage"}] * 9), "8 wrappers at most"),
    "n_stack": (change("env.vec_wrappers.1.n_stack", 10**9), "n_stack must be between 1 and 1000"),
    "channels_order": (change("env.vec_wrappers.1.channels_order", "middle"), "channels_order must be"),
    "epsilon": (change("env.vec_wrappers.0.epsilon", -1.0), "epsilon above 0"),
    "norm_obs_keys": (change("env.vec_wrappers.0.norm_obs_keys", ["a"]), "'vec_normalize/observations/a/mean' .* missing"),
    "hash": (change("weights_sha256", "../" + 61 * "a"), "must be 64 hexadecimal digits"),
    "other_hash": (change("weights_sha256", 64 * "a"), "There is no file"),
}


@pytest.mark.parametrize(("apply", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_configurations(apply, message, folder):
    load_safe(folder)
    config = config_of(folder)
    apply(config)
    (folder / "agent.json").write_text(json.dumps(config))
    with pytest.raises(SafeFormatError, match=message):
        load_safe(folder)


TEXTS = {
    "empty": ("", "is not valid"),
    "truncated": ('{"format": "sb3', "is not valid"),
    "no_object": ("[]", "it must hold an object"),
    "nan": ('{"format": NaN}', "NaN is no JSON"),
    "infinite": ('{"format": 1e999}', "'1e999' is too large"),
    "large_integer": ('{"format": 1' + 5000 * "0" + "}", "is too large"),
    "twice": ('{"format": 1, "format": 2}', "a key occurs twice"),
    "nested": (33 * '{"a":' + "1" + 33 * "}", "nested more than 32 levels"),
    "nested_deep": (10**5 * "[" + 10**5 * "]", "is not valid"),
    "long": (" " * (2**20 + 1), "larger than the limit"),
    "pickle": (pickle.dumps({"format": 1}).decode("latin-1"), "is not valid"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_refuses_texts(text, message, folder):
    (folder / "agent.json").write_text(text)
    with pytest.raises(SafeFormatError, match=message):
        load_safe(folder)


def change_tensors(change_in_place):
    """:return: function of the bytes of a safetensors file"""

    def apply(data):
        tensors = safetensors.torch.load(data)
        change_in_place(tensors)
        return safetensors.torch.save(tensors)

    return apply


def change_header(change_text):
    """:return: function of the bytes of a safetensors file"""

    def apply(data):
        size = int.from_bytes(data[:8], "little")
        header = change_text(data[8 : 8 + size].rstrip())
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    return apply


BIAS, VARIANCE, SQUARES = "policy/action_net.bias", "vec_normalize/observations//var", "policy.optimizer/0/square_avg"
TENSORS = {
    "missing": (change_tensors(lambda tensors: tensors.pop(BIAS)), f"'{BIAS}' as .*it is missing"),
    "additional": (change_tensors(lambda tensors: tensors.update(x=th.zeros(3))), r"does not have: \['x'\]"),
    "shape": (change_tensors(lambda tensors: tensors.update({BIAS: th.zeros(9)})), f"{BIAS}.*\\(1,\\)\\), but .*\\(9,\\)"),
    "dtype": (change_tensors(lambda tensors: tensors.update({BIAS: th.zeros(1).double()})), f"{BIAS}.*'F32'.*'F64'"),
    "nan": (change_tensors(lambda tensors: tensors[BIAS].fill_(float("nan"))), f"'{BIAS}' has numbers that are not finite"),
    "infinite": (change_tensors(lambda tensors: tensors[SQUARES].fill_(float("inf"))), "not finite"),
    "no_state": (change_tensors(lambda tensors: tensors.pop(SQUARES)), f"'{SQUARES}' as .*it is missing"),
    "variance": (change_tensors(lambda tensors: tensors[VARIANCE].fill_(-1.0)), "negative variance"),
    "no_variance": (change_tensors(lambda tensors: tensors.pop(VARIANCE)), f"'{VARIANCE}' as .*it is missing"),
    "empty": (lambda data: b"", "no valid safetensors file"),
    "truncated": (lambda data: data[:-1], "no valid safetensors file"),
    "longer": (lambda data: data + b"1", "no valid safetensors file"),
    "pickle": (lambda data: pickle.dumps({BIAS: 1}), "no valid safetensors file|more than 1048576"),
    "header_size": (lambda data: (2**40).to_bytes(8, "little") + data[8:], "declares 1099511627776 bytes, more than"),
    "offsets": (change_header(lambda text: re.sub(rb"\[0,\d+\]", b"[0,99999999999]", text)), "no valid safetensors file"),
    "terabytes": (change_header(lambda text: text.replace(b'"shape":[1]', b'"shape":[999999999999]')), "no valid safetensors"),
}


@pytest.mark.parametrize(("apply", "message"), TENSORS.values(), ids=TENSORS)
def test_refuses_tensors(apply, message, folder):
    load_safe(folder)
    replace_weights(folder, apply(weights_path(folder).read_bytes()))
    with pytest.raises(SafeFormatError, match=message):
        load_safe(folder)


def test_refuses_a_damaged_file(folder):
    data = bytearray(weights_path(folder).read_bytes())
    data[-1] ^= 1
    weights_path(folder).write_bytes(data)
    with pytest.raises(SafeFormatError, match=r"is damaged: its hash .* Download the files again"):
        load_safe(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("which", ["agent.json", "weights"])
def test_refuses_links(which, folder):
    path = folder / which if which == "agent.json" else weights_path(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(SafeFormatError, match="is a symbolic link"):
        load_safe(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(SafeFormatError, match="There is no file"):
        load_safe(folder)


# ---- Sizes ----


def peak_megabytes(code, *arguments):
    """:return: memory that code takes beyond what its process had before, and the last line that it prints"""
    program = f"""
import resource, sys
from pathlib import Path
from stable_baselines3 import A2C
from sb3_ext.hub import SafeFormatError, load_safe
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
load_safe(sys.argv[1])
before = peak()
{code}
print(peak() - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    *printed, taken = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return float(taken), printed[-1] if printed else ""


HUGE = {
    "layer": (kwargs_of_policy(net_arch=[10**9, 10**9]), "describes the tensor"),
    "features": (
        kwargs_of_policy(
            features_extractor_class={"$class": "stable_baselines3.common.torch_layers:CombinedExtractor"},
            features_extractor_kwargs={"cnn_output_dim": 10**12},
        ),
        "no such A2C agent",
    ),
    "layers": (kwargs_of_policy(net_arch=[1] * 100_000), "many more layers than there are tensors"),
    "observations": (change("observation_space.shape", [2**11, 2**10]), "more than 1048576 numbers"),
    "actions": (change("action_space", {**DISCRETE, "n": 10**12}), "no such|as .*it is"),
    "rollouts": (change("arguments.n_steps", 10**15), "load_safe takes arguments that replace those of the file"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a measure of memory")
def test_refuses_huge_networks_before_they_take_memory(folder):
    for name, (apply, _) in HUGE.items():
        config = config_of(folder)
        apply(config)
        replace_config(shutil.copytree(folder, folder.parent / "huge" / name), **config)
    code = """
import json
errors = {}
for huge in Path(sys.argv[2]).iterdir():
    try:
        load_safe(huge)
    except SafeFormatError as error:
        errors[huge.name] = str(error)
print(json.dumps(errors))
"""
    taken, errors = peak_megabytes(code, folder, folder.parent / "huge")
    for name, (_, message) in HUGE.items():
        assert re.search(message, json.loads(errors)[name])
    assert taken < 100


@pytest.mark.skipif(sys.platform == "win32", reason="needs a measure of memory")
@pytest.mark.parametrize("case", [OTHERS[1], case_of(SACDiscrete)], ids=str)
def test_takes_twice_the_memory_of_its_files(case, folder):
    model = learn(make(case, policy_kwargs={"net_arch": [2000, 1000]}))
    save_safe(model, folder.parent / "large")
    size = sum(len(data) for data in content(folder.parent / "large").values()) / 2**20
    assert size > 30
    taken, _ = peak_megabytes("load_safe(sys.argv[2])", folder, folder.parent / "large")
    assert taken < 2 * size + 40


def test_importing_costs_nothing():
    code = "import sb3_ext.hub, sys; assert 'torch' not in sys.modules; sb3_ext.hub.load_safe; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- The documentation ----


def test_examples(tmp_path, monkeypatch):
    """The Python blocks of the guide, one after the other."""
    monkeypatch.chdir(tmp_path)
    guide = Path(__file__).parents[1] / "docs" / "guide" / "hub.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["model"].num_timesteps > 0


def test_guide_names_all_keys(folder):
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "hub.md").read_text()
    (described,) = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    assert json.loads(described).keys() == config_of(folder).keys()


# ---- Anything at all ----

N_DAMAGED = 10_000


def test_damaged_files(tmp_path):
    """Random changes of the files of five agents: the documented error, or an agent; see ``fuzz_safe.py``."""
    tiny = {"net_arch": [2]}
    agents = tmp_path / "agents"
    env = VecFrameStack(normalized_env(OTHERS[2].vector_env), 2)
    models = {
        "ppo": make(OTHERS[2], env=env, policy_kwargs=dict(tiny), use_sde=True),
        "td3": make(OTHERS[5], policy_kwargs=dict(tiny), action_noise=NormalActionNoise(np.zeros(1), np.ones(1))),
        "bcq": make(CASES[0], policy_kwargs={**tiny, "vae_net_arch": [2]}, n_acting_candidates=3),
        "option_critic": make(case_of(OptionCritic), policy_kwargs=dict(tiny)),
        "sac_discrete": make(case_of(SACDiscrete), policy_kwargs=dict(tiny)),
    }
    for name, model in models.items():
        save_safe(learn(model), agents / name, env_id="CartPole-v1", env_kwargs={"a": [1, 2]})
    fuzzer = Path(__file__).with_name("fuzz_safe.py")
    command = [sys.executable, fuzzer, agents, str(N_DAMAGED), "0"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["forbidden"] == []
    assert result["grown_mb"] < 100
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == N_DAMAGED
    # The changes are neither harmless nor all refused at the door
    assert outcomes["loaded"] > N_DAMAGED / 50
    assert outcomes["refused"] > N_DAMAGED / 4
