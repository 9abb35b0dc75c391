"""What mixed precision changes on Pong: an agent's choices, its gradients, and how fast a network learns given values."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from benchmarks import results
from benchmarks.results import Row
from sb3_ext import DuelingDDQN, FrameReplayBuffer
from sb3_ext.common.losses import huber_loss

BATCH, N_TEST = 32, 2000
#: Layers of Dueling DDQN by the beginning of their parameters' names
PARTS = {"convolutions": "features_extractor", "streams": "q_net.trunk", "last layers": ("q_net.value", "q_net.advantage")}


def pong(seed: int) -> VecEnv:
    """:return: the environment of the two-hours run"""
    import ale_py

    gym.register_envs(ale_py)
    env = make_vec_env("PongNoFrameskip-v4", seed=seed, wrapper_class=AtariWrapper, wrapper_kwargs={"screen_size": 44})
    return VecFrameStack(env, 4)


def agent(env: VecEnv, mixed_precision: bool, seed: int, **kwargs: Any) -> DuelingDDQN:
    """:return: an untrained agent with the settings of the two-hours run, but for those that depend on its length"""
    settings = {
        "learning_rate": 2e-4,
        "batch_size": BATCH,
        "train_freq": 2,
        "n_steps": 10,
        "learning_starts": 5000,
        "target_update_interval": 1000,
        "exploration_final_eps": 0.01,
        "replay_buffer_class": FrameReplayBuffer,
        "policy_kwargs": {"features_extractor_kwargs": {"mixed_precision": mixed_precision}},
    }
    return DuelingDDQN("CnnPolicy", env, seed=seed, **{**settings, **kwargs})


def q_values(model: DuelingDDQN, observations: Any) -> th.Tensor:
    """:return: of all actions, (batch, n_actions)"""
    with th.no_grad():
        return th.cat([model.q_net(block) for block in observations.split(500)])


def targets(model: DuelingDDQN, batch: ReplayBufferSamples) -> th.Tensor:
    """:return: the agent's targets, (batch, 1)"""
    with th.no_grad():
        of_target_network = model.q_net_target(batch.next_observations)
    return model._target(batch, q_values(model, batch.next_observations), of_target_network)


def set_gradient(model: DuelingDDQN, batch: ReplayBufferSamples, target_q_values: th.Tensor) -> None:
    """Set the gradient of the loss against given targets."""
    with th.no_grad():
        online = model.q_net.heads.evaluate(model.policy.flat, model.q_net.preprocess(batch.observations))
        _, gradient = huber_loss(online.outputs[0], batch.actions.long(), target_q_values)
        online.backward(gradient)


def choices(single: DuelingDDQN, mixed: DuelingDDQN, batch: ReplayBufferSamples) -> Row:
    """
    :param single: In single precision
    :param mixed: The same parameters in mixed precision
    :param batch: Transitions
    :return: How often both choose the same action, what the choices of ``mixed`` lose by the values of ``single``, and by how
        much these exceed an action drawn at random
    """
    values, of_mixed = q_values(single, batch.observations), q_values(mixed, batch.observations)
    chosen = of_mixed.argmax(dim=1, keepdim=True)
    best = values.max(dim=1).values
    return {
        "agreement": (values.argmax(dim=1, keepdim=True) == chosen).float().mean().item(),
        "loss": (best - values.gather(1, chosen)[:, 0]).mean().item(),
        "advantage": (best - values.mean(dim=1)).mean().item(),
    }


def gradients(single: DuelingDDQN, mixed: DuelingDDQN, batches: list[ReplayBufferSamples]) -> Row:
    """
    :param single: In single precision
    :param mixed: The same parameters in mixed precision
    :param batches: Of transitions
    :return: For each part of the network the norm of the mean gradient over the batches, in single precision, and the root
        mean squares of the distances from it (``noise``), and of those to the gradients in mixed precision (``error``); the
        norm of the latter's mean (``bias``)
    """
    of_both = []
    for model in (single, mixed):
        of_batches = []
        for batch in batches:
            set_gradient(model, batch, targets(model, batch))
            assert model.policy.flat.tensor.grad is not None
            of_batches.append(model.policy.flat.tensor.grad.clone())
        of_both.append(th.stack(of_batches))
    names, sizes = zip(*((name, parameter.numel()) for name, parameter in single.q_net.named_parameters()), strict=True)

    def rms(vectors: th.Tensor) -> float:
        return vectors.square().sum(dim=1).mean().sqrt().item()

    parts = {}
    for part, begin in PARTS.items():
        which = th.repeat_interleave(th.tensor([name.startswith(begin) for name in names]), th.tensor(sizes))
        exact, rounded = (each[:, which] for each in of_both)
        mean, error = exact.mean(dim=0), rounded - exact
        parts[part] = {
            "mean": mean.norm().item(),
            "noise": rms(exact - mean),
            "error": rms(error),
            "bias": error.mean(dim=0).norm().item(),
        }
    return parts


