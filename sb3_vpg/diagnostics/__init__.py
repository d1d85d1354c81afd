"""Statistics of policy gradients: signal, noise and direction, for each reward formulation."""

from sb3_vpg.diagnostics.callback import GradientStatisticsCallback, rollout_statistics
from sb3_vpg.diagnostics.gradients import Episodes, UpdateSpec, batch_gradients, collect_episodes, gradient_statistics
from sb3_vpg.diagnostics.statistics import Estimate, GradientStatistics, statistics_of

__all__ = [
    "Episodes",
    "Estimate",
    "GradientStatistics",
    "GradientStatisticsCallback",
    "UpdateSpec",
    "batch_gradients",
    "collect_episodes",
    "gradient_statistics",
    "rollout_statistics",
    "statistics_of",
]
