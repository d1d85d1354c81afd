"""Small environments whose every number is known."""

import copy
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv


class CountingEnv(gym.Env):
    """
    Step t of episode k shows (k, t) and gives the reward t + 1; every second episode is a success, beginning with the first.
    The lengths of the episodes are given, and cycled through.

    :param lengths: lengths of the episodes
    :param time_limit: whether episodes end by a time limit (truncation) rather than by termination
    :param action_space: two discrete actions by default
    """

    def __init__(self, lengths: Sequence[float] = (3,), time_limit: bool = False, action_space: spaces.Space | None = None):
        self.observation_space = spaces.Box(0.0, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.lengths, self.time_limit = lengths, time_limit
        self.episode = -1
        self.actions = []

    def observation(self):
        return np.array([self.episode, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.t += 1
        done = self.t >= self.lengths[self.episode % len(self.lengths)]
        info = {"is_success": self.episode % 2 == 0}
        return self.observation(), float(self.t), done and not self.time_limit, done and self.time_limit, info


class SpacesEnv(gym.Env):
    """
    Random observations of any space, rewards that depend on the action, episodes of ``length`` steps that end by
    termination and by a time limit in turn.
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 5):
        # A space has a random state: no two environments share one
        self.observation_space, self.action_space = copy.deepcopy(observation_space), copy.deepcopy(action_space)
        self.length = length
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.episode += 1
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        done, time_limit = self.t == self.length, self.episode % 2 == 0
        reward = float(np.sum(action)) + self.np_random.normal()
        return self.observation_space.sample(), reward, done and not time_limit, done and time_limit, {}


class FaultyEnv(CountingEnv):
    """
    A :class:`CountingEnv` that goes wrong once.

    :param quantity: "reward", or "observation"
    :param episode: episode in which that happens, from 0
    :param t: step of that episode at which the reward or observation is given; 0 is the reset
    :param value: what is given instead
    """

    def __init__(self, quantity: str, episode: int, t: int, value: float = np.nan, **kwargs):
        super().__init__(**kwargs)
        self.quantity, self.fault, self.value = quantity, (episode, t), value

    def observation(self):
        observation = super().observation()
        if self.quantity == "observation" and (self.episode, self.t) == self.fault:
            observation[1] = self.value
        return observation

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.quantity == "reward" and (self.episode, self.t) == self.fault:
            reward = self.value
        return observation, reward, *rest


class NextStepVectorEnv(VectorEnv):
    """
    Spends a step on the reset of an environment whose episode has ended. Only all environments can be reset together.

    :param env_fns: functions that return the environments
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env_fns):
        self.many = SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.num_envs = self.many.num_envs
        self.single_observation_space, self.observation_space = self.many.single_observation_space, self.many.observation_space
        self.single_action_space, self.action_space = self.many.single_action_space, self.many.action_space

    def reset(self, *, seed=None, options=None):
        assert not options, "all environments are reset together"
        return self.many.reset(seed=seed)

    def step(self, actions):
        return self.many.step(actions)


BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)

ACTION_SPACES = {
    "Box": spaces.Box(-2.0, 1.0, (2,), np.float32),
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
}
OBSERVATION_SPACES = {
    "Box": BOX,
    "Box2D": spaces.Box(-1.0, 1.0, (2, 3), np.float64),
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(4),
    "image": IMAGE,
    "Dict": spaces.Dict({"vector": BOX, "image": IMAGE, "index": spaces.Discrete(3)}),
}


def policy_for(observation_space: spaces.Space) -> str:
    """Name of SB3's policy for the space."""
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(observation_space.shape) == 3 else "MlpPolicy"