def fit_interval(n_updates: int) -> int:
    """:return: updates between two evaluations of a network that is fitted"""
    return max(1, n_updates // 5)


def fit(model: DuelingDDQN, source: DuelingDDQN, n_updates: int, seed: int) -> list[float]:
    """
    :param model: Untrained
    :param source: The agent whose targets it learns, which stay as they are, with a filled replay buffer
    :param n_updates: Number of updates
    :param seed: Of the batches
    :return: Mean squared errors over the variance of the targets, at the beginning and after each fifth of the updates
    """
    buffer, errors = source.replay_buffer, []
    np.random.seed(0)
    test = buffer.sample(N_TEST)
    expected = targets(source, test)
    np.random.seed(seed)
    for update in range(n_updates + 1):
        if update % fit_interval(n_updates) == 0:
            error = q_values(model, test.observations).gather(1, test.actions.long()) - expected
            errors.append((error.square().mean() / expected.var()).item())
        if update == n_updates:
            break
        batch = buffer.sample(BATCH)
        set_gradient(model, batch, targets(source, batch))
        model.policy.flat.step(model.policy.optimizer, model.max_grad_norm)
    return errors


def measure(n_training: int, n_transitions: int, n_updates: int, n_seeds: int) -> Row:
    """
    :param n_training: Steps of the agent's training, in single precision
    :param n_transitions: That it collects afterwards, with one action in 20 at random
    :param n_updates: Of each network that is fitted
    :param n_seeds: Of networks and batches
    :return: The row of results
    """
    th.set_num_threads(1)
    env = pong(seed=0)
    # Random actions become fewer as fast as in the two-hours run
    fraction = min(1.0, 21_000 / n_training)
    trained = agent(env, False, seed=0, buffer_size=n_training, exploration_fraction=fraction).learn(n_training)
    acting = {
        "buffer_size": n_transitions,
        "learning_starts": 0,
        "exploration_initial_eps": 0.05,
        "exploration_final_eps": 0.05,
    }
    single, mixed = (agent(env, mixed_precision, seed=1, gradient_steps=0, **acting) for mixed_precision in (False, True))
    parameters = trained.policy.state_dict()
    single.policy.load_state_dict(parameters)
    single.learn(n_transitions)
    for model in (single, mixed):
        # Acting has copied the target network
        model.policy.load_state_dict(parameters)
    buffer = single.replay_buffer
    np.random.seed(0)
    return {
        "kind": "precision",
        "env": "PongNoFrameskip-v4",
        "trained_steps": n_training,
        "transitions": n_transitions,
        "updates": n_updates,
        "choices": choices(single, mixed, buffer.sample(N_TEST)),
        "gradients": gradients(single, mixed, [buffer.sample(BATCH) for _ in range(100)]),
        "fit_errors": {
            name: [fit(agent(env, mixed_precision, seed, buffer_size=100), single, n_updates, seed) for seed in range(n_seeds)]
            for name, mixed_precision in (("single", False), ("mixed", True))
        },
        "command": results.own_command(),
        **results.stamp(),
    }


def summary(row: Row) -> str:
    """:return: one line about a row of ``measure``"""
    last = {name: [errors[-1] for errors in of_seeds] for name, of_seeds in row["fit_errors"].items()}
    of_parts = ", ".join(f"{part} {one['error'] / one['noise']:.2f}" for part, one in row["gradients"].items())
    return (
        f"same action {row['choices']['agreement']:.2%}; error of gradients over their noise: {of_parts}; "
        f"error of the fit in single precision {np.mean(last['single']):.3f}, in mixed {np.mean(last['mixed']):.3f}"
    )
