"""What SB3's users expect of every algorithm, tested on each line of ``algo_cases.CASES``."""

import copy
import io
import zipfile

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch as th
from algo_cases import CASES, COMMON_LOG_KEYS, OBSERVATIONS, TupleActionEnv, seed_observations
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ext.common.adam import SingleTensorAdam
from sb3_ext.common.denormals import flushes_denormals

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_observation = pytest.mark.parametrize(
    ("case", "observation"),
    [(case, observation) for case in CASES for observation in case.observations],
    ids=lambda value: str(value),
)

N_STEPS = 12


def weights(model):
    """All tensors that training changes: networks and optimizers."""
    tensors = {}
    for name, state in model.get_parameters().items():
        entries = state["state"] if "param_groups" in state else {None: state}
        tensors.update({(name, entry, key): value for entry, values in entries.items() for key, value in values.items()})
    return tensors


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert th.equal(first[name], second[name]), name


def observations(model, n=5):
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(model.observation_space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


@each_observation
def test_learns_saves_and_loads(case, observation, tmp_path):
    policy, make_env = OBSERVATIONS[observation]
    model = case.make(make_env(case), policy)
    before = copy.deepcopy(weights(model))
    model.learn(N_STEPS)
    assert model.num_timesteps >= N_STEPS
    after = weights(model)
    assert all(th.isfinite(value).all() for value in after.values())
    changed = [name for name, value in before.items() if not th.equal(value, after[name])]
    assert changed

    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert_same_weights(model, loaded)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    actions, _ = loaded.predict(obs, deterministic=True)
    np.testing.assert_array_equal(actions, expected)


@each_case
def test_training_after_loading_continues_exactly(case, tmp_path):
    env = case.make(case.env()).get_env()

    def resume(model):
        if not case.is_offline:
            # As SB3's, a saved online model has neither the environment's state nor that of the global generators
            model.set_env(env, force_reset=True)
            model.set_random_seed(1)
            # SB3's test environments draw from the space that they share with a new model
            model.action_space = env.action_space
            env.action_space.seed(1)
            seed_observations(env, 1)
        if case.is_off_policy:
            model.load_replay_buffer(tmp_path / "replay_buffer")
        model.learn(N_STEPS, reset_num_timesteps=False)

    first_half = case.make(env).learn(N_STEPS)
    first_half.save(tmp_path / "model")
    if case.is_off_policy:
        first_half.save_replay_buffer(tmp_path / "replay_buffer")
    with_dataset = {"dataset": first_half.dataset} if case.is_offline else {}
    second_half = type(first_half).load(tmp_path / "model", env=env, **with_dataset)
    resume(second_half)

    whole = case.make(env).learn(N_STEPS)
    resume(whole)

    assert second_half.num_timesteps == whole.num_timesteps
    assert_same_weights(whole, second_half)


@each_case
def test_seed_decides_the_result(case):
    env = case.env()
    first, second, other = (case.make(env, seed=seed).learn(N_STEPS) for seed in (1, 1, 2))
    assert_same_weights(first, second)
    with pytest.raises(AssertionError):
        assert_same_weights(first, other)


@each_case
def test_denormals_are_zero_while_networks_are_trained(case, monkeypatch):
    seen = set()

    def recording(step):
        def wrapper(*args, **kwargs):
            seen.add(flushes_denormals())
            return step(*args, **kwargs)

        # Otherwise torch wraps it in calls of hooks
        wrapper.hooked = True
        return wrapper

    for optimizer_class in (th.optim.Adam, SingleTensorAdam):
        monkeypatch.setattr(optimizer_class, "step", recording(optimizer_class.step))
    case.make(case.env()).learn(N_STEPS)
    assert seen == {True}
    assert not flushes_denormals()


@each_case
def test_evaluation_during_training_does_not_change_it(case):
    env = case.env()
    # Making vectorized environments draws from the global generator
    evaluation = EvalCallback(make_vec_env(case.env), eval_freq=4, verbose=0)
    plain = case.make(env).learn(N_STEPS)
    evaluated = case.make(env).learn(N_STEPS, callback=evaluation)
    assert_same_weights(plain, evaluated)


@each_case
def test_unsupported_action_space_is_named(case):
    with pytest.raises(ValueError, match=r"supports .*but got Tuple"):
        case.algo(case.policy, TupleActionEnv())


@each_case
def test_dict_observations_need_the_multi_input_policy_or_are_refused(case):
    expected = "MultiInputPolicy" if "dict" in case.observations else "supports .*but got Dict"
    with pytest.raises(ValueError, match=expected):
        case.make(case.dict_env(), case.policy)


@each_case
def test_parallel_environments_and_reward_normalization(case):
    env = VecNormalize(make_vec_env(case.env, n_envs=3), norm_obs=False)
    model = case.make(env)
    model.learn(N_STEPS)
    actions, _ = model.predict(model.env.reset(), deterministic=True)
    assert actions.shape == (3, *model.action_space.shape)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_off_policy], ids=str)
