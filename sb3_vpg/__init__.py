"""Vanilla policy gradient for Stable-Baselines3, with switchable reward formulations."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sb3_vpg.envs import register_environments
from sb3_vpg.policies import CnnPolicy, LogisticPolicy, MlpPolicy, MultiInputPolicy, TanhMeanPolicy
from sb3_vpg.vpg import VPG

if TYPE_CHECKING:
    from sb3_vpg.maskable import MaskableVPG as MaskableVPG
    from sb3_vpg.recurrent import RecurrentVPG as RecurrentVPG

register_environments()

__version__ = version("sb3_vpg")

__all__ = ["VPG", "CnnPolicy", "LogisticPolicy", "MlpPolicy", "MultiInputPolicy", "TanhMeanPolicy"]

# Imported at the first use only, since they need sb3-contrib
_WITH_SB3_CONTRIB = {"MaskableVPG": "sb3_vpg.maskable", "RecurrentVPG": "sb3_vpg.recurrent"}


def __getattr__(name: str) -> Any:
    if name not in _WITH_SB3_CONTRIB:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_WITH_SB3_CONTRIB[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "sb3_contrib":
            raise
        raise ImportError(f"{name} needs sb3-contrib: pip install 'sb3_vpg[contrib]'") from error
