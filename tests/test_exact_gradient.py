"""
Expected gradients, exactly: every trajectory of a small MDP is enumerated, its gradient is computed by VPG's own buffer and
loss, and the probability-weighted sum is compared with what theory says. No sampling error to hide behind.
"""

import itertools
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG
from sb3_vpg.passes import passes_of

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


class Unused(gym.Env):
    """Gives VPG its spaces; trajectories are written into the buffer by hand."""

    observation_space = spaces.Discrete(N_STATES)
    action_space = spaces.Discrete(N_ACTIONS)


def make_model(n_envs, **kwargs):
    env = DummyVecEnv([Unused] * n_envs)
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
    if model.uses_value_function:
        model._fill_in_values(buffer, passes_of(model.policy))
    if last_state is not None:
        dones[:] = False
        with th.no_grad():
            last_values = model.policy.predict_values(th.tensor([last_state]))
    buffer.compute_returns_and_advantage(last_values, dones)
    model.policy.zero_grad()
    model._accumulate_gradients(passes_of(model.policy))
    return actor_gradient(model)


def expected_gradient(model, p_end, n_episodes=1):
    """Expectation of VPG's gradient over all batches of ``n_episodes`` episodes."""
    pi, total = action_probabilities(model), 0.0
    episodes = trajectories(p_end)
    assert sum(probability(episode, pi) for episode in episodes) == pytest.approx(1)
    for batch in itertools.combinations_with_replacement(episodes, n_episodes):
        # The gradient does not depend on the order of the episodes
        n_orders = len(set(itertools.permutations(range(n_episodes)))) if len(set(batch)) == n_episodes else 1
        weight = n_orders * np.prod([probability(episode, pi) for episode in batch])
        total = total + weight * gradient_of_batch(model, batch)
    return total


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


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.abs(expected).max() > 0.1


def test_the_theorem_and_the_derivative_of_the_return_agree():
    model = make_model(1)
    assert_same(policy_gradient_theorem(model, 0.25, GAMMA), true_gradient(model, 0.25))


WITH_GAMMA_T = {"discount_state_distribution": True}


@pytest.mark.parametrize("p_end", [0.0, 0.25])
@pytest.mark.parametrize(
    "formulation",
    [
        {"estimator": "total_return"},
        {"estimator": "total_return", **WITH_GAMMA_T},
        {"estimator": "total_return", "baseline": "value"},
        {"estimator": "reward_to_go", **WITH_GAMMA_T},
        {"estimator": "reward_to_go", "baseline": "value", **WITH_GAMMA_T},
        {"estimator": "gae", "gae_lambda": 1.0, **WITH_GAMMA_T},
    ],
    ids=str,
)
def test_unbiased_with_any_critic(formulation, p_end):
    model = make_model(1, n_episodes=1, **formulation)
    assert_same(expected_gradient(model, p_end), true_gradient(model, p_end))


@pytest.mark.parametrize(
    "formulation",
    [
        {"estimator": "td_residual", **WITH_GAMMA_T},
        {"estimator": "gae", "gae_lambda": 0.0, **WITH_GAMMA_T},
        {"estimator": "gae", "gae_lambda": 0.6, **WITH_GAMMA_T},
    ],
    ids=str,
)
def test_unbiased_with_the_true_critic_only(formulation):
    model = make_model(1, n_episodes=1, **formulation)
    expected = true_gradient(model, 0.25)
    assert np.abs(expected_gradient(model, 0.25) - expected).max() > 0.02  # a thousand times the tolerance
    set_true_critic(model, 0.25)
    assert_same(expected_gradient(model, 0.25), expected)


@pytest.mark.parametrize("p_end", [0.0, 0.25])
@pytest.mark.parametrize("estimator", ["total_return", "reward_to_go"])
def test_leave_one_out_is_unbiased(estimator, p_end):
    model = make_model(2, n_episodes=1, estimator=estimator, baseline="leave_one_out", discount_state_distribution=True)
    assert_same(expected_gradient(model, p_end, n_episodes=2), true_gradient(model, p_end))


@pytest.mark.parametrize(
    "formulation",
    [
        {"estimator": "total_return", "baseline": "mean"},
        {"estimator": "total_return", "baseline": "time"},
        {"estimator": "reward_to_go", "baseline": "time", **WITH_GAMMA_T},
    ],
    ids=str,
)
def test_a_baseline_of_all_k_episodes_scales_the_gradient_by_1_minus_1_over_k(formulation):
    # Exact where all episodes are of the same length
    model = make_model(2, n_episodes=1, **formulation)
    assert_same(expected_gradient(model, 0.0, n_episodes=2), (1 - 1 / 2) * true_gradient(model, 0.0))


@pytest.mark.parametrize("formulation", [{"estimator": "reward_to_go"}, {"estimator": "gae", "gae_lambda": 1.0}], ids=str)
def test_without_gamma_t_states_count_undiscounted(formulation):
    model = make_model(1, n_episodes=1, **formulation)
    undiscounted = policy_gradient_theorem(model, 0.25, discount=1.0)
    assert np.abs(undiscounted - true_gradient(model, 0.25)).max() > 0.1
    assert_same(expected_gradient(model, 0.25), undiscounted)


def test_mean_over_steps_divides_by_the_length():
    model = make_model(1, n_episodes=1, estimator="total_return", loss_reduction="mean")
    assert_same(HORIZON * expected_gradient(model, 0.0), true_gradient(model, 0.0))


def expected_gradient_of_two_steps(model):
    """Episodes are cut after two of their three steps."""
    pi, total = action_probabilities(model), 0.0
    for episode in trajectories(0.0, horizon=2):
        for last_state, p in successors(episode.states[-1], episode.actions[-1], 0.0):
            gradient = gradient_of_batch(model, [episode], last_state if model.partial_episodes_mode == "bootstrap" else None)
            total = total + p * probability(episode, pi) * gradient
    return total


def test_truncate_is_the_gradient_of_the_truncated_return():
    model = make_model(1, n_steps=2, estimator="reward_to_go", partial_episodes="truncate", discount_state_distribution=True)
    truncated = true_gradient(model, 0.0, horizon=2)
    assert np.abs(truncated - true_gradient(model, 0.0)).max() > 0.1
    assert_same(expected_gradient_of_two_steps(model), truncated)


def test_bootstrap_with_the_true_critic_is_the_contribution_of_the_steps_taken():
    model = make_model(1, n_steps=2, estimator="reward_to_go", baseline="value", discount_state_distribution=True)
    assert model.partial_episodes_mode == "bootstrap"
    set_true_critic(model, 0.0)
    assert_same(expected_gradient_of_two_steps(model), policy_gradient_theorem(model, 0.0, GAMMA, horizon=2))
