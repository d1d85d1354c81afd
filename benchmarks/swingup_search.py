"""
Comparable search spaces for VPG, PPO and A2C on the swing-up. They change the search spaces of RL Baselines3 Zoo: rollouts
have 8 to 512 steps, minibatches 256 to 2048 steps (smaller minibatches of PPO would take hours), and the initial standard
deviation of the actions is added. The zoo imports this module:

    PYTHONPATH=benchmarks timeout 15m python -m rl_zoo3.train --gym-packages swingup_search --algo vpg \
        --env CartPoleSwingUp-v0 -optimize -n 1000000 --n-trials 1000 --n-evaluations 2 --n-eval-envs 20 --eval-episodes 20 \
        --sampler tpe --pruner median --study-name vpg --storage logs/swingup.log --num-threads 1 --device cpu
"""

from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER

BOUNDS = {"n_steps_pow": (3, 9), "batch_size_pow": (8, 11)}
CHOICES = {"n_steps": [8, 16, 32, 64, 128, 256, 512]}


class BoundedTrial:
    """A trial that samples some parameters from other ranges."""

    def __init__(self, trial: optuna.Trial):
        self.trial = trial

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.trial.suggest_int(name, *BOUNDS.get(name, (low, high)))

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.trial.suggest_categorical(name, CHOICES.get(name, choices))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)


def bounded(sample: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def sample_bounded(trial: optuna.Trial, *args: Any) -> dict[str, Any]:
        params = sample(BoundedTrial(trial), *args)
        params["policy_kwargs"]["log_std_init"] = trial.suggest_float("log_std_init", -2, 0.5)
        return params

    return sample_bounded


HYPERPARAMS_SAMPLER.update({algo: bounded(HYPERPARAMS_SAMPLER[algo]) for algo in ("vpg", "ppo", "a2c")})
