"""Rollouts of which only the actor is evaluated while stepping: they are SB3's."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_ext.common import rollouts as module
from sb3_ext.common.rollouts import ActorOnlyRollouts

BUFFER_ARRAYS = ("actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")


class FastA2C(ActorOnlyRollouts, A2C):
    pass


class FastA2CWithoutBootstrapping(FastA2C):
    bootstrap_truncated = False


class ScheduledEnv(gym.Env):
    """Random observations; the reward depends on the action. Episodes are terminated and truncated in turns."""

    def __init__(self, observation_space, action_space, seed=0):
        self.observation_space, self.action_space = copy.deepcopy(observation_space), action_space
        self.observation_space.seed(seed)
        self.n_episodes = seed

    def reset(self, *, seed=None, options=None):
        self.n_steps, self.n_episodes = 0, self.n_episodes + 1
        return self.observation_space.sample(), {}

    def step(self, action):
        self.n_steps += 1
        is_over, is_odd = self.n_steps == 5, self.n_episodes % 2 == 1
        return self.observation_space.sample(), float(np.sum(action)), is_over and is_odd, is_over and not is_odd, {}


def scheduled(observation_space, action_space, n_envs=2):
    """Both kinds of end in each rollout of more than ten steps, in different environments at once."""
    return DummyVecEnv([lambda seed=seed: ScheduledEnv(observation_space, action_space, seed) for seed in range(n_envs)])


def pendulum(n_envs=2):
    return make_vec_env(lambda: gym.make("Pendulum-v1", max_episode_steps=7), n_envs, seed=0)


class Recorder(BaseCallback):
    """Keeps what each rollout left behind."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.states, self.events, self.env_rewards = [], [], [], []

    def _on_rollout_start(self):
        self.events.append("start")
        self.env_rewards = []

    def _on_step(self):
        names = ("actions", "clipped_actions", "rewards", "dones", "new_obs", "n_steps", "n_rollout_steps")
        self.events.append({name: copy.deepcopy(self.locals[name]) for name in names})
        assert self.locals["self"] is self.model and self.locals["env"] is self.model.env
        assert self.locals["rollout_buffer"] is self.model.rollout_buffer and len(self.locals["infos"]) == self.model.n_envs
        self.env_rewards.append(self.locals["rewards"].copy())
        return True

    def _on_rollout_end(self):
        self.events.append("end")
        model = self.model
        self.rollouts.append(contents(model.rollout_buffer))
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        last = copy.deepcopy((model._last_obs, model._last_episode_starts))
        self.states.append((model.num_timesteps, episodes, *last, th.get_rng_state()))


def contents(buffer):
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    arrays = {f"observations {key}": array.copy() for key, array in observations.items()}
    arrays.update({name: getattr(buffer, name).copy() for name in BUFFER_ARRAYS})
    return {**arrays, "pos": buffer.pos, "full": buffer.full}


def learn(algo, env, policy="MlpPolicy", n_rollouts=3, n_steps=16, **kwargs):
    model = algo(policy, env, n_steps=n_steps, seed=0, device="cpu", **kwargs)
    recorder = Recorder()
    model.learn(n_rollouts * n_steps * model.n_envs, callback=recorder)
    return model, recorder


def assert_close(actual, expected, name=""):
    """Numbers up to the rounding of float32; everything else exactly, the state of the random generator among it."""
    assert type(actual) is type(expected), name
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key], key)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_close(*pair, f"{name} {index}")
    elif isinstance(expected, np.ndarray) and np.issubdtype(expected.dtype, np.floating):
        assert actual.dtype == expected.dtype, name
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    else:
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def assert_same_as_sb3(make_env, policy="MlpPolicy", **kwargs):
    """Several rollouts with training between them, so that parameters and the random generator matter."""
    _, expected = learn(A2C, make_env(), policy, **kwargs)
    model, actual = learn(FastA2C, make_env(), policy, **kwargs)
    assert len(actual.rollouts) == len(expected.rollouts) == 3
    for attribute in ("rollouts", "states", "events"):
        assert_close(getattr(actual, attribute), getattr(expected, attribute), attribute)
    return model, actual


# --- The rollout is SB3's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 8])
def test_discrete_actions(n_envs):
    # Episodes that end in the rollouts
    _, recorder = assert_same_as_sb3(lambda: make_vec_env("CartPole-v1", n_envs, seed=0), n_steps=64)
    assert all(rollout["episode_starts"][1:].any() for rollout in recorder.rollouts)


@pytest.mark.parametrize("n_envs", [1, 8])
def test_continuous_actions_and_time_limits(n_envs):
    _, recorder = assert_same_as_sb3(lambda: pendulum(n_envs))
    assert (recorder.rollouts[-1]["rewards"] != recorder.env_rewards).any(axis=1).sum() == 2
    clipped = [event["actions"] != event["clipped_actions"] for event in recorder.events if isinstance(event, dict)]
    # The standard deviation is 1 and torques go to 2
    assert np.any(clipped)


