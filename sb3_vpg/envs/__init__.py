"""
The environments of the package, registered with gymnasium when ``sb3_vpg`` is imported.
"""

import warnings

import gymnasium as gym

from sb3_vpg.envs.exploring_starts import ExploringStarts
from sb3_vpg.envs.native_vec_env import NativeVecEnv

__all__ = ["ENVIRONMENTS", "ExploringStarts", "NativeVecEnv", "register_environments"]

_MODULE = "sb3_vpg.envs.cartpole_swingup"

# Swings up and balances most of the time: see reward_threshold in gymnasium's EnvSpec
ENVIRONMENTS = {
    "CartPoleSwingUp-v0": {"kwargs": {"reward_in_unit_interval": False}, "reward_threshold": 300.0},
    "CartPoleSwingUp-v1": {"kwargs": {"reward_in_unit_interval": True}, "reward_threshold": 400.0},
}


def register_environments() -> None:
    """
    Register the environments. An id that another package has taken stays with that package: a warning says so, and the
    environment is registered as ``sb3_vpg/<id>`` instead.
    """
    for env_id, arguments in ENVIRONMENTS.items():
        taken_by = gym.registry[env_id].entry_point if env_id in gym.registry else None
        if taken_by is not None and not str(taken_by).startswith(_MODULE):
            warnings.warn(
                f"{env_id} is already registered with the entry point {taken_by} and stays so. It may be another task: "
                f"sb3_vpg's is registered as sb3_vpg/{env_id}.",
                stacklevel=2,
            )
            env_id = f"sb3_vpg/{env_id}"
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point=f"{_MODULE}:CartPoleSwingUpEnv",
                vector_entry_point=f"{_MODULE}:CartPoleSwingUpVectorEnv",
                max_episode_steps=500,
                **arguments,  # type: ignore[arg-type]
            )
