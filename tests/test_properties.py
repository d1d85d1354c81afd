"""
What must hold for any rollout: estimators, buffers and collection on random shapes, borders, masks and rewards.

``HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py`` tries twenty times as many cases.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from helpers.envs import CountingEnv
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_vpg import VPG
from sb3_vpg.estimators import (
    BASELINES,
    ESTIMATORS,
    Formulation,
    Rollout,
    discounted_sum,
    normalize_batch,
    normalize_episode,
    segment_index,
)

DISCOUNTS = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]) | st.floats(0.0, 1.0)
ORDINARY = st.floats(-100, 100, width=32)
# What single precision can hold, from denormal to huge
EXTREME = st.sampled_from([0.0, 1e-45, -1e-40, 1e-10, 1.0, -3.0, 1e10, -1e30, 1e30])
ALL = [(estimator, baseline) for estimator in ESTIMATORS for baseline in BASELINES]
VALID = [
    (estimator, baseline)
    for estimator, baseline in ALL
    if not (ESTIMATORS[estimator].subtracts_value and baseline not in (None, "value"))
]
NORMALIZATIONS = (False, "batch", "episode")


def formulations(normalizations=(False,), **keywords):
    """:return: every estimator with every baseline and normalization that goes with it. To draw a rollout takes longer."""
    return [
        Formulation(estimator, baseline, normalize, **keywords)
        for estimator, baseline in VALID
        for normalize in normalizations
        if not (normalize == "episode" and estimator == "total_return" and baseline in (None, "mean"))
    ]


@st.composite
def rollouts(draw, rewards=ORDINARY, max_steps=40, max_envs=8):
    """Rollouts as VPG's buffer has them: in each column whole episodes, what comes after the last of them not recorded."""
    n_steps, n_envs = draw(st.integers(1, max_steps)), draw(st.integers(1, max_envs))
    shape = (n_steps, n_envs)
    ends = draw(arrays(bool, shape, elements=st.booleans()))
    last = ends.copy()
    last[-1] = True
    mask = np.ones(shape, bool)
    for n, row in enumerate(draw(arrays(np.int64, n_envs, elements=st.integers(0, n_steps - 1)))):
        # Up to the first end from there on
        mask[row + int(np.argmax(last[row:, n])) + 1 :, n] = False
    starts = np.vstack([np.ones((1, n_envs), bool), last[:-1]])
    rows = np.arange(n_steps)[:, None]
    steps = rows - np.maximum.accumulate(np.where(starts, rows, 0), axis=0)
    values = draw(arrays(np.float64, shape, elements=st.floats(-10, 10)))
    next_values = np.vstack([values[1:], np.zeros((1, n_envs))])
    # A termination or a time limit
    at_ends = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 2.0])))
    next_values = np.where(last, at_ends, next_values)
    numbers = draw(arrays(np.float32, shape, elements=rewards))
    return Rollout(numbers.astype(np.float64), values, next_values, last, mask, steps)


def by_definition(estimator, rollout, gamma, gae_lambda):
    """psi by its sum, in O(T^2), piece by piece."""
    psi = np.zeros(rollout.rewards.shape)
    delta = rollout.rewards + gamma * rollout.next_values - rollout.values
    for n in range(psi.shape[1]):
        borders = np.flatnonzero(rollout.last[:, n]) + 1
        for begin, end in zip([0, *borders[:-1]], borders):
            r, d = rollout.rewards[begin:end, n], delta[begin:end, n]
            after = gamma * rollout.next_values[end - 1, n]
            for t in range(end - begin):
                powers = np.arange(end - begin - t)
                psi[begin + t, n] = {
                    "total_return": np.sum(gamma ** np.arange(len(r)) * r),
                    "reward_to_go": np.sum(gamma**powers * r[t:]) + gamma ** powers[-1] * after,
                    "td_residual": d[t],
                    "gae": np.sum((gamma * gae_lambda) ** powers * d[t:]),
                }[estimator]
    return psi


