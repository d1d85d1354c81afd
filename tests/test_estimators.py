"""Estimators against hand-computed values, identities and the O(T^2) definition."""

import itertools

import numpy as np
import pytest

from sb3_vpg import estimators as est
from sb3_vpg.estimators import BASELINES, ESTIMATORS, Formulation, Rollout

HALF = 0.5


def column(*values):
    """A (T, 1) array."""
    return np.array(values, dtype=np.float64)[:, None]


def last_of(*lengths, n_steps=None):
    """A (T, 1) column with pieces of these lengths; what follows up to ``n_steps`` is one more piece."""
    n_steps = n_steps or sum(lengths)
    last = np.zeros((n_steps, 1), dtype=bool)
    last[np.cumsum(lengths) - 1] = True
    last[-1] = True
    return last


def rollout(rewards, last, values=None, next_values=None, mask=None, steps=None):
    rewards = np.asarray(rewards, dtype=np.float64)
    zeros = np.zeros_like(rewards)
    first = est.first_step_of_segment(last)
    return Rollout(
        rewards=rewards,
        values=zeros if values is None else values,
        next_values=zeros if next_values is None else next_values,
        last=last,
        mask=np.ones(rewards.shape, dtype=bool) if mask is None else mask,
        steps=np.arange(len(rewards))[:, None] - first if steps is None else steps,
    )


def random_rollout(seed, n_steps=37, n_envs=5):
    rng = np.random.default_rng(seed)
    last = rng.random((n_steps, n_envs)) < 0.15
    last[-1] = True
    values = rng.normal(size=last.shape)
    next_values = np.zeros_like(values)
    next_values[:-1] = values[1:]
    ends = rng.choice([0.0, 1.0], size=last.shape) * rng.normal(size=last.shape)  # 0: terminated
    next_values[last] = ends[last]
    return rollout(rng.normal(size=last.shape), last, values, next_values)


# ------------------------------------------------------------------------------------------------------------------
# Hand values
# ------------------------------------------------------------------------------------------------------------------


def test_ten_rewards_of_one_at_gamma_0_99():
    ones = np.ones((10, 1))
    expected = [9.561792, 8.648275, 7.725531, 6.793465, 5.851985, 4.900995, 3.940399, 2.9701, 1.99, 1]
    result = est.reward_to_go(ones, np.zeros_like(ones), last_of(10), gamma=0.99)
    np.testing.assert_allclose(result[:, 0], expected, atol=5e-7)


def test_reward_to_go_by_hand():
    # Two episodes, 4 + (8 + 16/2)/2 = 12, and 2 + 6/2 = 5
    result = est.reward_to_go(column(4, 8, 16, 2, 6), column(0, 0, 0, 0, 0), last_of(3, 2), HALF)
    np.testing.assert_array_equal(result, column(12, 16, 16, 5, 6))


def test_reward_to_go_adds_the_value_of_the_successor_at_the_last_step_only():
    # A time limit after two steps with V = 8, then a piece cut at the end of the rollout with V = 4
    next_values = column(100, 8, 100, 4)
    result = est.reward_to_go(column(2, 4, 6, 10), next_values, last_of(2, 2), HALF)
    np.testing.assert_array_equal(result, column(6, 8, 12, 12))


def test_total_return_is_one_number_per_episode():
    result = est.total_return(column(4, 8, 16, 2, 6), last_of(3, 2), HALF)
    np.testing.assert_array_equal(result, column(12, 12, 12, 5, 5))


def test_td_residual_by_hand():
    result = est.td_residual(column(4, 8), column(1, 2), column(2, 6), HALF)
    np.testing.assert_array_equal(result, column(4 + 1 - 1, 8 + 3 - 2))


def test_gae_by_hand():
    # gamma = lambda = 1/2: A_t = delta_t + A_{t+1} / 4; termination after step 2, a time limit with V = 8 after step 3
    rewards, values, next_values = column(1, 2, 4, 6), column(2, 4, 8, 16), column(4, 8, 0, 8)
    delta = column(1 + 2 - 2, 2 + 4 - 4, 4 - 8, 6 + 4 - 16)
    np.testing.assert_array_equal(delta, column(1, 2, -4, -6))
    result = est.gae(rewards, values, next_values, last_of(3, 1), HALF, HALF)
    np.testing.assert_array_equal(result, column(1 + 1 / 4, 2 - 1, -4, -6))