VECTOR = spaces.Box(-1.0, 1.0, (3,))
DICT = spaces.Dict({"image": spaces.Box(0, 255, (1, 36, 36), np.uint8), "vector": VECTOR, "number": spaces.Discrete(4)})
SMALL = {"policy_kwargs": {"net_arch": [8]}}


@pytest.mark.parametrize(
    "action_space",
    [
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiDiscrete(np.array([2, 3], np.int8), dtype=np.int8),
        spaces.MultiBinary(3),
        spaces.Box(-1.0, 1.0, (2, 3)),
        spaces.Box(-0.1, 0.1, (2,), np.float64),
        spaces.Box(-9, 9, (2,), np.int64),
        spaces.Discrete(20),
    ],
    ids=str,
)
def test_other_actions(action_space):
    assert_same_as_sb3(lambda: scheduled(VECTOR, action_space), **SMALL)


@pytest.mark.parametrize(
    ("policy", "observation_space"),
    [
        ("CnnPolicy", spaces.Box(0, 255, (1, 36, 36), np.uint8)),
        # Transposed by SB3
        ("CnnPolicy", spaces.Box(0, 255, (36, 36, 3), np.uint8)),
        ("MultiInputPolicy", DICT),
        ("MlpPolicy", spaces.Discrete(4)),
        ("MlpPolicy", spaces.MultiDiscrete([2, 3])),
        ("MlpPolicy", spaces.MultiBinary(3)),
        ("MlpPolicy", spaces.Box(-1.0, 1.0, (2, 3))),
        ("MlpPolicy", spaces.Box(-1.0, 1.0, (3,), np.float64)),
        ("MlpPolicy", spaces.Box(-5, 5, (3,), np.int64)),
    ],
    ids=lambda parameter: str(parameter)[:40],
)
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1.0, 1.0, (2,))], ids=["Discrete", "Box"])
def test_observations(policy, observation_space, action_space):
    assert_same_as_sb3(lambda: scheduled(observation_space, action_space), policy, **SMALL)


def test_separate_feature_extractors():
    kwargs = {"policy_kwargs": {"share_features_extractor": False, "net_arch": {"pi": [4], "vf": [8, 8]}}}
    assert_same_as_sb3(lambda: scheduled(VECTOR, spaces.Discrete(3)), **kwargs)
    assert_same_as_sb3(lambda: scheduled(DICT, spaces.Discrete(3)), "MultiInputPolicy", **kwargs)


@pytest.mark.parametrize("activation_fn", [th.nn.ReLU, th.nn.ELU])
def test_activation_functions(activation_fn):
    assert_same_as_sb3(pendulum, policy_kwargs={"activation_fn": activation_fn})


def test_normalized_environments():
    assert_same_as_sb3(lambda: VecNormalize(pendulum()))
    assert_same_as_sb3(lambda: VecNormalize(make_vec_env("CartPole-v1", 2, seed=0)), n_steps=64)


NUMBERS = spaces.Box(-5, 5, (3,), np.int64)


@pytest.mark.parametrize(
    ("policy", "observation_space"), [("MlpPolicy", NUMBERS), ("MultiInputPolicy", spaces.Dict({"numbers": NUMBERS}))]
)
def test_observations_of_which_the_buffer_keeps_less_than_the_policy_sees(policy, observation_space):
    # Normalized observations are no integers, but SB3 stores them as such
    assert_same_as_sb3(lambda: VecNormalize(scheduled(observation_space, spaces.Discrete(3))), policy, **SMALL)


class Dropped(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.flatten = th.nn.Sequential(th.nn.Flatten(), th.nn.Dropout())


def test_layers_that_behave_differently_in_training():
    assert_same_as_sb3(pendulum, policy_kwargs={"features_extractor_class": Dropped})


def test_observations_that_are_not_finite_reach_no_environment():
    class Broken(ScheduledEnv):
        n_total = 0

        def step(self, action):
            assert np.isfinite(action).all()
            Broken.n_total += 1
            obs, *others = super().step(action)
            return obs * (np.nan if Broken.n_total == 7 else 1), *others

    env = DummyVecEnv([lambda: Broken(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))])
    with pytest.raises(ValueError, match="an observation is not finite"):
        FastA2C("MlpPolicy", env, n_steps=32, device="cpu").learn(32)
    assert Broken.n_total == 7


