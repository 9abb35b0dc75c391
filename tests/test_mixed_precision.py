"""Convolutions and hidden layers in bfloat16, in all algorithms whose images go through ``ConvFeatures``."""

import copy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ext import BCQ, DDQN, DuelingDDQN, SACDiscrete
from sb3_ext.common.conv_features import ConvFeatures
from sb3_ext.common.evaluation import GraphEvaluation
from sb3_ext.common.flat_parameters import FlatParameters
from tests.algo_cases import DEVICE

MIXED = {"features_extractor_class": ConvFeatures, "features_extractor_kwargs": {"mixed_precision": True}}
ACTIONS = spaces.Discrete(3)


class StripesEnv(gym.Env):
    """Shows one of three stripes; the action that names it gives 1, any other 0. Episodes have one step."""

    observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = ACTIONS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stripe = int(self.np_random.integers(3))
        image = self.np_random.integers(0, 100, (1, 36, 36), dtype=np.uint8)
        image[:, 12 * self.stripe : 12 * (self.stripe + 1)] += 100
        return image, {}

    def step(self, action):
        reward = float(action == self.stripe)
        return self.reset()[0], reward, True, False, {}


def networks(algo, activation_fn):
    """A network of the algorithm that has ``heads``, in mixed precision, and the same network in float64."""
    policy_class = (algo.discrete_policy_aliases if algo is BCQ else algo.policy_aliases)["CnnPolicy"]
    th.manual_seed(0)
    policy = policy_class(
        StripesEnv.observation_space, ACTIONS, lambda _: 1e-3, net_arch=[24, 16], activation_fn=activation_fn, **MIXED
    )
    net = policy.critic if algo is SACDiscrete else policy if algo is BCQ else policy.q_net
    exact = copy.deepcopy(net).double()
    (exact.q_net if algo is BCQ else exact).features_extractor.dtype = th.float32
    return net, exact


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("algo", [BCQ, DDQN, DuelingDDQN, SACDiscrete])
def test_outputs_and_gradients_against_float64(algo, activation_fn):
    net, exact = networks(algo, activation_fn)
    q_net = net.q_net if algo is BCQ else net
    images = th.randint(0, 256, (2, 8, 1, 36, 36), dtype=th.uint8)
    obs, next_obs = (q_net.preprocess(each) for each in images)
    assert obs.dtype == next_obs.dtype == th.bfloat16

    flats = [getattr(each, "flat", None) or FlatParameters(each) for each in (net, exact)]
    online = net.heads.evaluate(flats[0], obs, next_obs)
    expected = GraphEvaluation(exact.heads, flats[1], images[0].double() / 255, images[1].double() / 255)
    # Of one sign, so that errors do not count for more because sums cancel
    gradients = [th.rand_like(output) for output in online.outputs]
    online.backward(*gradients)
    expected.backward(*[gradient.double() for gradient in gradients])

    def errors(results, exact_results):
        assert {result.dtype for result in results} == {th.float32}
        return [((a - b).norm() / b.norm()).item() for a, b in zip(results, exact_results, strict=True)]

    outputs = errors(online.outputs + online.next_outputs, expected.outputs + expected.next_outputs)
    with th.no_grad():
        outputs += errors(net.heads(obs), expected.outputs)
    assert 0.0 < max(outputs) < 0.01
    of_convolutions, of_heads = np.split(errors(*[flat.gradient_views() for flat in flats]), [6])
    # Through the convolutions, errors add up; without the factor 1/sqrt(2) of the streams they would be 0.41
    assert 0.0 < max(of_heads) < 0.02 and 0.0 < max(of_convolutions) < 0.15


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.SiLU])
def test_actions_differ_by_less_than_bfloat16_tells_apart(activation_fn):
    net, _ = networks(DuelingDDQN, activation_fn)
    obs = net.preprocess(th.randint(0, 256, (8, 1, 36, 36), dtype=th.uint8))
    with th.no_grad():
        before = net.heads(obs)[0]
        net.q_net.value_net.bias += 1000.0
        after = net.heads(obs)[0]
    # In bfloat16, the neighbours of 1000 are 996 and 1004
    assert before.std(dim=1).max() < 1.0
    th.testing.assert_close(after - 1000.0, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize("algo", [DDQN, DuelingDDQN, SACDiscrete])
def test_saved_models_go_on_as_they_would_have(algo, tmp_path: Path):
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=True)
    env.observation_space.seed(0)
    settings = {"learning_starts": 8, "batch_size": 4, "buffer_size": 64, "train_freq": 1, "seed": 0, "policy_kwargs": MIXED}
    model = algo("CnnPolicy", env, **settings).learn(16)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    trained = []
    for each in (model, algo.load(tmp_path / "model", env=env)):
        each.load_replay_buffer(tmp_path / "buffer")
        each._setup_learn(1)
        np.random.seed(0)
        th.manual_seed(0)
        each.train(3, 4)
        trained.append(each.policy.state_dict())
    assert {tensor.dtype for tensor in trained[0].values()} == {th.float32}
    th.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("algo", "settings"),
    [(DuelingDDQN, {"exploration_fraction": 0.5, "target_update_interval": 50}), (SACDiscrete, {"ent_coef": 0.1})],
)
def test_learns_from_images(algo, settings):
    # Chance is 1/3
    settings = {"learning_rate": 1e-3, "learning_starts": 50, "buffer_size": 500, "train_freq": 2, "gamma": 0.5, **settings}
    model = algo("CnnPolicy", DummyVecEnv([StripesEnv]), batch_size=32, seed=0, device=DEVICE, policy_kwargs=MIXED, **settings)
    model.learn(250)
    mean_reward, _ = evaluate_policy(model, DummyVecEnv([StripesEnv]), n_eval_episodes=50, warn=False)
    assert mean_reward > 0.9
