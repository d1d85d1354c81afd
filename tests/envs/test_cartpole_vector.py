"""Many cart-poles in one array are, bit by bit, as many separate ones."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from helpers.cartpole import (
    HANGING,
    UPRIGHT,
    V0,
    assert_same_steps,
    balancing,
    each_id,
    each_mode,
    full_force,
    make,
    separate,
    swinging,
)

from sb3_vpg.envs.cartpole import SameStepCartPoleVectorEnv
from sb3_vpg.envs.cartpole_swingup import CartPoleSwingUpVectorEnv


@pytest.mark.parametrize("options", [None, {"mean": [1.0, 0, 3.0, 0], "std": 0.1}], ids=["default start", "own start"])
@pytest.mark.parametrize("seed", [7, [5, 3, 1, 2]], ids=["int", "list"])
@each_mode
@each_id
def test_swing_ups_in_one_array_are_those_of_separate_ones(env_id, mode, seed, options):
    many, separately = make(env_id, 4, autoreset_mode=mode), separate(env_id, 4, mode)
    assert_same_steps(many, separately, swinging(0), 600, seed=seed, options=options)


@each_mode
def test_a_time_limit_in_the_step_that_leaves_the_track_counts_too(mode):
    # Full force drives the cart off the track in the 69th step
    many, separately = make(V0, 2, autoreset_mode=mode, max_episode_steps=69), separate(V0, 2, mode, max_episode_steps=69)
    assert_same_steps(many, separately, lambda _: full_force(many), 70, seed=0, options=HANGING)


@each_mode
def test_a_second_reset_begins_anew_and_reseeds_whom_it_names(mode):
    many, separately = make(V0, 3, autoreset_mode=mode, max_episode_steps=5), separate(V0, 3, mode, max_episode_steps=5)
    for n_steps, seed in ((5, 1), (2, None), (3, [None, 8, None])):
        np.testing.assert_array_equal(*(envs.reset(seed=seed)[0] for envs in (many, separately)))
        for _ in range(n_steps):
            np.testing.assert_array_equal(*(envs.step(full_force(many))[0] for envs in (many, separately)))


def test_without_a_time_limit_episodes_go_on():
    envs = CartPoleSwingUpVectorEnv(2, max_episode_steps=None)
    envs.reset(options=UPRIGHT)
    for _ in range(600):
        _, _, terminated, truncated, _ = envs.step(full_force(envs, 0))
        assert not (terminated | truncated).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs=0 is not allowed"),
        ({"num_envs": -1}, "num_envs=-1 is not allowed"),
        ({"max_episode_steps": 0}, "max_episode_steps=0 is not allowed"),
        ({"render_mode": "human"}, "render_mode='human' is not allowed"),
        ({"autoreset_mode": AutoresetMode.DISABLED}, "DISABLED is not supported; allowed: NEXT_STEP, SAME_STEP"),
        ({"autoreset_mode": "sometimes"}, "'sometimes' is not a valid AutoresetMode"),
    ],
)
def test_a_vectorised_form_that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CartPoleSwingUpVectorEnv(**kwargs)


@pytest.mark.parametrize("make_many", [CartPoleSwingUpVectorEnv, SameStepCartPoleVectorEnv])
@pytest.mark.parametrize("seed", [[1, 2], [1, 2, 3, 4], []], ids=len)
def test_a_list_of_seeds_has_one_for_each_environment(make_many, seed):
    envs = make_many(3)
    with pytest.raises(ValueError, match=f"one seed for each of the 3 environments, not {len(seed)}"):
        envs.reset(seed=seed)


@each_mode
def test_actions_are_left_alone(mode):
    envs = make(V0, 2, autoreset_mode=mode, max_episode_steps=2)
    envs.reset(seed=0)
    # float64, which needs no conversion
    actions = full_force(envs, 0.5, dtype=np.float64)
    for _ in range(4):
        envs.step(actions)
        np.testing.assert_array_equal(actions, 0.5)


@pytest.mark.parametrize("seed", [7, [5, 3, 1, 2]], ids=["int", "list"])
def test_cartpoles_in_one_array_are_those_of_separate_ones(seed):
    many, separately = SameStepCartPoleVectorEnv(4), separate("CartPole-v1", 4, AutoresetMode.SAME_STEP)
    assert_same_steps(many, separately, balancing(0), 1100, seed=seed)


def test_options_of_cartpoles_in_one_array_are_for_one_reset():
    many, separately = SameStepCartPoleVectorEnv(4, 20), separate("CartPole-v1", 4, "SameStep", max_episode_steps=20)
    assert_same_steps(many, separately, balancing(0), 60, seed=0, options={"low": -0.2, "high": 0.2})


def test_a_reset_step_does_not_terminate():
    envs = CartPoleSwingUpVectorEnv(1, max_episode_steps=2, autoreset_mode=AutoresetMode.NEXT_STEP)
    # Beside the track
    envs.set_start_std([0.0, 0.0, 0.0, 0.0])
    envs.reset(seed=0)
    for _ in range(2):
        *_, truncated, _ = envs.step(np.zeros((1, 1), dtype=np.float32))
    assert truncated.all()
    envs.set_start_std([100.0, 0.0, 0.0, 0.0])
    observations, rewards, terminated, truncated, _ = envs.step(np.zeros((1, 1), dtype=np.float32))
    assert abs(observations[0, 0]) > 2.4
    assert (rewards[0], terminated[0], truncated[0]) == (0, False, False)
