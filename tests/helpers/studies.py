"""A small study of formulations."""

from pathlib import Path

import yaml
from helpers.installed import CHECKOUT

LADDER = CHECKOUT / "hyperparams" / "ablation" / "ladder.yml"
SETTINGS = {
    "learning_rates": [0.001, 0.01],
    "common": {"policy": "MlpPolicy", "n_episodes": 1, "gamma": 0.9, "policy_kwargs": {"net_arch": [8]}},
    "environments": {
        "CartPole-v1": {"n_timesteps": 3000, "n_envs": 2, "reward_scale": 0.1, "score_range": [20, 500], "gae_lambda": 0.5}
    },
    "formulations": {
        "reward_to_go": {"estimator": "reward_to_go", "normalize_advantage": False},
        "gae": {"estimator": "gae"},
        "gae_8_steps": {"estimator": "gae", "n_episodes": None, "n_steps": 8},
    },
    "steps": [["reward_to_go", "gae"], ["gae", "gae_8_steps"]],
    "statistics": {"policy_of": "gae", "reference": "reward_to_go", "n_episodes": 8},
}


def written(settings: dict, folder: Path) -> Path:
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