def test_targets_of_the_value_function_by_hand():
    # Three steps, every value 8, and 0 after the last step
    x = rollout(column(1, 2, 4), last_of(3), values=column(8, 8, 8), next_values=column(8, 8, 0))
    to_go = column(1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4)
    targets = {
        "total_return": to_go,
        "reward_to_go": to_go,
        "td_residual": column(1 + 8 / 2, 2 + 8 / 2, 4),
        # TD residuals -3, -2, -4
        "gae": 8 + column(-3 - 2 / 4 - 4 / 16, -2 - 4 / 4, -4),
    }
    for estimator, target in targets.items():
        np.testing.assert_array_equal(Formulation(estimator, gamma=HALF, gae_lambda=HALF)(x)[1], target)


@pytest.mark.parametrize("estimator", ["td_residual", "gae"])
def test_the_value_function_is_subtracted_once_whether_it_is_named_or_not(estimator):
    x = random_rollout(0)
    np.testing.assert_array_equal(Formulation(estimator, "value")(x), Formulation(estimator, None)(x))


def test_baselines_by_hand():
    # Episodes of psi (1, 3), (5,) and, in the second column, (9, 7, 2)
    psi = np.array([[1.0, 9], [3, 7], [5, 2]])
    steps = np.array([[0, 0], [1, 1], [0, 2]])
    mask = np.ones((3, 2), dtype=bool)
    np.testing.assert_array_equal(est.mean_baseline(psi, mask), np.full((3, 2), 27 / 6))
    np.testing.assert_array_equal(est.time_baseline(psi, mask, steps), [[5, 5], [5, 5], [5, 2]])
    # The others at step 0: (5 + 9) / 2, (1 + 5) / 2, (1 + 9) / 2; at step 1: each other; at step 2: nobody, hence 0
    np.testing.assert_array_equal(est.leave_one_out_baseline(psi, mask, steps), [[7, 3], [7, 3], [5, 0]])


def test_baselines_do_not_see_unrecorded_steps():
    psi = np.array([[1.0, 9], [1e30, 7]])
    steps = np.array([[0, 0], [1, 1]])
    mask = np.array([[True, True], [False, True]])
    assert est.mean_baseline(psi, mask)[0, 0] == pytest.approx(17 / 3)
    np.testing.assert_array_equal(est.time_baseline(psi, mask, steps)[mask], [5, 5, 7])
    np.testing.assert_array_equal(est.leave_one_out_baseline(psi, mask, steps)[mask], [9, 1, 0])


