"""Measuring policy gradients: how noisy they are, by formulation."""

from sb3_vpg.diagnostics.gradient_statistics import (
    Episodes,
    Estimate,
    GradientStatistics,
    GradientStatisticsCallback,
    UpdateSpec,
    batch_gradients,
    collect_episodes,
    gradient_statistics,
    rollout_statistics,
    statistics_of,
)

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
