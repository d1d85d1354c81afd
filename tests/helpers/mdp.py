"""A small MDP whose every trajectory can be enumerated, and the gradient that VPG computes from a batch of them."""

import itertools
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG
from sb3_vpg.common.policy_runner import make_policy_runner

GAMMA = 0.7
N_STATES, N_ACTIONS, HORIZON = 5, 2, 3
REWARDS = np.array([[1.0, -2], [3, 0], [-1, 2], [0, 4], [5, -3]])
# State 0 leads to 1 or 2, these to 3 or 4, and 3 and 4 to the end
UP = np.array([[0.3, 0.8], [0.6, 0.1], [0.5, 0.9]])


class Trajectory(NamedTuple):
    states: tuple[int, ...]
    actions: tuple[int, ...]
    env_probability: float

    @property
    def rewards(self):
        return REWARDS[list(self.states), list(self.actions)]


def successors(state, action, p_end):
    """(next state or None, probability) of each outcome; p_end is the chance to end early, before the third step."""
    if state >= 3:
        return [(None, 1.0)]
    low, up = (1, 2) if state == 0 else (3, 4)
    p = UP[state, action]
    outcomes = [(low, (1 - p) * (1 - p_end)), (up, p * (1 - p_end))]
    return outcomes + ([(None, p_end)] if p_end else [])


def trajectories(p_end, horizon=HORIZON):
    """All trajectories from state 0, cut after ``horizon`` steps."""
    found = []

    def go_on(states, actions, probability):
        for action in range(N_ACTIONS):
            taken = (*actions, action)
            outcomes = successors(states[-1], action, p_end)
            if len(taken) == horizon:
                outcomes = [(None, 1.0)]
            for next_state, p in outcomes:
                if next_state is None:
                    found.append(Trajectory(states, taken, probability * p))
                else:
                    go_on((*states, next_state), taken, probability * p)

    go_on((0,), (), 1.0)
    return found


class MDPEnv(gym.Env):
    """The MDP as an environment, with chance ``p_end`` to end early."""

    observation_space = spaces.Discrete(N_STATES)
    action_space = spaces.Discrete(N_ACTIONS)

    def __init__(self, p_end=0.0):
        self.p_end = p_end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action):
        reward = REWARDS[self.state, action]
        states, probabilities = zip(*successors(self.state, action, self.p_end))
        next_state = states[self.np_random.choice(len(states), p=probabilities)]
        self.state = 0 if next_state is None else next_state
        return self.state, reward, next_state is None, False, {}


def make_model(n_envs, p_end=0.0, **kwargs):
    env = DummyVecEnv([lambda: MDPEnv(p_end)] * n_envs)
    kwargs = {"normalize_advantage": False, "loss_reduction": "trajectory", "vf_coef": 0.0, **kwargs}
    model = VPG("MlpPolicy", env, gamma=GAMMA, policy_kwargs={"net_arch": []}, seed=0, device="cpu", **kwargs)
    with th.no_grad():
        for p in model.policy.parameters():
            p.copy_(th.randn(p.shape, generator=th.Generator().manual_seed(p.numel())) * 0.7)
    return model


def policy_logits(model):
    layer = model.policy.action_net
    return layer.weight.detach().double().T + layer.bias.detach().double()


def action_probabilities(model):
    return th.softmax(policy_logits(model), dim=1).numpy()


def probability(trajectory, pi):
    return trajectory.env_probability * np.prod(pi[list(trajectory.states), list(trajectory.actions)])


def actor_gradient(model):
    layer = model.policy.action_net
    return -np.concatenate([layer.weight.grad.numpy().ravel(), layer.bias.grad.numpy()]).astype(np.float64)


