"""The Optuna search spaces of this package's algorithms, in the form of ``rl_zoo3.hyperparams_opt``."""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_offpolicy_params, convert_onpolicy_params, sample_sac_params


def sample_bcq_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for BCQ hyperparams.

    :param trial: The trial to draw for
    :param n_actions: Number of action dimensions, 0 if actions are discrete
    :param n_envs: Number of parallel environments (unused: the data are fixed)
    :param additional_args: Unused
    :return: Keyword arguments of BCQ
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    # From 2**5=32 to 2**9=512
    batch_size_pow = trial.suggest_int("batch_size_pow", 5, 9)
    sampled_params = {
        "one_minus_gamma": one_minus_gamma,
        "batch_size_pow": batch_size_pow,
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.002, log=True),
        # Polyak coeff
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
    }
    # How far the policy may leave the data
    if n_actions == 0:
        sampled_params["action_threshold"] = trial.suggest_float("action_threshold", 0.0, 0.9)
    else:
        sampled_params["perturbation_scale"] = trial.suggest_float("perturbation_scale", 0.0, 0.2)

    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    return convert_offpolicy_params(sampled_params)


def sample_vpg_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for VPG hyperparams.

    :param trial: The trial to draw for
    :param n_actions: Unused
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Unused
    :return: Keyword arguments of VPG
    """
    one_minus_gae_lambda = trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    sampled_params = {
        **_sample_policy_gradient_params(trial),
        "one_minus_gae_lambda": one_minus_gae_lambda,
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 0.01, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 5, 80, log=True),
    }
    trial.set_user_attr("gae_lambda", 1 - one_minus_gae_lambda)
    return convert_onpolicy_params(sampled_params)


def sample_reinforce_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for REINFORCE hyperparams.

    :param trial: The trial to draw for
    :param n_actions: Unused
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Unused
    :return: Keyword arguments of REINFORCE
    """
    return convert_reinforce_params(_sample_policy_gradient_params(trial))


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Stored parameters of a trial of ``sample_reinforce_params``
    :return: Keyword arguments of REINFORCE
    """
    hyperparams = convert_onpolicy_params({**sampled_params, "one_minus_gae_lambda": 0.0})
    # Of those that all on-policy algorithms of the zoo have, the one that needs a critic
    del hyperparams["gae_lambda"]
    return hyperparams


def sample_option_critic_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for Option-Critic hyperparams.

    :param trial: The trial to draw for
    :param n_actions: Unused
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Unused
    :return: Keyword arguments of OptionCritic
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    # From 2**5=32 to 2**8=256
    batch_size_pow = trial.suggest_int("batch_size_pow", 5, 8)
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    return convert_option_critic_params(
        {
            "one_minus_gamma": one_minus_gamma,
            "batch_size_pow": batch_size_pow,
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 0.005, log=True),
            "train_freq": trial.suggest_int("train_freq", 1, 128, log=True),
            "subsample_steps": trial.suggest_int("subsample_steps", 1, 8),
            "target_update_interval": trial.suggest_int("target_update_interval", 100, 5000, log=True),
            "exploration_final_eps": trial.suggest_float("exploration_final_eps", 0.0, 0.2),
            "n_options": trial.suggest_int("n_options", 2, 8),
            "termination_regularization": trial.suggest_float("termination_regularization", 0.001, 1.0, log=True),
            "termination_learning_rate": trial.suggest_float("termination_learning_rate", 1e-5, 1e-3, log=True),
            "gae_lambda": trial.suggest_categorical("gae_lambda", [0.0, 0.8, 0.95]),
            "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
            "n_epochs": trial.suggest_categorical("n_epochs", [1, 5, 10]),
            "ent_coef": trial.suggest_float("ent_coef", 0.0001, 0.1, log=True),
            "net_arch": trial.suggest_categorical("net_arch", ["small", "medium"]),
            "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
            "shares_layers": trial.suggest_categorical("shares_layers", [False, True]),
        }
    )


def convert_option_critic_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: Stored parameters of a trial of ``sample_option_critic_params``
    :return: Keyword arguments of OptionCritic
    """
    hyperparams = convert_offpolicy_params(sampled_params)
    policy_kwargs = hyperparams["policy_kwargs"]
    if not hyperparams.pop("shares_layers"):
        policy_kwargs["net_arch"], policy_kwargs["head_arch"] = [], policy_kwargs["net_arch"]
    return hyperparams


def sample_sac_discrete_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for SAC-Discrete hyperparams: those of the zoo's SAC, and the target entropy.

    :param trial: The trial to draw for
    :param n_actions: Unused
    :param n_envs: Number of parallel environments
    :param additional_args: As of the zoo's sampler for SAC
    :return: Keyword arguments of SACDiscrete
    """
    return {
        **sample_sac_params(trial, n_actions, n_envs, additional_args),
        "target_entropy_ratio": trial.suggest_float("target_entropy_ratio", 0.02, 0.98),
    }


def sample_sac_ae_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for SAC-AE hyperparams. The networks stay as they are, because their size decides how long an update takes.

    :param trial: The trial to draw for
    :param n_actions: Unused
    :param n_envs: Number of parallel environments (unused)
    :param additional_args: Unused
    :return: Keyword arguments of SACAE
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.001, 0.05, log=True)
    # From 2**5=32 to 2**8=256
    batch_size_pow = trial.suggest_int("batch_size_pow", 5, 8)
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    rates = ("learning_rate", "encoder_learning_rate", "decoder_learning_rate")
    return convert_sac_ae_params(
        {
            "one_minus_gamma": one_minus_gamma,
            "batch_size_pow": batch_size_pow,
            **{rate: trial.suggest_float(rate, 1e-4, 5e-3, log=True) for rate in rates},
            "ent_coef_learning_rate": trial.suggest_float("ent_coef_learning_rate", 1e-5, 1e-2, log=True),
            "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
            "encoder_tau": trial.suggest_float("encoder_tau", 0.005, 0.2, log=True),
            "latent_coef": trial.suggest_float("latent_coef", 1e-8, 1e-3, log=True),
        }
    )


def convert_sac_ae_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: The stored parameters of a trial
    :return: Keyword arguments of SACAE
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    return hyperparams


def _sample_policy_gradient_params(trial: optuna.Trial) -> dict[str, Any]:
    """What the algorithms have in common that take one gradient step per rollout."""
    # From 2**8=256 to 2**12=4096
    n_steps_pow = trial.suggest_int("n_steps_pow", 8, 12)
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    # Display true values
    trial.set_user_attr("n_steps", 2**n_steps_pow)
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    return {
        "n_steps_pow": n_steps_pow,
        "one_minus_gamma": one_minus_gamma,
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.03, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