@given(rollouts(), DISCOUNTS, DISCOUNTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_are_their_definitions(estimator, rollout, gamma, gae_lambda):
    formulation = Formulation(estimator, gamma=gamma, gae_lambda=gae_lambda)
    expected = np.where(rollout.mask, by_definition(estimator, rollout, gamma, gae_lambda), 0)
    np.testing.assert_allclose(formulation(rollout)[0], expected, rtol=1e-9, atol=1e-9)


@given(rollouts(), st.floats(-3, 3), DISCOUNTS)
def test_linear_in_rewards_and_values(rollout, factor, gamma):
    names = ("rewards", "values", "next_values")
    other = {name: np.sin(np.arange(rollout.rewards.size)).reshape(rollout.rewards.shape) + i for i, name in enumerate(names)}
    combined = {name: getattr(rollout, name) + factor * other[name] for name in names}
    for formulation in formulations(gamma=gamma, gae_lambda=0.9):
        expected = formulation(rollout)[0] + factor * formulation(rollout._replace(**other))[0]
        actual = formulation(rollout._replace(**combined))[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-7, err_msg=str(formulation))


@given(rollouts(), st.randoms(use_true_random=False))
def test_the_order_of_environments_does_not_matter(rollout, random):
    order = random.sample(range(rollout.rewards.shape[1]), rollout.rewards.shape[1])
    permuted = Rollout(*(array[:, order] for array in rollout))
    for formulation in formulations(NORMALIZATIONS, gamma=0.9, gae_lambda=0.9):
        for one, other in zip(formulation(permuted), formulation(rollout)):
            np.testing.assert_allclose(one, other[:, order], rtol=1e-6, atol=1e-6, err_msg=str(formulation))


@given(rollouts())
def test_episodes_one_after_another_are_as_episodes_side_by_side(rollout):
    """The same episodes, collected by few environments or by as many as there are episodes."""
    pieces = np.unique(segment_index(rollout.last)[rollout.mask], return_inverse=True)[1]
    steps = rollout.steps[rollout.mask]

    def side_by_side(array):
        columns = np.zeros((steps.max() + 1, pieces.max() + 1), array.dtype)
        columns[steps, pieces] = array[rollout.mask]
        return columns

    apart = Rollout(*map(side_by_side, rollout))
    each_way = [formulations(discount_state_distribution=way, gamma=0.9, gae_lambda=0.9) for way in (False, True)]
    for formulation in itertools.chain(*each_way):
        for one, other in zip(formulation(rollout), formulation(apart)):
            np.testing.assert_allclose(one[rollout.mask], other[steps, pieces], rtol=1e-9, atol=1e-9, err_msg=str(formulation))


@given(rollouts(), arrays(np.float64, 50, elements=st.floats(-10, 10)), DISCOUNTS)
@pytest.mark.parametrize("estimator", ["td_residual", "gae"])
def test_a_potential_that_the_value_function_knows_changes_nothing(estimator, rollout, potentials, gamma):
    """r + gamma Phi(s') - Phi(s) with V - Phi (Ng et al., 1999)."""
    formulation = Formulation(estimator, gamma=gamma, gae_lambda=0.9)
    size = rollout.rewards.size
    here = potentials[np.arange(size) % 50].reshape(rollout.rewards.shape)
    following = np.where(rollout.last, 0.0, np.vstack([here[1:], here[:1]]))
    shaped = rollout._replace(
        rewards=rollout.rewards + gamma * following - here,
        values=rollout.values - here,
        next_values=rollout.next_values - following,
    )
    np.testing.assert_allclose(formulation(shaped)[0], formulation(rollout)[0], rtol=1e-9, atol=1e-9)


@given(rollouts(), st.floats(-50, 50))
@pytest.mark.parametrize("baseline", ["mean", "time", "leave_one_out"])
def test_the_same_bonus_for_each_episode_is_subtracted_by_a_baseline(baseline, rollout, bonus):
    """At the first step: every total return grows by it."""
    formulation = Formulation("total_return", baseline, gamma=0.9)
    shifted = rollout._replace(rewards=rollout.rewards + bonus * (rollout.steps == 0))
    before, after = formulation(rollout)[0], formulation(shifted)[0]
    if baseline == "leave_one_out":
        # Where no other episode reaches the step, nothing is subtracted
        alone = np.bincount(rollout.steps[rollout.mask])[np.where(rollout.mask, rollout.steps, 0)] == 1
        before = before + bonus * (alone & rollout.mask)
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)


