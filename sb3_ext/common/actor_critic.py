"""What the policy-gradient algorithms have to know about the inside of an SB3 actor-critic policy."""

from __future__ import annotations

import copy

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ext.common.mlp import MLP, has_hooks
from sb3_ext.common.observations import map_observations

# A policy that replaces none of these computes what SB3's does, in the same order
_METHODS = (
    "forward",
    "extract_features",
    "evaluate_actions",
    "get_distribution",
    "predict_values",
    "_get_action_dist_from_latent",
)


def is_standard(policy: ActorCriticPolicy) -> bool:
    """
    :param policy: Any actor-critic policy
    :return: Whether it acts, values and draws as SB3's own ``ActorCriticPolicy`` (its networks may be any)
    """
    return all(getattr(type(policy), name) is getattr(ActorCriticPolicy, name) for name in _METHODS)


def action_distribution(policy: ActorCriticPolicy, observations: PyTorchObs) -> Distribution:
    """
    :param policy: Any actor-critic policy
    :param observations: A batch
    :return: Its action distribution. The policy has one object for it, which each call changes and which keeps the graph of
        the last one; this is another object.
    """
    shared = policy.action_dist
    policy.action_dist = copy.copy(shared)
    try:
        return policy.get_distribution(observations)
    finally:
        policy.action_dist = shared


def split_parameters(policy: ActorCriticPolicy) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """
    Tell the actor's parameters from the critic's by what the outputs depend on, not by their names.

    :param policy: Any actor-critic policy
    :return: The parameters on which the action distribution depends, shared ones among them, and those on which only the
        values depend; both in the order of ``policy.parameters()``
    """
    # Any numbers do, but those that the bounds of a space allow can be too large for a network
    space = policy.observation_space
    zeros = map_observations(
        lambda part: np.zeros(part.shape, part.dtype), space.spaces if isinstance(space, spaces.Dict) else space
    )
    obs, _ = policy.obs_to_tensor(zeros)
    # Also what is frozen now, and may not be later, if it can be together with the others
    dtypes = {param.dtype for param in policy.parameters() if param.requires_grad} or {th.float32}
    params = [param for param in policy.parameters() if param.dtype in dtypes]
    frozen = [param for param in params if not param.requires_grad]
    for param in frozen:
        param.requires_grad_(True)
    was_training = policy.training
    policy.set_training_mode(False)
    with th.enable_grad():
        distribution = action_distribution(policy, obs)
        log_prob = distribution.log_prob(distribution.get_actions(deterministic=True).detach())
        values = policy.predict_values(obs)
    policy.set_training_mode(was_training)
    actor_grads = th.autograd.grad(log_prob.sum(), params, allow_unused=True, retain_graph=True)
    value_grads = th.autograd.grad(values.sum(), params, allow_unused=True) if values.requires_grad else [None] * len(params)
    for param in frozen:
        param.requires_grad_(False)
    actor = [param for param, grad in zip(params, actor_grads, strict=True) if grad is not None]
    critic = [
        param
        for param, actor_grad, value_grad in zip(params, actor_grads, value_grads, strict=True)
        if actor_grad is None and value_grad is not None
    ]
    return actor, critic


def actor_network(policy: ActorCriticPolicy) -> MLP | None:
    """
    :param policy: Any actor-critic policy
    :return: The network from flat observations to the mean actions or logits, sharing the policy's layers, if the policy is
        SB3's and this network is a plain perceptron
    """
    return _perceptron(policy, "policy_net", "action_net")


def critic_network(policy: ActorCriticPolicy) -> MLP | None:
    """
    :param policy: Any actor-critic policy
    :return: The network from flat observations to the value, as ``actor_network``
    """
    return _perceptron(policy, "value_net", "value_net")


def _perceptron(policy: ActorCriticPolicy, latent_name: str, output_name: str) -> MLP | None:
    space = policy.observation_space
    observes_vectors = isinstance(space, spaces.Box) and not (policy.normalize_images and is_image_space(space))
    has_flat_features = is_standard(policy) and all(
        type(extractor) is FlattenExtractor for extractor in (policy.pi_features_extractor, policy.vf_features_extractor)
    )
    if not (observes_vectors and has_flat_features and type(policy.mlp_extractor) is MlpExtractor):
        return None
    output_net = getattr(policy, output_name)
    hidden_net = getattr(policy.mlp_extractor, latent_name)
    if type(output_net) is not nn.Linear or type(hidden_net) is not nn.Sequential:
        return None
    extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
    if has_hooks(policy, policy.mlp_extractor, *extractors, hidden_net, *hidden_net, output_net):
        return None
    network = MLP(*hidden_net, output_net)
    return network if network.is_plain else None
