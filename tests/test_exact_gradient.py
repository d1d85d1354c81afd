"""
Expected gradients, exactly: every trajectory of a small MDP is enumerated, its gradient is computed by VPG's own buffer and
loss, and the probability-weighted sum is compared with what theory says. No sampling error to hide behind.
"""

import numpy as np
import pytest
from helpers.mdp import (
    GAMMA,
    HORIZON,
    action_probabilities,
    batches,
    gradient_of_batch,
    make_model,
    policy_gradient_theorem,
    probability,
    set_true_critic,
    successors,
    trajectories,
    true_gradient,
)


def expected_gradient(model, p_end, n_episodes=1):
    """Expectation of VPG's gradient over all batches of ``n_episodes`` episodes."""
    # The gradient does not depend on the order of the episodes
    return sum(weight * gradient_of_batch(model, batch) for batch, weight in batches(model, p_end, n_episodes))


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
            gradient = gradient_of_batch(model, [episode], last_state if model.plan.partial_episodes.bootstrap else None)
            total = total + p * probability(episode, pi) * gradient
    return total


def test_truncate_is_the_gradient_of_the_truncated_return():
    model = make_model(1, n_steps=2, estimator="reward_to_go", partial_episodes="truncate", discount_state_distribution=True)
    truncated = true_gradient(model, 0.0, horizon=2)
    assert np.abs(truncated - true_gradient(model, 0.0)).max() > 0.1
    assert_same(expected_gradient_of_two_steps(model), truncated)


def test_bootstrap_with_the_true_critic_is_the_contribution_of_the_steps_taken():
    model = make_model(1, n_steps=2, estimator="reward_to_go", baseline="value", discount_state_distribution=True)
    assert model.plan.partial_episodes.bootstrap
    set_true_critic(model, 0.0)
    assert_same(expected_gradient_of_two_steps(model), policy_gradient_theorem(model, 0.0, GAMMA, horizon=2))