@given(rollouts(), st.floats(0.1, 1000), st.floats(-100, 100))
@pytest.mark.parametrize("normalize", [normalize_batch, normalize_episode])
def test_normalised_advantages_know_neither_scale_nor_shift(normalize, rollout, scale, shift):
    advantages = rollout.rewards
    groups = segment_index(rollout.last) if normalize is normalize_episode else np.zeros_like(rollout.steps)
    # A spread that is lost beside the shift is rounding, and so is one that is tiny
    for group in np.unique(groups[rollout.mask]):
        of_group = advantages[rollout.mask & (groups == group)]
        assume(np.ptp(of_group) == 0 or of_group.std() > 0.1)
    one = normalize(advantages, rollout.mask, rollout.last)
    other = normalize(scale * advantages + shift, rollout.mask, rollout.last)
    np.testing.assert_allclose(one, other, atol=1e-4)
    for group in np.unique(groups[rollout.mask]):
        of_group = one[rollout.mask & (groups == group)]
        assert abs(of_group.mean()) < 1e-6
        assert np.ptp(of_group) == 0 or np.std(of_group, ddof=1) == pytest.approx(1, abs=1e-5)


@given(rollouts(rewards=EXTREME), DISCOUNTS)
def test_extreme_rewards_give_finite_numbers(rollout, gamma):
    for formulation in formulations(NORMALIZATIONS, gamma=gamma, gae_lambda=0.9):
        advantages, targets = formulation(rollout)
        assert np.isfinite(advantages).all(), formulation
        assert np.isfinite(targets).all(), formulation
        assert not advantages[~rollout.mask].any(), formulation


@given(rollouts(), DISCOUNTS)
def test_single_precision_loses_little(rollout, gamma):
    single = Rollout(*(array.astype(np.float32) if array.dtype == np.float64 else array for array in rollout))
    # Sums of up to 40 numbers of up to 100, each rounded to a relative 6e-8
    for formulation in formulations(gamma=gamma, gae_lambda=0.9):
        actual, expected = formulation(single)[0], formulation(rollout)[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=40 * 110 * 6e-8, err_msg=str(formulation))


@given(
    arrays(np.float64, st.tuples(st.integers(1, 70), st.integers(1, 300)), elements=st.just(1.0)),
    DISCOUNTS,
)
def test_a_long_sum_of_ones_is_the_geometric_series(ones, gamma):
    discounts = np.full(ones.shape, gamma)
    discounts[-1] = 0
    n = len(ones) - np.arange(len(ones))
    expected = n if gamma == 1 else (1 - gamma**n) / (1 - gamma)
    np.testing.assert_allclose(discounted_sum(ones, discounts), np.broadcast_to(expected[:, None], ones.shape), rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# Collection
# ---------------------------------------------------------------------------------------------------------------


LENGTHS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=5)
MODES = st.sampled_from(
    [
        {"estimator": "reward_to_go", "partial_episodes": "truncate"},
        {"estimator": "reward_to_go", "partial_episodes": "finish"},
        {"estimator": "reward_to_go", "n_episodes": 1},
        {"estimator": "total_return", "baseline": "time", "n_episodes": 3},
        {"estimator": "gae"},
        {"estimator": "gae", "partial_episodes": "finish"},
        {"estimator": "reward_to_go", "baseline": "value", "n_episodes": 2},
    ]
)


