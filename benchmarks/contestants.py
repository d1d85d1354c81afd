"""Algorithms and environments that the benchmarks of speed and memory measure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import harness  # noqa: F401  one thread, before torch is imported
import numpy as np
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_vpg import VPG
from sb3_vpg.envs.native_vec_env import NativeVecEnv

CONTESTANTS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any]]] = {
    "A2C": (A2C, {}),
    "PPO": (PPO, {}),
    "VPG, gae": (VPG, {"n_critic_updates": 1}),
    "VPG, gae, default critic": (VPG, {}),
    "VPG, reward_to_go": (VPG, {"estimator": "reward_to_go", "partial_episodes": "truncate"}),
}


class Setting(NamedTuple):
    """Environments, rollout length (``n_steps``), and width of the two hidden layers of MlpPolicy."""

    n_envs: int
    #: NativeVecEnv, otherwise DummyVecEnv
    native: bool = False
    #: CnnPolicy on images, otherwise MlpPolicy on CartPole-v1
    images: bool = False
    n_steps: int = 32
    width: int = 64

    @property
    def n_frames(self) -> int:
        """Frames in a rollout."""
        return self.n_steps * self.n_envs

    @property
    def environments(self) -> str:
        return "NativeVecEnv" if self.native else "DummyVecEnv"


SCENARIOS: dict[str, list[Setting]] = {
    "a": [Setting(8)],
    "b": [Setting(256), Setting(256, native=True)],
    "c": [Setting(2048, native=True)],
    "d": [Setting(8, images=True)],
}


class Noise(gym.Env):
    """Images of noise, generated in advance, so that a step costs almost nothing. Episodes have about 100 steps."""

    observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = spaces.Discrete(4)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 84, 84), dtype=np.uint8)
    index = 0

    def _next_image(self) -> np.ndarray:
        self.index = (self.index + 1) % len(self.images)
        return self.images[self.index]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.index = int(self.np_random.integers(len(self.images)))
        return self._next_image(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._next_image(), 1.0, self.np_random.random() < 0.01, False, {}


def make_env(setting: Setting) -> VecEnv:
    vec_env_cls: Any = NativeVecEnv if setting.native else DummyVecEnv
    return make_vec_env(Noise if setting.images else "CartPole-v1", setting.n_envs, seed=0, vec_env_cls=vec_env_cls)


def make_model(setting: Setting, contestant: str, env: VecEnv | None = None, **kwargs: Any) -> OnPolicyAlgorithm:
    """
    :param setting: environments, rollout length and network
    :param contestant: one of ``CONTESTANTS``
    :param env: environments of the setting; None to create them
    :param kwargs: further keyword arguments of the algorithm
    """
    algorithm, own_kwargs = CONTESTANTS[contestant]
    kwargs = {"n_steps": setting.n_steps, "seed": 0, "device": "cpu", **own_kwargs, **kwargs}
    if algorithm is PPO:
        # PPO's default is 64, which would be very slow for large rollouts
        kwargs["batch_size"] = max(64, setting.n_frames // 4)
    if not setting.images:
        kwargs["policy_kwargs"] = {"net_arch": [setting.width, setting.width]}
    policy = "CnnPolicy" if setting.images else "MlpPolicy"
    return algorithm(policy, make_env(setting) if env is None else env, **kwargs)


def training(model: OnPolicyAlgorithm) -> Callable[[int], int]:
    """:return: a function that trains for at least the given number of frames, and returns the actual number"""

    def run(n_frames: int) -> int:
        before = model.num_timesteps
        model.learn(n_frames, reset_num_timesteps=False)
        return model.num_timesteps - before

    return run
