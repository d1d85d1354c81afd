"""Each of the two learning rates, a number or a schedule, reaches its own parameters."""

import copy

import numpy as np
import pytest
from helpers.models import (
    ACTOR,
    CRITIC,
    SGD,
    Spy,
    assert_same_weights,
    changed,
    learning_rates,
    small_model,
    weights,
    with_and_without_critic,
)

# ---------------------------------------------------------------------------------------------------------------
# Saving, loading, continuing
# ---------------------------------------------------------------------------------------------------------------


def test_learning_rates_are_set_from_the_start():
    assert learning_rates(small_model(learning_rate=0.001, critic_learning_rate=0.02)) == (0.001, 0.02)
    assert learning_rates(small_model(learning_rate=0.001)) == (0.001, 0.001)


# ---------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------


def recorded_learning_rates(total_timesteps=80, **keywords):
    """Learning rates of actor and critic at each update; 4 of them by default."""
    seen = []
    model = small_model(**keywords)

    def train_and_record():
        type(model).train(model)
        seen.append(learning_rates(model))

    model.train = train_and_record
    model.learn(total_timesteps)
    return np.transpose(seen)


def test_a_learning_rate_schedule_reaches_both_parameter_groups():
    actor, critic = recorded_learning_rates(learning_rate=lambda remaining: 0.25 * remaining)
    np.testing.assert_allclose(actor, [0.1875, 0.125, 0.0625, 0.0])
    np.testing.assert_allclose(critic, actor)


def test_a_critic_learning_rate_schedule_reaches_the_critic_alone():
    actor, critic = recorded_learning_rates(learning_rate=0.5, critic_learning_rate=lambda remaining: 0.25 * remaining)
    np.testing.assert_allclose(actor, [0.5] * 4)
    np.testing.assert_allclose(critic, [0.1875, 0.125, 0.0625, 0.0])
    actor, critic = recorded_learning_rates(learning_rate=lambda remaining: 0.25 * remaining, critic_learning_rate=0.5)
    np.testing.assert_allclose(actor, [0.1875, 0.125, 0.0625, 0.0])
    np.testing.assert_allclose(critic, [0.5] * 4)


@with_and_without_critic
def test_no_schedule_is_asked_for_what_comes_after_its_end(formulation):
    # The third rollout of 2 environments x 10 steps, or of somewhat more with whole episodes, ends after 50 steps
    both = recorded_learning_rates(
        50, learning_rate=lambda remaining: 0.25 * remaining, critic_learning_rate=lambda remaining: remaining, **formulation
    )
    np.testing.assert_array_equal(both[:, -1], 0.0)
    assert both[:, :-1].min() > 0
    progress = []
    callback = Spy(lambda spy: progress.append(spy.model._current_progress_remaining), "rollout_start")
    model = small_model(**formulation).learn(50, callback=callback)
    assert [*progress, model._current_progress_remaining][-1] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.125])
@pytest.mark.parametrize("keyword", ["learning_rate", "critic_learning_rate"])
def test_a_schedule_that_gives_a_bad_learning_rate_is_refused_before_the_step(keyword, bad):
    model = small_model(**{keyword: lambda remaining: 0.125 if remaining > 0.5 else bad})
    before, optimizer = weights(model), copy.deepcopy(model.policy.optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{keyword}\(0\.5\)={bad} is not allowed; it must be a number >= 0"):
        model.learn(40)
    assert model._n_updates == 0
    assert changed(before, weights(model)) == set()
    assert model.policy.optimizer.state_dict() == optimizer
    with pytest.raises(ValueError, match=rf"{keyword}\(1\)={bad} is not allowed"):
        small_model(**{keyword: lambda _: bad})


def test_the_entropy_coefficient_may_be_a_schedule_or_be_changed_by_a_callback():
    def coefficient(remaining):
        return 0.5 * remaining - 0.25

    recorded = []

    def change(spy):
        recorded.append(spy.model.logger.name_to_value.get("train/ent_coef"))
        # 2 environments x 10 steps, of 80
        spy.model.ent_coef = coefficient(1 - spy.model.num_timesteps / 80)

    by_schedule = small_model(ent_coef=coefficient)
    by_schedule.learn(
        80, callback=Spy(lambda spy: recorded.append(spy.model.logger.name_to_value["train/ent_coef"]), "rollout_start")
    )
    assert_same_weights(by_schedule, small_model().learn(80, callback=Spy(change, "rollout_end")))
    assert by_schedule.ent_coef is coefficient
    assert recorded == [0.0, 0.125, 0.0, -0.125, *[None] * 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_entropy_coefficient_that_is_not_finite_is_refused_before_the_step(bad):
    model = small_model(ent_coef=lambda remaining: 0.125 if remaining > 0.5 else bad)
    with pytest.raises(ValueError, match=rf"ent_coef\(0\.5\)={bad} is not allowed"):
        model.learn(40)
    assert model._n_updates == 0


def test_each_learning_rate_scales_the_steps_of_its_own_parameters():
    both = small_model(policy_kwargs=SGD, learning_rate=0.5, critic_learning_rate=0.25).learn(20)
    no_critic = small_model(policy_kwargs=SGD, learning_rate=0.5, critic_learning_rate=0.0).learn(20)
    no_actor = small_model(policy_kwargs=SGD, learning_rate=0.0, critic_learning_rate=0.25).learn(20)
    start = small_model(policy_kwargs=SGD)
    assert_same_weights(both, no_critic, ACTOR)
    assert_same_weights(both, no_actor, CRITIC)
    assert_same_weights(start, no_critic, CRITIC)
    assert_same_weights(start, no_actor, ACTOR)
    assert changed(weights(start), weights(both)) == set(weights(start))