def test_reward_normalization_stores_images_and_rewards_as_they_are(case):
    normalize = VecNormalize(make_vec_env(case.image_env, n_envs=2), norm_obs=False)
    model = case.make(normalize, "CnnPolicy")
    rewards, seen = [], []

    class Record(BaseCallback):
        def _on_step(self):
            rewards.append(normalize.get_original_reward())
            seen.append(model._last_obs.copy())
            return True

    model.learn(N_STEPS, callback=Record())
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.rewards[: buffer.pos], rewards)
    np.random.seed(0)  # for the environments
    sampled = buffer._get_samples(np.zeros(8, int)).observations.cpu().numpy()
    assert all((row == seen[0]).all(axis=(1, 2, 3)).any() for row in sampled)


@each_case
def test_callbacks_see_every_step(case, tmp_path):
    class Count(BaseCallback):
        def _on_training_start(self):
            self.steps = []

        def _on_step(self):
            self.steps.append(self.num_timesteps)
            return self.num_timesteps < N_STEPS - 2

    count = Count()
    evaluation = EvalCallback(make_vec_env(case.env), eval_freq=4, n_eval_episodes=2, log_path=tmp_path, verbose=0)
    checkpoints = CheckpointCallback(save_freq=5, save_path=tmp_path)
    model = case.make(case.env()).learn(N_STEPS, callback=[evaluation, checkpoints, count])
    assert count.steps == list(range(1, N_STEPS - 1))
    assert model.num_timesteps == N_STEPS - 2
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [4, 8]
    assert (tmp_path / "rl_model_10_steps.zip").is_file()


@each_case
def test_log_has_the_documented_keys(case, tmp_path):
    model = case.make(case.env())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(N_STEPS, log_interval=1)
    log = pd.read_csv(tmp_path / "progress.csv")
    assert COMMON_LOG_KEYS | case.log_keys <= set(log.columns)
    assert np.isfinite(log[sorted(case.log_keys)].iloc[-1]).all()
    # SB3's off-policy algorithms write it at the end of an episode, which here has 5 steps
    written = model.num_timesteps // 5 * 5 if case.is_off_policy else model.num_timesteps
    assert log["time/total_timesteps"].iloc[-1] == written


@each_case
def test_schedules_end_at_zero_though_the_last_rollout_goes_further(case):
    n_steps, seen = 6 * N_STEPS, []

    def schedule(progress_remaining):
        seen.append(progress_remaining)
        return 1e-3 * progress_remaining

    case.make(DummyVecEnv([case.env] * 5), learning_rate=schedule).learn(n_steps)
    first, *between, last = np.unique(seen)[::-1]
    assert first == 1.0
    n_envs = 1 if case.is_offline else 5
    n_done = n_steps * (1.0 - np.array(between)) / n_envs
    assert between and n_done == pytest.approx(n_done.round())
    # The last update of a data set comes before the end
    assert last == (pytest.approx(1 / n_steps) if case.is_offline else 0.0)


@each_case
def test_tensorboard_and_progress_bar(case, tmp_path):
    model = case.make(case.env(), tensorboard_log=str(tmp_path))
    model.learn(N_STEPS, log_interval=4, progress_bar=True)
    assert list(tmp_path.glob(f"{case.algo.__name__}_1/events*"))


