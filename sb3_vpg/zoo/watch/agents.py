"""What a model computes at each step: the distribution of the action or its Q-values, and the value of the state."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.crossq.policies import CrossQPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from sb3_contrib.tqc.policies import TQCPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_vpg.common.policy_inputs import METHOD, action_masks_of, mask_sizes
from sb3_vpg.common.recurrent_runner import States, zero_states
from sb3_vpg.vpg import VPG

Array = npt.NDArray[Any]


class DiscreteChoice(NamedTuple):
    """
    What a discrete action was chosen by. Each dimension of the action has an entry in each list.

    :param probabilities: whether the numbers are probabilities; if not, they are Q-values
    :param numbers: one number for each value of the dimension
    :param taken: index of the value that was taken
    :param allowed: whether the mask allows each value
    """

    probabilities: bool
    numbers: list[Array]
    taken: list[int]
    allowed: list[Array]


class ContinuousChoice(NamedTuple):
    """
    A continuous action, and the Gaussian that it was chosen by. Arrays have the shape (dimensions,).

    :param action: the action, clipped to the action space
    :param low: lower bounds of the action space
    :param high: upper bounds of the action space
    :param mean: mean of the Gaussian; None if the policy has none in the space of the actions
    :param std: standard deviation of the Gaussian
    """

    action: Array
    low: Array
    high: Array
    mean: Array | None = None
    std: Array | None = None


class Reading(NamedTuple):
    """
    What a model computes for one observation.

    :param action: the action for the environments, shape (1, ...)
    :param choice: what it was chosen by
    :param value: V(s) or Q(s, a); None if the model has neither
    """

    action: Array
    choice: DiscreteChoice | ContinuousChoice
    value: float | None = None


class Agent:
    """
    A model that acts in one environment. This class is for models of which only the action is known.

    :param model: the model
    :param env: the environment
    :param deterministic: whether to use deterministic actions
    """

    #: What :attr:`Reading.value` is; empty if there is no value
    value_label = ""

    def __init__(self, model: BaseAlgorithm, env: VecEnv, deterministic: bool):
        self.model = model
        self.policy: Any = model.policy
        self.env = env
        self.deterministic = deterministic
        self.policy.set_training_mode(False)

    def begin_episode(self) -> None:
        """Forget the previous episode."""

    @th.no_grad()
    def act(self, observation: VecEnvObs) -> Reading:
        """
        :param observation: observation of the environment, batch of one
        :return: the action and what belongs to it
        """
        action, _ = self.model.predict(observation, deterministic=self.deterministic)  # type: ignore[arg-type]
        return self._read(self._tensor(observation), action)

    def _read(self, obs: Any, action: Array) -> Reading:
        return Reading(action, self._action_alone(action))

    def _tensor(self, observation: Any) -> Any:
        return self.policy.obs_to_tensor(observation)[0]

    def _action_alone(self, action: Array) -> DiscreteChoice | ContinuousChoice:
        if isinstance(self.model.action_space, spaces.Box):
            return self._continuous_choice(action)
        sizes = mask_sizes(self.model.action_space)
        taken = action.flatten().tolist()
        return _discrete_choice(True, [np.eye(n)[i] for n, i in zip(sizes, taken)], taken)

    def _continuous_choice(self, action: Array, mean: Array | None = None, std: Array | None = None) -> ContinuousChoice:
        space: Any = self.model.action_space
        return ContinuousChoice(action.flatten(), space.low.flatten(), space.high.flatten(), mean, std)


class ActorCriticAgent(Agent):
    """A model with a distribution of actions and a value function."""

    def __init__(self, model: BaseAlgorithm, env: VecEnv, deterministic: bool):
        super().__init__(model, env, deterministic)
        # VPG does not train the value function of the policy if the formulation does not use it
        self.value_label = "" if isinstance(model, VPG) and not model.plan.uses_value_function else "V(s)"

    def _read(self, obs: Any, action: Array) -> Reading:
        return self._reading(obs, action, self.policy.get_distribution(obs))

    def _reading(self, obs: Any, action: Array, distribution: Any, mask: Array | None = None) -> Reading:
        value = self._value(obs) if self.value_label else None
        return Reading(action, self._choice(distribution, action, mask), value)

    @th.no_grad()
    def state_value(self, observation: Any) -> float:
        """:return: V of the state that follows the last action"""
        return self._value(self._tensor(observation))

    def _value(self, obs: Any) -> float:
        return self.policy.predict_values(obs).item()

    def _choice(self, distribution: Any, action: Array, mask: Array | None) -> DiscreteChoice | ContinuousChoice:
        # SB3's distributions have one of PyTorch's or a list of them; the list of sb3-contrib has another name
        parts = getattr(distribution, "distributions", None) or getattr(distribution, "distribution", None)
        if isinstance(parts, Normal) and not self.policy.squash_output:
            mean, std = (array.cpu().numpy().flatten() for array in (parts.mean, parts.stddev))
            return self._continuous_choice(action, mean, std)
        if isinstance(parts, Bernoulli):
            probabilities = [np.array([1 - p, p]) for p in parts.probs.flatten().tolist()]
        elif isinstance(parts, Categorical | list):
            categoricals = parts if isinstance(parts, list) else [parts]
            probabilities = [categorical.probs.flatten().cpu().numpy() for categorical in categoricals]
        else:
            return self._action_alone(action)
        return _discrete_choice(True, probabilities, action.flatten().tolist(), mask)


class MaskableAgent(ActorCriticAgent):
    """An actor-critic model with action masks, if the environment gives them and the model was trained with them."""

    @th.no_grad()
    def act(self, observation: VecEnvObs) -> Reading:
        use_masks = getattr(self.model, "use_masking", True) and self.env.has_attr(METHOD)
        masks = action_masks_of(self.env, self.model.action_space) if use_masks else {}
        action, _ = self.model.predict(observation, deterministic=self.deterministic, **masks)  # type: ignore[arg-type]
        obs = self._tensor(observation)
        return self._reading(obs, action, self.policy.get_distribution(obs, **masks), masks.get(METHOD))


class RecurrentAgent(ActorCriticAgent):
    """An actor-critic model with LSTMs."""

    def begin_episode(self) -> None:
        self.states = zero_states(self.policy, 1)
        self.no_start = th.zeros(1, device=self.policy.device)

    @th.no_grad()
    def act(self, observation: VecEnvObs) -> Reading:
        state = tuple(part.cpu().numpy() for part in self.states.pi)
        action, _ = self.model.predict(observation, state, deterministic=self.deterministic)  # type: ignore[arg-type]
        obs = self._tensor(observation)
        distribution, _ = self.policy.get_distribution(obs, self.states.pi, self.no_start)
        reading = self._reading(obs, action, distribution)
        # Deterministic, so that no random number is drawn
        self.states = States(*self.policy(obs, self.states, self.no_start, deterministic=True)[-1])
        return reading

    def _value(self, obs: Any) -> float:
        return self.policy.predict_values(obs, self.states.vf, self.no_start).item()


class DQNAgent(Agent):
    """A model with one Q-value for each action."""

    value_label = "Q(s, a)"

    def _read(self, obs: Any, action: Array) -> Reading:
        q_values = self._q_values(obs).cpu().numpy().flatten()
        taken = int(action.item())
        return Reading(action, _discrete_choice(False, [q_values], [taken]), float(q_values[taken]))

    def _q_values(self, obs: Any) -> th.Tensor:
        return self.policy.q_net(obs)


class QRDQNAgent(DQNAgent):
    """A model with quantiles of the return for each action: its Q-values are their means."""

    def _q_values(self, obs: Any) -> th.Tensor:
        return self.policy.quantile_net(obs).mean(dim=1)


class ContinuousQAgent(Agent):
    """A model with a deterministic or squashed actor and critics of its action: the lowest Q-value counts."""

    value_label = "Q(s, a)"

    def _read(self, obs: Any, action: Array) -> Reading:
        scaled = th.as_tensor(self.policy.scale_action(action), dtype=th.float32, device=self.policy.device)
        return Reading(action, self._action_alone(action), self._q_value(self.policy.critic(obs, scaled)))

    def _q_value(self, critics: Any) -> float:
        return min(q_value.item() for q_value in critics)


class TQCAgent(ContinuousQAgent):
    """A model whose critics have quantiles of the return: its Q-value is their mean."""

    def _q_value(self, critics: Any) -> float:
        return critics.mean().item()


#: The first row whose policy classes fit is used
AGENTS: tuple[tuple[tuple[type, ...], type[Agent]], ...] = (
    ((MaskableActorCriticPolicy,), MaskableAgent),
    ((RecurrentActorCriticPolicy,), RecurrentAgent),
    ((ActorCriticPolicy,), ActorCriticAgent),
    ((DQNPolicy,), DQNAgent),
    ((QRDQNPolicy,), QRDQNAgent),
    ((SACPolicy, TD3Policy, CrossQPolicy), ContinuousQAgent),
    ((TQCPolicy,), TQCAgent),
)


def make_agent(model: BaseAlgorithm, env: VecEnv, deterministic: bool) -> Agent:
    """
    :param model: a model of Stable-Baselines3 or sb3-contrib
    :param env: one environment
    :param deterministic: whether to use deterministic actions
    :return: the agent, which reads what the model has
    """
    agent_class = next((cls for policies, cls in AGENTS if isinstance(model.policy, policies)), Agent)
    return agent_class(model, env, deterministic)


def _discrete_choice(probabilities: bool, numbers: list[Array], taken: list[int], mask: Array | None = None) -> DiscreteChoice:
    sizes = [len(part) for part in numbers]
    allowed = np.ones(sum(sizes), dtype=bool) if mask is None else mask.flatten()
    return DiscreteChoice(probabilities, numbers, [int(i) for i in taken], np.split(allowed, np.cumsum(sizes)[:-1]))