@given(LENGTHS, MODES, st.integers(1, 20), st.booleans(), st.sampled_from([0.0, 0.9, 1.0]))
def test_what_is_collected_is_what_happened(lengths, mode, n_steps, time_limit, gamma):
    assume(not (mode.get("baseline") == "time" and len(lengths) * mode["n_episodes"] == 1))
    env = DummyVecEnv([lambda own=own: CountingEnv(own, time_limit=time_limit) for own in lengths])
    keywords = {"policy_kwargs": {"net_arch": []}, "normalize_advantage": False, "n_critic_updates": 1, "seed": 0, **mode}
    model = VPG("MlpPolicy", env, n_steps=n_steps, gamma=gamma, **keywords)
    _, callback = model._setup_learn(10**6)
    for _ in range(2):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
        model.train()
    buffer, whole = model.rollout_buffer, model.plan.partial_episodes.whole_episodes
    assert th.isfinite(th.nn.utils.parameters_to_vector(model.policy.parameters())).all()
    for n, own in enumerate(lengths):
        mask = buffer.mask[:, n]
        # Recorded without gaps, from the start
        assert (np.diff(mask.astype(int)) <= 0).all()
        episodes, steps = buffer.observations[mask, n].T
        np.testing.assert_array_equal(buffer.rewards[mask, n], steps + 1)
        np.testing.assert_array_equal(buffer.steps[mask, n], steps)
        ended = steps + 1 == [own[int(episode) % len(own)] for episode in episodes]
        np.testing.assert_array_equal(buffer.ends[mask, n], ended)
        if whole:
            assert steps[0] == 0
            assert ended[-1]
            if model.n_episodes is None:
                # Not one episode more than it takes
                assert n_steps <= mask.sum()
                assert not ended[:-1][n_steps - 1 :].any()
            else:
                assert ended.sum() == model.n_episodes
        else:
            assert mask.sum() == n_steps
    rollout = buffer.rollout
    assert model.plan.uses_value_function or not rollout.next_values.any()
    if not time_limit:
        assert not rollout.next_values[buffer.ends].any()
    expected = by_definition(model.estimator, rollout, gamma, model.gae_lambda)
    if model.baseline == "value":
        expected = expected - rollout.values
    if model.baseline != "time":
        np.testing.assert_allclose(
            buffer.advantages[buffer.mask], expected[buffer.mask].astype(np.float32), rtol=1e-5, atol=1e-5
        )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans())
@pytest.mark.parametrize(
    ("estimator", "baseline"),
    [("reward_to_go", None), ("reward_to_go", "mean"), ("reward_to_go", "value"), ("td_residual", None), ("gae", None)],
    ids=str,
)
def test_a_fixed_length_that_holds_whole_episodes_is_a_rollout_of_these(estimator, baseline, lengths, time_limit):
    def collected(**keywords):
        env = DummyVecEnv([lambda: CountingEnv(lengths, time_limit=time_limit)])
        policy_kwargs = {"net_arch": []}
        model = VPG("MlpPolicy", env, estimator=estimator, baseline=baseline, policy_kwargs=policy_kwargs, seed=0, **keywords)
        _, callback = model._setup_learn(10**6)
        model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
        return model.rollout_buffer

    fixed = collected(n_steps=sum(lengths), partial_episodes="truncate")
    whole = collected(n_episodes=len(lengths))
    np.testing.assert_array_equal(fixed.advantages, whole.advantages)
    for normalize in NORMALIZATIONS:
        fixed.formulation = whole.formulation = replace(whole.formulation, normalize_advantage=normalize)
        np.testing.assert_array_equal(fixed.normalized_advantages(), whole.normalized_advantages(), err_msg=str(normalize))


@pytest.mark.parametrize("n_envs", [1, 300])
@pytest.mark.parametrize("estimator", ["reward_to_go", "gae"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_one_step_of_one_or_hundreds_of_environments(n_envs, estimator, normalize):
    env = DummyVecEnv([lambda: CountingEnv([1])] * n_envs)
    model = VPG("MlpPolicy", env, n_steps=1, estimator=estimator, normalize_advantage=normalize, seed=0)
    model.learn(2 * n_envs)
    assert model.rollout_buffer.n_segments == n_envs
    assert np.isfinite(model.rollout_buffer.advantages).all()
