"""The one table of the algorithms that the RL Zoo gets from this package."""

from typing import NamedTuple


class Algorithm(NamedTuple):
    """
    One algorithm of the zoo. Whatever has to be imported is named as ``module:name``, so that reading the table costs nothing.

    :param key: What ``--algo`` is given; also the name of the hyperparameter file, ``hyperparams/<key>.yml``
    :param class_path: The algorithm, a subclass of SB3's ``BaseAlgorithm``
    :param sampler: Draws the hyperparameters of an Optuna trial:
        ``sampler(trial, n_actions, n_envs, additional_args) -> hyperparameters``
    :param converter: Turns the stored parameters of a trial into hyperparameters, for ``--trial-id``:
        ``converter(sampled_params) -> hyperparameters``
    :param pictures: Draws what the model card shows beside the video, if there is such a thing:
        ``pictures(model, vec_env, deterministic) -> {name: matplotlib figure}``
    """

    key: str
    class_path: str
    sampler: str
    converter: str
    pictures: str | None = None


ALGORITHMS = (
    Algorithm(
        "bcq",
        "sb3_ext.algos.bcq:BCQ",
        "sb3_ext.zoo.search_spaces:sample_bcq_params",
        "rl_zoo3.hyperparams_opt:convert_offpolicy_params",
    ),
    Algorithm(
        "vpg",
        "sb3_ext.algos.vpg:VPG",
        "sb3_ext.zoo.search_spaces:sample_vpg_params",
        "rl_zoo3.hyperparams_opt:convert_onpolicy_params",
    ),
    Algorithm(
        "reinforce",
        "sb3_ext.algos.reinforce:REINFORCE",
        "sb3_ext.zoo.search_spaces:sample_reinforce_params",
        "sb3_ext.zoo.search_spaces:convert_reinforce_params",
    ),
    # The search space of sb3-contrib's TRPO, whose constructor these have
    Algorithm(
        "npg",
        "sb3_ext.algos.npg:NPG",
        "rl_zoo3.hyperparams_opt:sample_trpo_params",
        "rl_zoo3.hyperparams_opt:convert_onpolicy_params",
    ),
    Algorithm(
        "trpo_fast",
        "sb3_ext.algos.trpo:TRPO",
        "rl_zoo3.hyperparams_opt:sample_trpo_params",
        "rl_zoo3.hyperparams_opt:convert_onpolicy_params",
    ),
    # The search space of SB3's DQN, whose constructor these have
    Algorithm(
        "ddqn",
        "sb3_ext.algos.ddqn:DDQN",
        "rl_zoo3.hyperparams_opt:sample_dqn_params",
        "rl_zoo3.hyperparams_opt:convert_offpolicy_params",
    ),
    Algorithm(
        "dueling_ddqn",
        "sb3_ext.algos.dueling_ddqn:DuelingDDQN",
        "rl_zoo3.hyperparams_opt:sample_dqn_params",
        "rl_zoo3.hyperparams_opt:convert_offpolicy_params",
    ),
    Algorithm(
        "option_critic",
        "sb3_ext.algos.option_critic:OptionCritic",
        "sb3_ext.zoo.search_spaces:sample_option_critic_params",
        "sb3_ext.zoo.search_spaces:convert_option_critic_params",
        "sb3_ext.algos.option_critic.plot:pictures",
    ),
    Algorithm(
        "sac_discrete",
        "sb3_ext.algos.sac_discrete:SACDiscrete",
        "sb3_ext.zoo.search_spaces:sample_sac_discrete_params",
        "rl_zoo3.hyperparams_opt:convert_offpolicy_params",
    ),
    Algorithm(
        "sac_ae",
        "sb3_ext.algos.sac_ae:SACAE",
        "sb3_ext.zoo.search_spaces:sample_sac_ae_params",
        "sb3_ext.zoo.search_spaces:convert_sac_ae_params",
        "sb3_ext.algos.sac_ae.reconstructions:pictures",
    ),
)
