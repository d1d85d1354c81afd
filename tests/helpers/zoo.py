"""Commands of the zoo, and what they leave behind."""

from typing import Any

import yaml
from helpers.installed import CHECKOUT, Environment

CARTPOLE_ENTRY = yaml.safe_load((CHECKOUT / "hyperparams" / "vpg.yml").read_text())["CartPole-v1"]
TRAIN_CARTPOLE = ("train", "--algo", "vpg", "--env", "CartPole-v1", "--seed", "1")


def zoo_command(command: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"rl_zoo3.{command}", *arguments)


def saved_config(installed: Environment, logs: str) -> dict[str, Any]:
    """What the zoo says it trained with, as it reads it itself, in the first run under the log folder."""
    file = installed.cwd / logs / "vpg" / "CartPole-v1_1" / "CartPole-v1" / "config.yml"
    return dict(yaml.load(file.read_text(), Loader=yaml.UnsafeLoader))