class Strided(VecEnvWrapper):
    """Observations in double precision, with gaps in memory."""

    def reset(self):
        return self.strided(self.venv.reset())

    def step_wait(self):
        observations, *others = self.venv.step_wait()
        return self.strided(observations), *others

    def strided(self, observations):
        return np.repeat(observations.astype(np.float64) + 1e-9, 2, axis=1)[:, ::2]


def test_observations_in_double_precision_with_gaps_in_memory():
    assert_same_as_sb3(lambda: Strided(pendulum()))


class OneMemory(VecEnvWrapper):
    """Gives the last observations of all episodes in the same memory."""

    def reset(self):
        self.terminal_observation = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        return self.venv.reset()

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                self.terminal_observation[:] = info["terminal_observation"]
                info["terminal_observation"] = self.terminal_observation
        return observations, rewards, dones, infos


def test_last_observations_of_episodes_in_memory_that_is_used_again():
    assert_same_as_sb3(lambda: OneMemory(pendulum(n_envs=1)))


class Squashed(ActorCriticPolicy):
    """A subclass of a distribution that SB3's policies have."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.action_dist = SquashedDiagGaussianDistribution(self.action_dist.action_dim)


def test_other_distributions():
    _, recorder = assert_same_as_sb3(pendulum, Squashed)
    assert np.abs(recorder.rollouts[0]["actions"]).max() < 1.0


def test_values_in_several_batches(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 5)
    assert_same_as_sb3(lambda: pendulum(2))
    assert_same_as_sb3(lambda: pendulum(8))
    assert_same_as_sb3(lambda: scheduled(DICT, spaces.Discrete(3)), "MultiInputPolicy", **SMALL)


class SquaredAdvantages(RolloutBuffer):
    def compute_returns_and_advantage(self, last_values, dones):
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages **= 2


def test_rollout_buffer_with_advantages_of_its_own():
    _, recorder = assert_same_as_sb3(pendulum, rollout_buffer_class=SquaredAdvantages)
    assert (recorder.rollouts[0]["advantages"] >= 0).all()


class ExactAdvantages(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        expected = copy.deepcopy(buffer)
        expected.compute_returns_and_advantage(th.as_tensor(self.locals["values"]), self.locals["dones"])
        np.testing.assert_array_equal(buffer.advantages, expected.advantages)
        np.testing.assert_array_equal(buffer.returns, expected.returns)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_advantages_to_the_last_bit(n_envs):
    model = FastA2C("MlpPolicy", pendulum(n_envs), n_steps=50, gamma=0.98, gae_lambda=0.93, seed=0, device="cpu")
    model.learn(100 * n_envs, callback=ExactAdvantages())


# --- What is evaluated, and when -------------------------------------------------------------------------------------


def n_calls(env, policy="MlpPolicy", algo=FastA2C, **kwargs):
    """How often a rollout of 50 steps calls the policy, the last layers of actor and critic."""
    model = algo(policy, env, n_steps=50, seed=0, device="cpu", **kwargs)
    modules = {"policy": model.policy, "actor": model.policy.action_net, "critic": model.policy.value_net}
    calls = dict.fromkeys(modules, 0)

    def counted(name, forward):
        def called(*args, **kwargs):
            calls[name] += 1
            return forward(*args, **kwargs)

        return called

    # With a hook, the modules would be called at each step
    for name, each in modules.items():
        each.forward = counted(name, each.forward)
    model._setup_learn(50)
    callback = Recorder()
    callback.init_callback(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 50)
    return calls


def test_perceptrons_are_evaluated_once_per_rollout():
    # The critic also for the truncated episodes and for what follows the last step
    assert n_calls(pendulum()) == {"policy": 0, "actor": 1, "critic": 3}
    assert n_calls(scheduled(VECTOR, spaces.Discrete(3))) == {"policy": 0, "actor": 1, "critic": 3}


def test_the_actor_alone_is_evaluated_at_each_step():
    assert n_calls(scheduled(VECTOR, spaces.MultiBinary(3))) == {"policy": 0, "actor": 51, "critic": 3}
    assert n_calls(scheduled(DICT, spaces.Discrete(3)), "MultiInputPolicy") == {"policy": 0, "actor": 51, "critic": 3}


def test_without_bootstrapping_the_critic_is_not_evaluated():
    for env in (pendulum(), scheduled(VECTOR, spaces.MultiBinary(3))):
        assert n_calls(env, algo=FastA2CWithoutBootstrapping)["critic"] == 0


# --- Policies and buffers for which SB3's collector runs --------------------------------------------------------------


class OwnForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values + 100.0, log_prob


class OwnValues(ActorCriticPolicy):
    def predict_values(self, obs):
        return super().predict_values(obs) + float("inf")


class HalvedRewards(RolloutBuffer):
    def add(self, obs, action, reward, *args, **kwargs):
        super().add(obs, action, reward / 2, *args, **kwargs)


FALLBACKS = {
    "gSDE": ("MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "forward": (OwnForward, {}),
    "predict_values": (OwnValues, {}),
    "add": ("MlpPolicy", {"rollout_buffer_class": HalvedRewards}),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_collector_of_sb3_takes_over(name):
    policy, kwargs = FALLBACKS[name]
    assert n_calls(pendulum(), policy, **kwargs)["policy"] == 50
    if name != "predict_values":
        _, recorder = assert_same_as_sb3(pendulum, policy, **kwargs)
        assert (recorder.rollouts[0]["values"] > 50).all() == (name == "forward")


# --- Without bootstrapping at time limits -----------------------------------------------------------------------------


class SeesGamma(Recorder):
    def _on_step(self):
        assert self.model.gamma == 0.9
        return super()._on_step()


WITHOUT_BOOTSTRAPPING = {
    "numpy": (pendulum, "MlpPolicy", {}),
    "torch": (lambda: scheduled(DICT, spaces.MultiBinary(3)), "MultiInputPolicy", SMALL),
    **{name: (pendulum, *FALLBACKS[name]) for name in FALLBACKS},
}


@pytest.mark.parametrize("name", WITHOUT_BOOTSTRAPPING)
def test_without_bootstrapping_rewards_are_those_of_the_environment_and_values_are_zero(name):
    make_env, policy, kwargs = WITHOUT_BOOTSTRAPPING[name]
    model = FastA2CWithoutBootstrapping(policy, make_env(), n_steps=16, gamma=0.9, seed=0, device="cpu", **kwargs)
    recorder = SeesGamma()
    model.learn(16 * model.n_envs, callback=recorder)
    (rollout,) = recorder.rollouts
    np.testing.assert_array_equal(rollout["rewards"], np.stack(recorder.env_rewards) / (2 if name == "add" else 1))
    assert not rollout["values"].any()
    # Sums of the rewards up to the end of the episode
    expected = np.zeros((17, model.n_envs))
    for step in reversed(range(16)):
        starts = rollout["episode_starts"][step + 1] if step < 15 else model._last_episode_starts
        expected[step] = rollout["rewards"][step] + 0.9 * (1 - starts) * expected[step + 1]
    np.testing.assert_allclose(rollout["returns"], expected[:16], rtol=1e-5)
    # The policy is what it was
    values = model.policy.predict_values(model.policy.obs_to_tensor(model._last_obs)[0])
    assert (values != 0).all()
    assert model.policy(model.policy.obs_to_tensor(model._last_obs)[0])[1].all()


def test_without_bootstrapping_actions_are_the_same():
    _, expected = learn(A2C, pendulum(), n_rollouts=1)
    _, actual = learn(FastA2CWithoutBootstrapping, pendulum(), n_rollouts=1)
    for name in ("observations ", "actions", "log_probs", "episode_starts"):
        assert_close(actual.rollouts[0][name], expected.rollouts[0][name], name)


# --- Callbacks -------------------------------------------------------------------------------------------------------


class Stop(Recorder):
    def _on_step(self):
        super()._on_step()
        return self.n_calls < 27


@pytest.mark.parametrize("policy_class", ["MlpPolicy", OwnForward])
def test_a_callback_stops_the_rollout(policy_class):
    stopped = []
    for algo in (A2C, FastA2C):
        model = algo(policy_class, pendulum(), n_steps=16, seed=0, device="cpu")
        callback = Stop()
        model.learn(1000, callback=callback)
        assert callback.n_calls == 27 and model.num_timesteps == 54
        last = (model._last_obs, model._last_episode_starts)
        stopped.append((callback.events, callback.states, contents(model.rollout_buffer), *last, th.get_rng_state()))
    assert_close(stopped[1], stopped[0])


class RewardForSpeed(Recorder):
    def _on_step(self):
        self.locals["rewards"] += self.locals["new_obs"][:, 2]
        return super()._on_step()


def test_a_callback_changes_rewards():
    rollouts = []
    for algo in (A2C, FastA2C):
        model = algo("MlpPolicy", pendulum(), n_steps=16, seed=0, device="cpu")
        callback = RewardForSpeed()
        model.learn(64, callback=callback)
        rollouts.append(callback.rollouts)
    assert_close(rollouts[1], rollouts[0])


def test_successes_are_counted():
    class Successful(ScheduledEnv):
        def step(self, action):
            *results, _ = super().step(action)
            return *results, {"is_success": self.n_episodes % 3 == 0}

    counted = []
    for algo in (A2C, FastA2C):
        env = DummyVecEnv([lambda: Successful(VECTOR, spaces.Discrete(3))])
        model, _ = learn(algo, env)
        counted.append(list(model.ep_success_buffer))
    assert counted[0] == counted[1] and any(counted[0]) and not all(counted[0])
