"""Vanilla policy gradient for Stable-Baselines3, with switchable reward formulations."""

from importlib.metadata import version

from sb3_vpg.envs import register_environments
from sb3_vpg.policies import CnnPolicy, LogisticPolicy, MlpPolicy, MultiInputPolicy
from sb3_vpg.vpg import VPG

register_environments()

__version__ = version("sb3_vpg")

__all__ = ["VPG", "CnnPolicy", "LogisticPolicy", "MlpPolicy", "MultiInputPolicy"]
