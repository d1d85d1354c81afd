"""Environments and environment wrappers. Importing ``sb3_vpg`` registers the environments with gymnasium."""

import warnings

import gymnasium as gym

from sb3_vpg.envs.envpool_vec_env import EnvPoolVecEnv
from sb3_vpg.envs.exploring_starts import ExploringStarts
from sb3_vpg.envs.native_vec_env import NativeVecEnv
from sb3_vpg.envs.scaled_rewards import ScaledRewards

__all__ = ["ENVIRONMENTS", "EnvPoolVecEnv", "ExploringStarts", "NativeVecEnv", "ScaledRewards", "register_environments"]

_MODULE = "sb3_vpg.envs.cartpole_swingup"

# A policy that reaches the reward threshold swings the pole up and balances it for most of the episode
ENVIRONMENTS = {
    "CartPoleSwingUp-v0": {"kwargs": {"reward_in_unit_interval": False}, "reward_threshold": 300.0},
    "CartPoleSwingUp-v1": {"kwargs": {"reward_in_unit_interval": True}, "reward_threshold": 400.0},
}

#: Values of ``--vec-env``, in addition to those of the zoo, and the classes
VEC_ENVS = {"envpool": "sb3_vpg.envs.EnvPoolVecEnv", "native": "sb3_vpg.envs.NativeVecEnv"}


def register_environments() -> None:
    """
    Register the environments with gymnasium. If another package has registered the same id, a warning is issued and the
    environment is registered as ``sb3_vpg/<id>`` instead.
    """
    for env_id, arguments in ENVIRONMENTS.items():
        taken_by = gym.registry[env_id].entry_point if env_id in gym.registry else None
        if taken_by is not None and not str(taken_by).startswith(_MODULE):
            warnings.warn(
                f"{env_id} is already registered with the entry point {taken_by}, which may be a different task. "
                f"The environment of sb3_vpg is registered as sb3_vpg/{env_id}.",
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
            # gymnasium warns that v0 is out of date if its registry has a higher version of the same name. But v1 is another
            # task, no successor: each id is registered as a name of its own, without a version
            spec = gym.registry[env_id]
            spec.name, spec.version = env_id.rpartition("/")[2], None
