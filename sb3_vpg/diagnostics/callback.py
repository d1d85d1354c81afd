"""Statistics of the policy gradient during training, from the rollouts that the update uses."""

from dataclasses import fields

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.common.checks import check_number
from sb3_vpg.common.policy_runner import make_policy_runner, temporary_distribution
from sb3_vpg.diagnostics.gradients import actor_parameters, weighted_score
from sb3_vpg.diagnostics.statistics import GradientStatistics, statistics_of
from sb3_vpg.estimators import Array, segment_index
from sb3_vpg.vpg import VPG

# The callback computes the gradients of so many parts of a rollout, at most
MAX_GROUPS = 32


class GradientStatisticsCallback(BaseCallback):
    """
    Logs statistics of VPG's policy gradient, for the formulation in training, under ``gradient/``: from the rollout that the
    update uses, without further steps in the environment. The independent estimates are those of the episodes of the rollout,
    or of the segments of episodes that lie in it, taken together where there are more than 32; ``gradient/noise_scale`` counts
    episodes or segments. A rollout with fewer than two of them logs nothing. Baselines and normalisation that look at other
    episodes of the batch make the estimates not quite independent; :func:`gradient_statistics` is exact there.

    It costs one more pass of the rollout through the policy, forward and back in up to 32 parts, every ``every_n_rollouts``
    rollouts.

    :param every_n_rollouts: how often, >= 1
    :raises ValueError: if that is another number, or the model is not a VPG with a buffer of its own
    """

    def __init__(self, every_n_rollouts: int = 10, verbose: int = 0):
        super().__init__(verbose)
        check_number("every_n_rollouts", every_n_rollouts, low=1, integer=True)
        self.every_n_rollouts = every_n_rollouts

    def _init_callback(self) -> None:
        if not isinstance(self.model, VPG) or not isinstance(self.model.rollout_buffer, VPGBufferMixin):
            raise ValueError("GradientStatisticsCallback is for VPG with one of its own rollout buffers")
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
    Statistics of the gradient of the rollout in the model's buffer, from the episodes (whole or in part) in it.

    :param model: VPG with a rollout, before its update
    :param n_bootstrap: resamples behind the intervals; 0 for no intervals
    :return: None if there are fewer than two episodes in the rollout
    """
    buffer = model.rollout_buffer
    if not isinstance(buffer, VPGBufferMixin) or buffer.n_segments < 2:
        return None
    model.policy.set_training_mode(False)
    groups = np.array_split(np.arange(buffer.n_segments), min(buffer.n_segments, MAX_GROUPS))
    # The mean over groups is then the gradient of the update
    scale = len(groups) / model.plan.batch_divisor(buffer.n_recorded, buffer.n_segments)
    weights = scale * buffer.normalized_advantages(model.processes).reshape(1, -1)
    runner, segments = make_policy_runner(model.policy), steps_of_segments(buffer)
    gradients = []
    with temporary_distribution(model.policy):
        parameters = actor_parameters(model.policy, buffer)
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
    """:return: the recorded steps of each segment, counted in order of time, then of environment"""
    recorded = np.flatnonzero(buffer.mask)
    segments = segment_index(buffer.rollout.last).ravel()[recorded]
    order = np.argsort(segments, kind="stable")
    return np.split(recorded[order], np.flatnonzero(np.diff(segments[order])) + 1)
