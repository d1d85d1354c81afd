"""Search spaces of VPG, MaskableVPG and RecurrentVPG for Optuna."""

from collections.abc import Callable
from typing import Any

import optuna

from sb3_vpg.estimators import BASELINES, ESTIMATORS

# Combinations of estimator and baseline. All are valid with partial_episodes=None and normalize_advantage=False or True
ESTIMATORS_WITH_BASELINES: dict[str, tuple[str, str | None]] = {
    f"{estimator}-{baseline}" if baseline else estimator: (estimator, baseline)
    for estimator, spec in ESTIMATORS.items()
    for baseline in ((None,) if spec.subtracts_value else BASELINES)
}

#: Bounds on the number of steps of a rollout, summed over all environments
SMALLEST_BATCH, LARGEST_BATCH = 32, 16384
#: Minimum number of updates within the budget of a trial
MIN_UPDATES_PER_TRIAL = 8


#: Arguments of recurrent policies that are sampled, and their values
LSTM_KWARGS: dict[str, list[int]] = {"enable_critic_lstm": [False, True], "lstm_hidden_size": [16, 32, 64, 128, 256, 512]}


def sample_vpg_params(trial: optuna.Trial, n_envs: int, n_timesteps: int | None = None) -> dict[str, Any]:
    """
    Sample hyperparameters of VPG and MaskableVPG. Estimator and baseline are sampled together, so that every sample is a valid
    combination. The batch size, ``n_envs * n_steps``, is 32 to 16384 steps and less than an eighth of the budget: if that is
    impossible, smaller than 32, or larger with ``n_steps=1``.

    :param trial: the trial
    :param n_envs: number of environments of the trial
    :param n_timesteps: budget of the trial, summed over all environments; None if unknown
    :return: the sampled values, under the names that Optuna stores; :func:`convert_vpg_params` converts them
    """
    largest_batch = LARGEST_BATCH
    if n_timesteps is not None:
        # "- 1", since the trial stops when the budget is used up, before the update that would follow
        largest_batch = min((n_timesteps - 1) // MIN_UPDATES_PER_TRIAL, LARGEST_BATCH)
    # Exponents of the largest power of two that is not too large, and of the smallest that is not too small
    highest = max(largest_batch // n_envs, 1).bit_length() - 1
    lowest = min(((SMALLEST_BATCH - 1) // n_envs).bit_length(), highest)
    params: dict[str, Any] = {
        "formulation": trial.suggest_categorical("formulation", list(ESTIMATORS_WITH_BASELINES)),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "n_steps_pow": trial.suggest_int("n_steps_pow", lowest, highest),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.1, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.2, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.03, log=True),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 0.03, log=True),
        "n_critic_updates": trial.suggest_categorical("n_critic_updates", [1, 2, 5, 10, 20]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
    # Display true values
    trial.set_user_attr("gamma", 1 - params["one_minus_gamma"])
    trial.set_user_attr("gae_lambda", 1 - params["one_minus_gae_lambda"])
    trial.set_user_attr("n_steps", 2 ** params["n_steps_pow"])
    trial.set_user_attr("batch_size", n_envs * 2 ** params["n_steps_pow"])
    return params


def sample_recurrent_vpg_params(trial: optuna.Trial, n_envs: int, n_timesteps: int | None = None) -> dict[str, Any]:
    """
    Sample hyperparameters of RecurrentVPG: those of VPG, the size of the LSTMs, and whether the critic has its own.

    :param trial: as for :func:`sample_vpg_params`
    :param n_envs: as for :func:`sample_vpg_params`
    :param n_timesteps: as for :func:`sample_vpg_params`
    :return: the sampled values
    """
    lstm = {name: trial.suggest_categorical(name, values) for name, values in LSTM_KWARGS.items()}
    return {**sample_vpg_params(trial, n_envs, n_timesteps), **lstm}


def convert_vpg_params(
    sampled_params: dict[str, Any], convert_onpolicy_params: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """
    Convert sampled values to keyword arguments.

    :param sampled_params: values as returned by the functions that sample, and stored by Optuna
    :param convert_onpolicy_params: the zoo's converter for the hyperparameters that VPG shares with A2C and PPO
    :return: keyword arguments of the algorithm
    """
    params = sampled_params.copy()
    lstm = {name: params.pop(name) for name in LSTM_KWARGS if name in params}
    estimator, baseline = ESTIMATORS_WITH_BASELINES[params.pop("formulation")]
    # Override values of the hyperparameter file that may be invalid with this formulation
    overrides = {"partial_episodes": None, "n_episodes": None}
    converted = convert_onpolicy_params(params)
    converted["policy_kwargs"].update(lstm)
    return {**converted, "estimator": estimator, "baseline": baseline, **overrides}
