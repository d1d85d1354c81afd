"""
Check VPG's keywords, alone and together, and resolve them into a :class:`Plan`.

This happens at construction and before each rollout, since callbacks may change keywords. Rollout and update read the plan and
compare no strings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import FloatSchedule

from sb3_vpg.buffers import VPGBufferMixin, VPGRolloutBuffer
from sb3_vpg.common.checks import check_choice, check_number
from sb3_vpg.estimators import BASELINES, Formulation


class PartialEpisodes(NamedTuple):
    """
    Treatment of episodes that are still running after ``n_steps`` steps.

    :param whole_episodes: continue them until they end
    :param bootstrap: cut them, and add the value of the last observation
    """

    whole_episodes: bool
    bootstrap: bool


PARTIAL_EPISODES: dict[str, PartialEpisodes] = {
    "bootstrap": PartialEpisodes(whole_episodes=False, bootstrap=True),
    "finish": PartialEpisodes(whole_episodes=True, bootstrap=False),
    "truncate": PartialEpisodes(whole_episodes=False, bootstrap=False),
}


def _number_of_steps(n_steps: int, n_segments: int) -> int:
    return n_steps


def _number_of_segments(n_steps: int, n_segments: int) -> int:
    return n_segments


#: Divisor of the sum over the batch, as a function of the number of steps and the number of segments
LOSS_REDUCTIONS: dict[str, Callable[[int, int], int]] = {"mean": _number_of_steps, "trajectory": _number_of_segments}

#: Ranges of keywords that are numbers, as arguments of :func:`check_number`
NUMBERS: dict[str, dict[str, Any]] = {
    "n_steps": {"low": 1, "integer": True},
    "gamma": {"low": 0, "high": 1},
    "gae_lambda": {"low": 0, "high": 1},
    "vf_coef": {"low": 0},
    "max_grad_norm": {"low": 0, "low_included": False, "infinite": True, "none": True},
    "n_episodes": {"low": 1, "integer": True, "none": True},
    "n_critic_updates": {"low": 1, "integer": True},
    "critic_batch_size": {"low": 1, "integer": True, "none": True},
}
#: Ranges of keywords that are numbers or schedules: functions of the remaining progress, from 1 to 0
SCHEDULES: dict[str, dict[str, Any]] = {
    "learning_rate": {"low": 0},
    "critic_learning_rate": {"low": 0, "none": True},
    "ent_coef": {},
}
#: Allowed values of further keywords. Those of the formulation are checked by :class:`Formulation`
CHOICES: dict[str, tuple[Any, ...]] = {
    "partial_episodes": (None, *PARTIAL_EPISODES),
    "loss_reduction": tuple(LOSS_REDUCTIONS),
    "discount_state_distribution": (False, True),
    "scale_value_targets": (False, True),
}
#: Allowed values with a rollout buffer that is not VPG's and computes its own advantages
ALLOWED_WITH_CUSTOM_BUFFER: dict[str, tuple[Any, ...]] = {
    "estimator": ("gae",),
    "normalize_advantage": (False, True, "batch"),
    "n_episodes": (None,),
    "partial_episodes": (None, "bootstrap"),
    "discount_state_distribution": (False,),
    "loss_reduction": ("mean",),
}


@dataclass(frozen=True)
class Plan:
    """
    The resolved keywords, as rollout and update use them.

    :param formulation: estimator, baseline and normalization
    :param partial_episodes: treatment of episodes that are still running after ``n_steps`` steps
    :param n_episodes: number of whole episodes of each environment in a rollout; None if ``n_steps`` is used
    :param batch_divisor: divisor of the sum of the policy loss over the batch, see :data:`LOSS_REDUCTIONS`
    """

    formulation: Formulation
    partial_episodes: PartialEpisodes
    n_episodes: int | None = None
    batch_divisor: Callable[[int, int], int] = LOSS_REDUCTIONS["mean"]

    @property
    def uses_value_function(self) -> bool:
        """Whether the formulation uses a value function."""
        return self.formulation.uses_value_function


def make_plan(model: Any) -> Plan:
    """
    Check the keywords of a model and resolve names and defaults.

    :param model: VPG, with its keywords as attributes
    :return: the plan
    :raises ValueError: if a keyword has an invalid value, alone or together with others; the message names the keyword, the
        value and what is allowed
    """
    for keyword, limits in NUMBERS.items():
        check_number(keyword, getattr(model, keyword), **limits)
    for keyword, limits in SCHEDULES.items():
        if not callable(getattr(model, keyword)):
            check_number(keyword, getattr(model, keyword), **limits)
    for keyword, choices in CHOICES.items():
        check_choice(keyword, getattr(model, keyword), choices)
    formulation = Formulation(
        model.estimator,
        model.baseline,
        model.normalize_advantage,
        model.discount_state_distribution,
        float(model.gamma),
        float(model.gae_lambda),
    )
    partial_episodes = _resolve_partial_episodes(model, formulation)
    _check_rollout_buffer_class(model)
    return Plan(formulation, partial_episodes, model.n_episodes, LOSS_REDUCTIONS[model.loss_reduction])


def as_schedule(value: Any) -> FloatSchedule:
    """
    :param value: a number, of any type, or a function of the remaining progress
    :return: SB3's form of it
    """
    return FloatSchedule(value if callable(value) else float(value))


def scheduled_values(model: Any, progress_remaining: float) -> dict[str, float]:
    """
    :param model: VPG, with its keywords and their schedules as attributes
    :param progress_remaining: remaining part of the training, from 1 to 0
    :return: values of the keywords in :data:`SCHEDULES`
    :raises ValueError: if a schedule returns a number that is not allowed
    """
    values = {"learning_rate": model.lr_schedule(progress_remaining)}
    if model.critic_learning_rate is not None:
        values["critic_learning_rate"] = model.critic_lr_schedule(progress_remaining)
    values["ent_coef"] = as_schedule(model.ent_coef)(progress_remaining)
    for keyword, value in values.items():
        check_number(f"{keyword}({progress_remaining:g})", value, **{**SCHEDULES[keyword], "none": False})
    return {"critic_learning_rate": values["learning_rate"], **values}


def _resolve_partial_episodes(model: Any, formulation: Formulation) -> PartialEpisodes:
    given = f"estimator={model.estimator!r} with baseline={model.baseline!r}"
    if model.n_episodes is not None:
        if model.partial_episodes is not None:
            raise ValueError(
                f"partial_episodes={model.partial_episodes!r} has no effect with n_episodes={model.n_episodes}, which "
                "collects no partial episodes; allowed: None"
            )
        return PARTIAL_EPISODES["finish"]
    if model.partial_episodes is None:
        by_default = formulation.uses_value_function and not formulation.needs_whole_episodes
        return PARTIAL_EPISODES["bootstrap" if by_default else "finish"]
    mode = PARTIAL_EPISODES[model.partial_episodes]
    if formulation.needs_whole_episodes and not mode.whole_episodes:
        raise ValueError(
            f"partial_episodes={model.partial_episodes!r} cuts episodes, but {given} is defined for whole episodes only; "
            "allowed: None, 'finish'"
        )
    if mode.bootstrap and not formulation.uses_value_function:
        raise ValueError(
            f"partial_episodes={model.partial_episodes!r} needs a value function, but {given} has none; "
            "allowed: None, 'finish', 'truncate'"
        )
    return mode


def check_batch(model: Any) -> None:
    """
    Check formulations with a single episode per update. Some need a second episode to compare with; others are zero at every
    step. A model may be loaded with fewer environments than it needs for training.

    :param model: VPG with its plan, environments and processes
    :raises ValueError: if the batch is too small
    """
    formulation, n_environments = model.plan.formulation, model.n_envs * model.processes.size
    if model.n_episodes is None or model.n_episodes * n_environments > 1:
        return
    one = "n_episodes=1 with one environment gives one episode per update"
    if BASELINES[model.baseline].compares_episodes:
        raise ValueError(
            f"baseline={model.baseline!r} compares episodes, but {one}; allowed: a larger n_episodes, more environments, "
            "or baseline=None, 'mean', 'value'"
        )
    centered = model.baseline is not None or bool(model.normalize_advantage)
    if formulation.constant_within_episode and centered:
        raise ValueError(
            f"estimator={model.estimator!r} with baseline={model.baseline!r} and "
            f"normalize_advantage={model.normalize_advantage!r} is zero at every step, since {one} and the advantage is one "
            "number per episode; allowed: a larger n_episodes, more environments, or baseline=None with "
            "normalize_advantage=False"
        )


def _check_rollout_buffer_class(model: Any) -> None:
    """Check the keywords with a buffer class that is not VPG's: it has a fixed length and computes its own advantages."""
    buffer_class = model.rollout_buffer_class
    if buffer_class is None:
        return
    if not (isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)):
        raise ValueError(f"rollout_buffer_class={buffer_class!r} is not allowed; it must be None or a RolloutBuffer class")
    if issubclass(buffer_class, VPGBufferMixin):
        return
    for keyword, allowed in ALLOWED_WITH_CUSTOM_BUFFER.items():
        if getattr(model, keyword) not in allowed:
            raise ValueError(
                f"{keyword}={getattr(model, keyword)!r} is not supported with rollout_buffer_class={buffer_class.__name__}, "
                f"which computes its own advantages; choose one of {', '.join(map(repr, allowed))}, or derive the class from "
                f"{VPGRolloutBuffer.__name__}"
            )
