"""Studies that run in seconds, and results that can be checked by hand."""

from pathlib import Path
from typing import Any

import yaml
from helpers.installed import CHECKOUT

from sb3_vpg.study.results import Measures, Point, Results
from sb3_vpg.study.study import Run

STUDIES = CHECKOUT / "hyperparams" / "studies"
ABLATION = STUDIES / "ablation.yml"
#: Two environments, a search, gradient statistics, and a setting whose runs fail
SETTINGS: dict[str, Any] = {
    "algorithms": ["vpg", "a2c"],
    "environments": {
        "CartPole-v1": {"n_timesteps": 600, "score_range": [0, 500], "gae_lambda": 0.5},
        "Acrobot-v1": {"n_timesteps": 600, "vec_env_wrapper": [{"sb3_vpg.envs.ScaledRewards": {"factor": 0.1}}]},
    },
    "entries": False,
    "seeds": 2,
    "evaluation_episodes": 2,
    "search": {"learning_rates": [0.001, 0.01], "seeds": 1},
    "common": {"n_episodes": 1, "n_envs": 2, "gamma": 0.9, "policy_kwargs": {"net_arch": [8]}},
    "settings": {
        "reward_to_go": {"estimator": "reward_to_go", "normalize_advantage": False},
        "gae": {"estimator": "gae"},
        "diverges": {"estimator": "gae", "critic_learning_rate": 1e30},
    },
    "pairs": [["reward_to_go", "gae", "Does the critic help?"], ["gae", "a2c"]],
    "statistics": {"policies": ["gae"], "reference": "reward_to_go", "n_episodes": 8, "seeds": 1},
}


def written(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def add_final_runs(results: Results, environment: str, contestant: tuple[str, str], scores: list[float], **run: Any) -> None:
    """One run of 1000 steps and 10 seconds for each score, whose learning curve rises to it in two steps."""
    for seed, score in enumerate(scores):
        measures = Measures(1000, 10.0, 9.0, score, score - 1, score - 2, 50.0)
        points = [Point(500, 4.0, "return", "", score / 2), Point(1000, 10.0, "return", "", score)]
        results.add(Run("final", environment, *contestant, seed, **run), measures, points)


def add_search(results: Results, environment: str, setting: str, scores: dict[float, list[float]]) -> None:
    for rate, of_rate in scores.items():
        for seed, score in enumerate(of_rate):
            measures = Measures(1000, 10.0, 9.0, score, score, score, 50.0)
            results.add(Run("search", environment, "vpg", setting, 1000 + seed, rate), measures, [])


def add_statistics(
    results: Results, environment: str, policy: str, metrics: dict[str, dict[str, list[list[float]]]], **run: Any
) -> None:
    """
    :param metrics: for each metric and measured setting the numbers of each seed at the start, in the middle and at the end
    """
    n_seeds = max(len(seeds) for of_metric in metrics.values() for seeds in of_metric.values())
    for seed in range(n_seeds):
        points = [
            # Moments as they come out with whole episodes
            Point(timesteps, timesteps / 100, metric + end, setting, value + shift)
            for metric, of_metric in metrics.items()
            for setting, seeds in of_metric.items()
            for timesteps, value in zip((0, 520, 1010), seeds[seed] if seed < len(seeds) else ())
            for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
        ]
        results.add(Run("statistics", environment, "vpg", policy, seed, **run), Measures(1010, 10.0, 9.0), points)