def gradient_of_batch(model, batch, last_state=None):
    """Ascent direction that VPG computes from these episodes, one per environment."""
    buffer, n_rows = model.rollout_buffer, max(len(episode.states) for episode in batch)
    buffer.reset()
    for t in range(n_rows):
        recorded = np.array([t < len(episode.states) for episode in batch])
        at = [min(t, len(episode.states) - 1) for episode in batch]
        buffer.add(
            np.array([episode.states[k] for episode, k in zip(batch, at)]),
            np.array([episode.actions[k] for episode, k in zip(batch, at)]),
            np.array([episode.rewards[k] for episode, k in zip(batch, at)]),
            np.array([t == 0 or t >= len(episode.states) for episode in batch]),
            recorded=recorded,
        )
    buffer.finish()
    last_values, dones = th.zeros(len(batch)), np.ones(len(batch), dtype=bool)
    if model.plan.uses_value_function:
        model._compute_values(buffer, make_policy_runner(model.policy))
    if last_state is not None:
        dones[:] = False
        with th.no_grad():
            last_values = model.policy.predict_values(th.tensor([last_state]))
    buffer.compute_returns_and_advantage(last_values, dones)
    model.policy.zero_grad()
    model._accumulate_gradients(make_policy_runner(model.policy), *model._batch_counts()[:2])
    return actor_gradient(model)


def batches(model, p_end, n_episodes=1):
    """All batches of ``n_episodes`` episodes, in any one order, and their probabilities."""
    pi, episodes = action_probabilities(model), trajectories(p_end)
    assert sum(probability(episode, pi) for episode in episodes) == pytest.approx(1)
    for batch in itertools.combinations_with_replacement(episodes, n_episodes):
        n_orders = len(set(itertools.permutations(batch)))
        yield batch, n_orders * np.prod([probability(episode, pi) for episode in batch])


def true_gradient(model, p_end, horizon=HORIZON):
    """Gradient of J = sum over trajectories of P(tau) R(tau), by differentiating the probabilities themselves."""
    layer = model.policy.action_net
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    pi = th.softmax(weight.T + bias, dim=1)
    objective = th.zeros((), dtype=th.float64)
    for episode in trajectories(p_end, horizon):
        discounted = float((GAMMA ** np.arange(len(episode.states)) * episode.rewards).sum())
        objective = objective + pi[list(episode.states), list(episode.actions)].prod() * episode.env_probability * discounted
    objective.backward()
    return np.concatenate([weight.grad.numpy().ravel(), bias.grad.numpy()])


def true_values(model, p_end):
    """Q(s, a) and V(s) by dynamic programming."""
    pi, q, v = action_probabilities(model), np.zeros((N_STATES, N_ACTIONS)), np.zeros(N_STATES)
    for state in reversed(range(N_STATES)):
        for action in range(N_ACTIONS):
            outcomes = successors(state, action, p_end)
            q[state, action] = REWARDS[state, action] + GAMMA * sum(p * v[s] for s, p in outcomes if s is not None)
        v[state] = pi[state] @ q[state]
    return q, v


def policy_gradient_theorem(model, p_end, discount, horizon=HORIZON):
    """sum_t discount^t sum_s P(s_t = s) sum_a grad pi(a | s) Q(s, a), Sutton et al. (1999), for t < horizon."""
    pi, (q, _) = action_probabilities(model), true_values(model, p_end)
    visits, here = np.zeros(N_STATES), {0: 1.0}
    for t in range(horizon):
        following = {}
        for state, mass in here.items():
            visits[state] += discount**t * mass
            for action in range(N_ACTIONS):
                for s, p in successors(state, action, p_end):
                    if s is not None:
                        following[s] = following.get(s, 0.0) + mass * pi[state, action] * p
        here = following
    layer = model.policy.action_net
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    (th.softmax(weight.T + bias, dim=1) * th.tensor(visits[:, None] * q)).sum().backward()
    return np.concatenate([weight.grad.numpy().ravel(), bias.grad.numpy()])


def set_true_critic(model, p_end):
    with th.no_grad():
        model.policy.value_net.weight.copy_(th.tensor(true_values(model, p_end)[1]))
        model.policy.value_net.bias.zero_()
