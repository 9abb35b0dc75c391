"""What the zoo's tuning draws for each algorithm of the registry, and what it makes of a stored trial."""

import inspect
from importlib.resources import files
from pkgutil import resolve_name

import optuna
import pytest
import yaml

from sb3_ext import FrameReplayBuffer, MinAtarFeatures
from sb3_ext.zoo import register
from sb3_ext.zoo.registry import ALGORITHMS


@pytest.mark.parametrize("n_actions", [0, 3], ids=["discrete", "continuous"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.key)
def test_samples_are_arguments_and_convert_back(algorithm, n_actions):
    accepted = inspect.signature(resolve_name(algorithm.class_path)).parameters
    sample, convert = resolve_name(algorithm.sampler), resolve_name(algorithm.converter)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        # What the zoo says beside the space
        sampled = sample(trial, n_actions, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        assert set(sampled) <= set(accepted)
        assert 0 < sampled["gamma"] < 1
        # What is stored in another unit is shown in the unit of the constructor
        for shown in {"gamma", "batch_size", "n_steps"} & set(sampled):
            assert sampled[shown] == trial.user_attrs[shown]
        assert convert(trial.params) == sampled


def test_bcq_tunes_the_constraint_of_the_kind_of_action():
    sample = resolve_name("sb3_ext.zoo.search_spaces:sample_bcq_params")
    study = optuna.create_study()
    assert "action_threshold" in sample(study.ask(), 0, 1, {})
    assert "perturbation_scale" in sample(study.ask(), 3, 1, {})


def test_option_critic_tunes_shared_layers_and_separate_networks():
    sample = resolve_name("sb3_ext.zoo.search_spaces:sample_option_critic_params")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [sample(study.ask(), 0, 1, {})["policy_kwargs"] for _ in range(20)]
    assert {(bool(kwargs["net_arch"]), bool(kwargs.get("head_arch"))) for kwargs in drawn} == {(True, False), (False, True)}


# What the zoo takes out of an entry before it calls the constructor
ZOO_KEYS = {"n_timesteps", "n_envs", "normalize", "env_wrapper", "frame_stack"}
ENVIRONMENTS = {
    *("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3", "Pendulum-v1", "MountainCarContinuous-v0"),
    *("LunarLanderContinuous-v3", "BipedalWalker-v3", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "Ant-v5"),
    *("default", "atari"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.key)
def test_hyperparameters_are_arguments(algorithm):
    entries = yaml.safe_load(files("sb3_ext.hyperparams").joinpath(f"{algorithm.key}.yml").read_text())
    accepted = set(inspect.signature(resolve_name(algorithm.class_path)).parameters)
    assert "default" in entries
    for env_id, entry in entries.items():
        assert set(entry) - ZOO_KEYS <= accepted, env_id
        assert {"n_timesteps", "policy"} <= set(entry), env_id


@pytest.mark.parametrize("key", ["vpg", "reinforce", "npg", "trpo_fast"])
def test_policy_gradients_know_the_environments_of_the_zoo(key):
    assert set(yaml.safe_load(files("sb3_ext.hyperparams").joinpath(f"{key}.yml").read_text())) == ENVIRONMENTS


def test_keys_are_unique_and_have_hyperparameters():
    keys = [algorithm.key for algorithm in ALGORITHMS]
    assert len(keys) == len(set(keys))
    for key in keys:
        assert files("sb3_ext.hyperparams").joinpath(f"{key}.yml").is_file()


OFF_POLICY = pytest.mark.parametrize("key", ["ddqn", "dueling_ddqn", "sac_discrete"])


@OFF_POLICY
def test_frames_are_stored_once_on_atari(key):
    entry = yaml.safe_load(files("sb3_ext.hyperparams").joinpath(f"{key}.yml").read_text())["atari"]
    # What the zoo does with it
    assert eval(entry["replay_buffer_class"]) is FrameReplayBuffer
    # Stacks of as many frames as the buffer takes by default
    assert entry["frame_stack"] == inspect.signature(FrameReplayBuffer).parameters["n_stack"].default


@OFF_POLICY
def test_minatar_settings_learn(key):
    register()
    entry = yaml.safe_load(files("sb3_ext.hyperparams").joinpath(f"{key}.yml").read_text())["MinAtar/Breakout-v1"]
    algo = next(resolve_name(algorithm.class_path) for algorithm in ALGORITHMS if algorithm.key == key)
    del entry["n_timesteps"]
    settings = {**entry, "policy_kwargs": eval(entry["policy_kwargs"]), "learning_starts": 10, "buffer_size": 100}
    model = algo(env="MinAtar/Breakout-v1", seed=0, device="cpu", **settings).learn(30)
    assert model._n_updates > 0
    assert any(isinstance(module, MinAtarFeatures) for module in model.policy.modules())