def test_normalisation_by_hand():
    advantages, last = column(1, 2, 3, 10, 20), last_of(3, 2)
    mask = np.ones((5, 1), dtype=bool)
    # Sample standard deviations: 1 and sqrt(50)
    np.testing.assert_allclose(
        est.normalize_episode(advantages, mask, last), column(-1, 0, 1, -(0.5**0.5), 0.5**0.5), atol=2e-8
    )
    x = np.array([1.0, 2, 3, 10, 20])
    expected = (x - x.mean()) / (x.std(ddof=1) + 1e-8)
    np.testing.assert_allclose(est.normalize_batch(advantages, mask, last)[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("x", [[7.0], [0.0], [0.1] * 3, [1e30, 1e30], [-0.3] * 11, [1e-38] * 7])
@pytest.mark.parametrize("normalize", [est.normalize_batch, est.normalize_episode])
def test_without_spread_normalisation_centres_and_does_not_scale(x, normalize):
    advantages = column(*x)
    result = normalize(advantages, np.ones(advantages.shape, dtype=bool), last_of(len(x)))
    np.testing.assert_allclose(result, 0, atol=1e-6 * abs(x[0]))


@pytest.mark.parametrize("normalize", [est.normalize_batch, est.normalize_episode])
def test_rounding_noise_is_not_blown_up_to_unit_variance(normalize):
    noise = 1000 * (1 + 1e-9 * np.random.default_rng(0).normal(size=(50, 1)))
    assert np.abs(normalize(noise, np.ones((50, 1), dtype=bool), last_of(50))).max() < 1e-5


def test_normalisation_ignores_unrecorded_steps():
    advantages, mask = column(1, 2, 3, 1e9), np.array([[True], [True], [True], [False]])
    for normalize in (est.normalize_batch, est.normalize_episode):
        np.testing.assert_allclose(normalize(advantages, mask, last_of(3, 1)), column(-1, 0, 1, 0), atol=2e-8)


def test_gamma_to_the_t_weights_by_the_index_within_the_episode():
    # The first column begins in the middle of an episode, at step 2
    x = rollout(np.ones((3, 2)), np.array([[False, False], [True, False], [True, True]]))
    x = x._replace(steps=np.array([[2, 0], [3, 1], [0, 2]]))
    plain, _ = Formulation("reward_to_go", gamma=HALF)(x)
    weighted, _ = Formulation("reward_to_go", gamma=HALF, discount_state_distribution=True)(x)
    np.testing.assert_array_equal(weighted, plain * [[1 / 4, 1], [1 / 8, 1 / 2], [1, 1 / 4]])


def test_total_return_is_not_weighted_again():
    x = rollout(np.ones((3, 1)), last_of(3))
    plain, _ = Formulation("total_return", gamma=HALF)(x)
    weighted, _ = Formulation("total_return", gamma=HALF, discount_state_distribution=True)(x)
    np.testing.assert_array_equal(weighted, plain)
    np.testing.assert_array_equal(plain, np.full((3, 1), 1.75))


# ------------------------------------------------------------------------------------------------------------------
# The O(T^2) definition
# ------------------------------------------------------------------------------------------------------------------


def by_definition(x, gamma, weight):
    """sum over k >= t within the piece of weight^(k - t) x_k, for each t, as a double sum."""
    n_steps, n_envs = x.rewards.shape
    sums = np.zeros((n_steps, n_envs))
    for n, t in itertools.product(range(n_envs), range(n_steps)):
        for k in range(t, n_steps):
            sums[t, n] += weight ** (k - t) * gamma[k, n]
            if x.last[k, n]:
                break
    return sums


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (37, 5), (64, 1)])
def test_estimators_equal_the_double_sum(seed, gamma, shape):
    x, lam = random_rollout(seed, *shape), 0.9
    bootstrapped = x.rewards + x.last * gamma * x.next_values
    np.testing.assert_allclose(
        est.reward_to_go(x.rewards, x.next_values, x.last, gamma), by_definition(x, bootstrapped, gamma), atol=1e-12
    )
    delta = x.rewards + gamma * x.next_values - x.values
    np.testing.assert_allclose(
        est.gae(x.rewards, x.values, x.next_values, x.last, gamma, lam), by_definition(x, delta, gamma * lam), atol=1e-12
    )
    from_start = by_definition(x, x.rewards, gamma)
    expected = np.take_along_axis(from_start, est.first_step_of_segment(x.last), axis=0)
    np.testing.assert_allclose(est.total_return(x.rewards, x.last, gamma), expected, atol=1e-12)


def test_piece_index_and_first_step():
    last = np.array([[0, 1], [1, 0], [0, 0], [1, 1]], dtype=bool)
    np.testing.assert_array_equal(est.segment_index(last), [[0, 2], [0, 3], [1, 3], [1, 3]])
    np.testing.assert_array_equal(est.first_step_of_segment(last), [[0, 0], [0, 1], [2, 1], [2, 1]])


def test_nothing_leaks_across_a_border():
    x = random_rollout(0)
    t = int(np.flatnonzero(x.last[:-1, 0])[0])
    changed = x.rewards.copy()
    changed[t + 1 :, 0] += 1e6
    for formulation in (Formulation("reward_to_go"), Formulation("gae"), Formulation("total_return")):
        before, after = formulation(x)[0], formulation(x._replace(rewards=changed))[0]
        np.testing.assert_array_equal(before[: t + 1, 0], after[: t + 1, 0])
        assert (before[t + 1 :, 0] != after[t + 1 :, 0]).all()


def test_scan_leaves_its_arguments_alone_and_computes_in_double_precision():
    x, d = np.full((40, 2), 0.1, dtype=np.float32), np.full((40, 2), 0.5, dtype=np.float32)
    copies = x.copy(), d.copy()
    assert est.discounted_sum(x, d).dtype == np.float64
    np.testing.assert_array_equal(x, copies[0])
    np.testing.assert_array_equal(d, copies[1])


