"""Gradient statistics during training, computed from the rollouts of the updates."""

from dataclasses import fields

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.common.checks import check_number
from sb3_vpg.common.policy_runner import gradients_in_evaluation_mode
from sb3_vpg.diagnostics.gradients import actor_parameters, weighted_score
from sb3_vpg.diagnostics.statistics import GradientStatistics, statistics_of
from sb3_vpg.estimators import Array, segment_index
from sb3_vpg.vpg import VPG

# Maximum number of parts of a rollout whose gradients the callback computes
MAX_GROUPS = 32


class GradientStatisticsCallback(BaseCallback):
    """
    Logs statistics of the policy gradient of VPG's formulation under ``gradient/``. They are computed from the rollout of the
    update, without further environment steps.

    The gradient of each segment (an episode, or its part in the rollout) is one estimate. With more than 32 segments,
    neighboring segments are combined into 32 estimates. ``gradient/noise_scale`` counts segments. A rollout with fewer than
    two segments is not logged.

    The estimates are not independent if the baseline or the normalization uses other episodes of the batch.
    :func:`gradient_statistics` is exact in this case.

    With several processes, each logs the statistics of its own part of the rollout, normalized over that part.

    The cost is one forward and backward pass of the rollout, in up to 32 parts.

    :param every_n_rollouts: Number of rollouts between two computations, >= 1. Typical: 1 to 100. Larger: less overhead.
    :param verbose: Not used
    :raises ValueError: if ``every_n_rollouts`` is not such a number, or the model is not VPG with one of VPG's buffers
    """

    def __init__(self, every_n_rollouts: int = 10, verbose: int = 0):
        super().__init__(verbose)
        check_number("every_n_rollouts", every_n_rollouts, low=1, integer=True)
        self.every_n_rollouts = every_n_rollouts

    def _init_callback(self) -> None:
        if not isinstance(self.model, VPG) or not isinstance(self.model.rollout_buffer, VPGBufferMixin):
            raise ValueError("GradientStatisticsCallback requires VPG with one of VPG's rollout buffers")
        self.n_rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.n_rollouts += 1
        if (self.n_rollouts - 1) % self.every_n_rollouts == 0:
            statistics = rollout_statistics(self.model)  # type: ignore[arg-type]
            if statistics is not None:
                for field in fields(statistics):
                    self.logger.record(f"gradient/{field.name}", getattr(statistics, field.name).value)


def rollout_statistics(model: VPG, n_bootstrap: int = 0) -> GradientStatistics | None:
    """
    Compute gradient statistics from the rollout in the model's buffer. Each segment (an episode, or its part in the rollout)
    gives one estimate.

    :param model: VPG with a rollout, before its update
    :param n_bootstrap: number of bootstrap resamples for the intervals; 0 for no intervals
    :return: the statistics; None without a rollout, if it has fewer than two segments, or if the actor is frozen
    """
    buffer = model.rollout_buffer
    if not isinstance(buffer, VPGBufferMixin) or not hasattr(buffer, "rollout") or buffer.n_segments < 2:
        return None
    groups = np.array_split(np.arange(buffer.n_segments), min(buffer.n_segments, MAX_GROUPS))
    # With this scale, the mean over groups is the gradient of the update
    scale = len(groups) / model.plan.batch_divisor(buffer.n_recorded, buffer.n_segments)
    # Not over all processes: those without the callback, or with fewer than two segments, do not get here
    weights = scale * buffer.normalized_advantages().reshape(1, -1)
    runner, segments = model._make_runner(), steps_of_segments(buffer)
    gradients = []
    with gradients_in_evaluation_mode(model.policy):
        parameters = actor_parameters(runner, buffer)
        if not parameters:
            return None
        for group in groups:
            indices = np.concatenate([segments[segment] for segment in group])
            gradients.append(weighted_score(runner, parameters, buffer, indices, weights[:, indices])[0])
    return statistics_of(
        th.stack(gradients),
        n_per_update=len(groups),
        n_episodes=buffer.n_segments / len(groups),
        n_bootstrap=n_bootstrap,
    )


def steps_of_segments(buffer: VPGBufferMixin) -> list[Array]:
    """:return: for each segment, the indices of its recorded steps, see :meth:`VPGBufferMixin.batch_indices`"""
    recorded = np.flatnonzero(buffer.mask)
    segments = segment_index(buffer.rollout.last).ravel()[recorded]
    order = np.argsort(segments, kind="stable")
    return np.split(recorded[order], np.flatnonzero(np.diff(segments[order])) + 1)
