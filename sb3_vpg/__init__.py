"""Vanilla policy gradient for Stable-Baselines3, with switchable reward formulations."""

from importlib.metadata import version
from typing import Any

from sb3_vpg.envs import register_environments
from sb3_vpg.policies import CnnPolicy, LogisticPolicy, MlpPolicy, MultiInputPolicy
from sb3_vpg.vpg import VPG

register_environments()

__version__ = version("sb3_vpg")

__all__ = ["VPG", "CnnPolicy", "LogisticPolicy", "MaskableVPG", "MlpPolicy", "MultiInputPolicy", "RecurrentVPG"]


def __getattr__(name: str) -> Any:
    # At the first use only, since these need sb3-contrib
    if name == "MaskableVPG":
        from sb3_vpg.maskable import MaskableVPG

        return MaskableVPG
    if name == "RecurrentVPG":
        from sb3_vpg.recurrent import RecurrentVPG

        return RecurrentVPG
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