# ------------------------------------------------------------------------------------------------------------------
# Identities
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gae_lambda_1_is_reward_to_go_minus_value(seed):
    x = random_rollout(seed)
    gae, returns = Formulation("gae", gamma=0.9, gae_lambda=1.0)(x)
    reward_to_go, target = Formulation("reward_to_go", "value", gamma=0.9)(x)
    np.testing.assert_allclose(gae, reward_to_go, atol=1e-12)
    np.testing.assert_allclose(returns, target, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gae_lambda_0_is_the_td_residual(seed):
    x = random_rollout(seed)
    for gae, delta in zip(Formulation("gae", gamma=0.9, gae_lambda=0.0)(x), Formulation("td_residual", gamma=0.9)(x)):
        np.testing.assert_allclose(gae, delta, atol=1e-12)


def test_total_return_is_reward_to_go_at_the_first_step():
    x = random_rollout(0)._replace(next_values=np.zeros((37, 5)))
    first = x.steps == 0
    total, to_go = Formulation("total_return")(x)[0], Formulation("reward_to_go")(x)[0]
    np.testing.assert_array_equal(total[first], to_go[first])


def test_gamma_0_leaves_the_immediate_reward():
    x = random_rollout(0)
    np.testing.assert_array_equal(Formulation("reward_to_go", gamma=0.0)(x)[0], x.rewards)
    np.testing.assert_allclose(Formulation("gae", gamma=0.0)(x)[0], x.rewards - x.values, atol=1e-15)


def test_leave_one_out_is_the_time_baseline_scaled_by_k_over_k_minus_1():
    rng = np.random.default_rng(0)
    n_episodes, length = 6, 4
    last = np.zeros((length, n_episodes), dtype=bool)
    last[-1] = True
    x = rollout(rng.normal(size=last.shape), last)
    time, loo = Formulation("reward_to_go", "time")(x)[0], Formulation("reward_to_go", "leave_one_out")(x)[0]
    np.testing.assert_allclose(time, loo * (1 - 1 / n_episodes), atol=1e-12)


def valid_combinations():
    valid = []
    for combination in itertools.product(ESTIMATORS, BASELINES, [False, True, "episode"]):
        try:
            Formulation(*combination)
        except ValueError:  # see test_keywords.py
            continue
        valid.append(combination)
    return valid


def test_there_are_as_many_combinations_as_the_design_says():
    # td_residual and gae with None or "value"; total_return with "episode" needs a baseline that is not constant
    assert len(valid_combinations()) == (2 * 2 * 3) + (5 * 3) + (5 * 3 - 2)


@pytest.mark.parametrize(("estimator", "baseline", "normalize"), valid_combinations())
def test_unrecorded_steps_change_nothing_and_get_nothing(estimator, baseline, normalize):
    formulation = Formulation(estimator, baseline, normalize, True, 0.9, 0.8)
    x = random_rollout(1, n_steps=20, n_envs=3)
    mask = np.ones((20, 3), dtype=bool)
    cut = int(np.flatnonzero(x.last[:, 2])[0]) + 1
    mask[cut:, 2] = False
    garbage = x._replace(rewards=np.where(mask, x.rewards, np.inf), values=np.where(mask, x.values, 1e9), mask=mask)
    x = x._replace(mask=mask)
    for clean, dirty in zip(formulation(x), formulation(garbage)):
        np.testing.assert_array_equal(clean[mask], dirty[mask])
    for advantages in (formulation(garbage)[0], formulation.advantages(garbage)[0]):
        assert not advantages[~mask].any()
    assert formulation(x)[0][mask].any()


@pytest.mark.parametrize("shapes", [((3, 2), (2, 3)), ((3, 1), (3,)), ((6,), (6,))])
def test_wrong_shapes_are_refused_not_broadcast(shapes):
    with pytest.raises(ValueError, match=r"shape \(T, N\)"):
        est.discounted_sum(np.zeros(shapes[0]), np.zeros(shapes[1]))


@pytest.mark.parametrize("name", ["psi", "value_target"])
def test_an_estimator_of_ones_own_with_another_shape_is_named(name, monkeypatch):
    spec = ESTIMATORS["reward_to_go"]._replace(**{name: lambda x, *_: x.rewards[0]})
    monkeypatch.setitem(ESTIMATORS, "mine", spec)
    with pytest.raises(ValueError, match=rf"same shape \(T, N\), got .*{name} of 'mine'\": \(3,\)"):
        Formulation("mine", gamma=0.9)(random_rollout(1, n_steps=20, n_envs=3))


def test_what_lies_in_memory_is_not_computed_with(monkeypatch):
    monkeypatch.setattr(np, "empty_like", lambda array: np.full_like(array, np.inf))
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(
            est.discounted_sum(np.ones((9, 1)), np.array([[1.0]] * 8 + [[0.0]]))[:, 0], np.arange(9, 0, -1)
        )
