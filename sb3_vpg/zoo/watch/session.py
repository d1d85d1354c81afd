"""Step an agent in its environment, and keep the numbers that the panels show."""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from tqdm import tqdm

from sb3_vpg.zoo.watch.agents import ActorCriticAgent, Agent, ContinuousChoice, DiscreteChoice

#: Number of steps in the curves
N_STEPS_SHOWN = 200


class Step(NamedTuple):
    """
    The numbers of one step.

    :param t: index of the step in its episode, from 0
    :param reward: reward of the environment
    :param episode_return: sum of the rewards of the episode, with this one
    :param value: V(s) or Q(s, a); None if the model has neither
    :param advantage: one-step TD residual r + gamma V(s') - V(s); None without V
    """

    t: int
    reward: float
    episode_return: float
    value: float | None
    advantage: float | None


class Frame(NamedTuple):
    """
    What is shown of one step.

    :param image: picture of the state in which the agent acts, shape (height, width, 3)
    :param choice: what the action was chosen by
    :param episode: number of the episode, from 1
    :param previous_episode: how the previous episode ended; empty in the first
    :param steps: this step and those before it, at most :data:`N_STEPS_SHOWN`
    """

    image: npt.NDArray[np.uint8]
    choice: DiscreteChoice | ContinuousChoice
    episode: int
    previous_episode: str
    steps: list[Step]


class Session:
    """
    An agent in its environment.

    With ``VecNormalize``, values and advantages are in units of the rewards that the model was trained with.

    :param agent: the agent
    :param env: one environment, with the render mode "rgb_array"
    :param gamma: discount factor
    :param seed: seed of environment and actions
    """

    def __init__(self, agent: Agent, env: VecEnv, gamma: float, seed: int):
        self.agent, self.env, self.gamma, self.seed = agent, env, gamma, seed
        self._normalize = unwrap_vec_normalize(env)
        self.start_over()

    def start_over(self) -> None:
        """Start with the first episode again."""
        set_random_seed(self.seed)
        self.env.seed(self.seed)
        self.episode = 0
        self.previous_episode = ""
        self.steps: deque[Step] = deque(maxlen=N_STEPS_SHOWN)
        self.next_episode()

    def next_episode(self) -> None:
        """Leave the current episode and start the next one."""
        self.observation: Any = self.env.reset()
        self._begin_episode()

    def _begin_episode(self) -> None:
        self.agent.begin_episode()
        self.episode += 1
        self.t, self.episode_return = 0, 0.0

    def advance(self, n_steps: int = 1) -> Frame:
        """
        :param n_steps: number of steps, >= 1
        :return: what is shown of the last one
        :raises ValueError: if the environment gives no picture
        """
        for _ in range(n_steps - 1):
            self._step()
        try:
            (image,) = self.env.get_images()
        except (AssertionError, NotImplementedError):
            # gymnasium's checks, and its method where there is no other
            image = None
        if image is None:
            raise ValueError("The environment has no picture: it does not support render_mode='rgb_array'")
        # The step may end the episode
        episode, previous_episode = self.episode, self.previous_episode
        choice = self._step()
        return Frame(image, choice, episode, previous_episode, list(self.steps))

    def _step(self) -> DiscreteChoice | ContinuousChoice:
        """Take one step. A new episode begins if the episode ends."""
        reading = self.agent.act(self.observation)
        self.observation, rewards, dones, infos = self.env.step(reading.action)
        # What the critic predicts is the sum of these rewards, and what a user knows are the environment's
        trained_reward = float(rewards[0])
        reward = trained_reward if self._normalize is None else float(self._normalize.get_original_reward()[0])
        done, time_limit = bool(dones[0]), bool(infos[0].get("TimeLimit.truncated", False))
        advantage = None
        if isinstance(self.agent, ActorCriticAgent) and reading.value is not None:
            # At a time limit, the environment has been reset already. The last state of the episode is in the infos
            successor = infos[0]["terminal_observation"] if done else self.observation
            successor_value = 0.0 if done and not time_limit else self.agent.state_value(successor)
            advantage = trained_reward + self.gamma * successor_value - reading.value
        self.episode_return += reward
        self.steps.append(Step(self.t, reward, self.episode_return, reading.value, advantage))
        self.t += 1
        if done:
            end = "time limit" if time_limit else "terminated"
            self.previous_episode = f"return {self.episode_return:.1f}, {self.t} steps, {end}"
            tqdm.write(f"Episode {self.episode}: {self.previous_episode}")
            self._begin_episode()
        return reading.choice
