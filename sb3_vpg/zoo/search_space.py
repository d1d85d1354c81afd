"""What Optuna draws for VPG."""

from collections.abc import Callable
from typing import Any

import optuna

from sb3_vpg.estimators import BASELINES, ESTIMATORS

# Formulations that Optuna chooses from; all go with partial_episodes=None and with normalize_advantage=False or True
FORMULATIONS: dict[str, tuple[str, str | None]] = {
    f"{estimator}-{baseline}" if baseline else estimator: (estimator, baseline)
    for estimator, spec in ESTIMATORS.items()
    for baseline in ((None,) if spec.uses_value_function else BASELINES)
}

#: Steps of a rollout that Optuna chooses from, all environments together
SMALLEST_BATCH, LARGEST_BATCH = 32, 16384
#: Updates that the budget of a trial is enough for, at least
UPDATES_OF_A_TRIAL = 8


def sample_vpg_params(trial: optuna.Trial, n_envs: int, n_timesteps: int | None = None) -> dict[str, Any]:
    """
    Draw hyperparameters of VPG. Estimator and baseline are drawn together, so that every draw is a valid combination.
    ``n_steps`` is drawn so that the batch in all, ``n_envs * n_steps``, is 32 to 16384 steps and less than an eighth of the
    budget; it is 1 where even that is more.

    :param trial: the trial to draw for
    :param n_envs: number of environments that the trial trains in
    :param n_timesteps: the budget of the trial, all environments together; None if it is not known
    :return: the drawn values under the names of Optuna's study, to be converted by :func:`convert_vpg_params`
    """
    largest_batch = LARGEST_BATCH
    if n_timesteps is not None:
        # Less than a whole part of the budget: where it ends, the last update is still to come
        largest_batch = min((n_timesteps - 1) // UPDATES_OF_A_TRIAL, LARGEST_BATCH)
    # Powers of two: the last that is not too large, the first that is not too small
    highest = max(largest_batch // n_envs, 1).bit_length() - 1
    lowest = min(((SMALLEST_BATCH - 1) // n_envs).bit_length(), highest)
    params: dict[str, Any] = {
        "formulation": trial.suggest_categorical("formulation", list(FORMULATIONS)),
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


def convert_vpg_params(
    sampled_params: dict[str, Any], convert_onpolicy_params: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """
    :param sampled_params: values as :func:`sample_vpg_params` draws them and Optuna stores them
    :param convert_onpolicy_params: the zoo's own converter for what VPG has in common with A2C and PPO
    :return: keyword arguments of VPG
    """
    params = sampled_params.copy()
    estimator, baseline = FORMULATIONS[params.pop("formulation")]
    # Also what the hyperparameter file may have set and the formulation may not go with
    whole = {"partial_episodes": None, "n_episodes": None}
    return {**convert_onpolicy_params(params), "estimator": estimator, "baseline": baseline, **whole}