@each_case
def test_parameters_can_be_taken_and_given(case):
    source, target = case.make(case.env()).learn(N_STEPS), case.make(case.env(), seed=5)
    target.set_parameters(source.get_parameters())
    assert_same_weights(source, target)
    with pytest.raises(ValueError, match="do not match"):
        target.set_parameters({"policy": source.get_parameters()["policy"]})
    with pytest.raises(ValueError, match="invalid object name"):
        target.set_parameters({"no_such_network": {}})
    # Given parameters are the ones that are trained on
    target.learn(N_STEPS)
    assert not all(th.equal(a, b) for a, b in zip(weights(source).values(), weights(target).values(), strict=True))


@each_case
def test_saved_parameters_need_no_pickle(case, tmp_path):
    case.make(case.env()).learn(N_STEPS).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".pth")]
        assert "policy.pth" in names and len(names) > 1
        for name in names:
            th.load(io.BytesIO(archive.read(name)), weights_only=True)


@each_observation
def test_predict_shapes_and_range(case, observation):
    policy, make_env = OBSERVATIONS[observation]
    model = case.make(make_env(case), policy)
    obs = observations(model, n=4)
    one = {key: value[0] for key, value in obs.items()} if isinstance(obs, dict) else obs[0]
    for deterministic in (True, False):
        batch, state = model.predict(obs, deterministic=deterministic)
        single, _ = model.predict(one, deterministic=deterministic)
        assert (state is not None) == case.is_recurrent
        assert batch.shape == (4, *model.action_space.shape)
        assert single.shape == model.action_space.shape
        assert all(model.action_space.contains(action) for action in batch)
    # A batch is acted on as its rows would be, and deterministic means the same again
    first, alone = model.predict(obs, deterministic=True)[0][0], model.predict(one, deterministic=True)[0]
    np.testing.assert_allclose(first, alone, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@each_case
def test_device_argument(case):
    assert case.make(case.env(), device="cpu").policy.device.type == "cpu"
    with pytest.raises(RuntimeError):
        case.make(case.env(), device="no_such_device")


@each_case
def test_policy_can_be_copied_and_saved_alone(case, tmp_path):
    model = case.make(case.env()).learn(N_STEPS)
    obs = observations(model)
    expected, _ = model.predict(obs, deterministic=True)
    copied = copy.deepcopy(model.policy)
    model.policy.save(tmp_path / "policy.pt")
    loaded = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    model.learn(N_STEPS)
    for policy in (copied, loaded):
        # The place in memory can change the last digit
        np.testing.assert_allclose(policy.predict(obs, deterministic=True)[0], expected, rtol=1e-5, atol=1e-7)


def pickled(model):
    # Environments made of local functions cannot be
    env, model.env = model.env, None
    copied = cloudpickle.loads(cloudpickle.dumps(model))
    copied.env = env
    return copied


def given_as_a_vector(model):
    vector = model.policy.parameters_to_vector()
    assert vector.shape == (sum(param.numel() for param in model.policy.parameters()),)
    model.policy.load_from_vector(vector)
    return model


@each_case
@pytest.mark.parametrize("change", [lambda model: model, pickled, given_as_a_vector])
def test_parameters_in_other_memory_are_trained(case, change):
    policy, make_env = OBSERVATIONS["image" if "image" in case.observations else case.observations[0]]
    model = case.make(make_env(case), policy).learn(N_STEPS)
    before = copy.deepcopy(model.policy.state_dict())
    model = change(model)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, before[name]), name
    model.learn(N_STEPS, reset_num_timesteps=False)
    unchanged = [name for name, value in model.policy.state_dict().items() if th.equal(value, before[name])]
    assert len(unchanged) < len(before) / 2, unchanged


@each_case
def test_zoo_style_evaluation(case):
    model = case.make(case.env())
    mean, std = evaluate_policy(model, DummyVecEnv([case.env]), n_eval_episodes=2, warn=False)
    assert np.isfinite([mean, std]).all()
