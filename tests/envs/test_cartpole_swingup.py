"""The swing-up as an environment: registration, starts, seeds, options, copies, bad input."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from helpers.cartpole import (
    HANGING,
    UPRIGHT,
    V0,
    V1,
    assert_same_steps,
    each_id,
    each_mode,
    full_force,
    make,
    one_and_many,
    separate,
    swinging,
    transcript,
)
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_vpg.envs import register_environments
from sb3_vpg.envs.cartpole import SameStepCartPoleVectorEnv
from sb3_vpg.envs.cartpole_swingup import CartPoleSwingUpEnv, CartPoleSwingUpVectorEnv

# ---------------------------------------------------------------------------------------------------------------
# Registration and checkers
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry():
    """gymnasium's registry, as it was again after the test."""
    before = dict(gym.registry)
    yield gym.registry
    gym.registry.clear()
    gym.registry.update(before)


# The observation space is unbounded, as tutorials know it
@pytest.mark.filterwarnings("ignore:.*A Box observation space (minimum|maximum) value is -?infinity")
@each_id
def test_gymnasium_has_no_complaint(env_id, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    check_env(gym.make(env_id).unwrapped)


@each_id
def test_stable_baselines3_has_no_complaint(env_id):
    sb3_check_env(gym.make(env_id, render_mode="rgb_array"), skip_render_check=False)


@pytest.mark.parametrize(("env_id", "threshold", "hanging"), [(V0, 300, -500), (V1, 400, 0)])
def test_an_episode_of_500_steps_is_worth_500_upright_and_nothing_hanging(env_id, threshold, hanging):
    env = gym.make(env_id)
    assert (env.spec.max_episode_steps, env.spec.reward_threshold) == (500, threshold)
    for options, expected in ((UPRIGHT, 500), (HANGING, hanging)):
        env.reset(options=options)
        rewards, truncated = [], False
        while not truncated:
            _, reward, terminated, truncated, _ = env.step(full_force(env, 0))
            assert not terminated
            rewards.append(reward)
        assert len(rewards) == 500
        assert sum(rewards) == pytest.approx(expected)


@each_id
def test_make_vec_makes_the_vectorised_form(env_id):
    envs = gym.make_vec(env_id, num_envs=2)
    assert type(envs) is CartPoleSwingUpVectorEnv
    assert (envs.max_episode_steps, envs.reward_in_unit_interval) == (500, env_id == V1)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert repr(envs) == f"CartPoleSwingUpVectorEnv({env_id}, num_envs=2)"
    one = gym.make(env_id)
    assert envs.single_observation_space == one.observation_space
    assert envs.single_action_space == one.action_space
    assert gym.make_vec(env_id, num_envs=2, vectorization_mode="sync").envs[0].unwrapped.__class__ is CartPoleSwingUpEnv


def test_registering_again_changes_nothing(registry):
    before = dict(registry)
    register_environments()
    assert registry.keys() == before.keys()
    assert all(registry[env_id] is spec for env_id, spec in before.items())


# Both ids are of equal rank. Warnings are errors in all tests
@each_id
def test_no_version_is_called_out_of_date(env_id):
    for env in (gym.make(env_id), gym.make(f"sb3_vpg:{env_id}"), make(env_id, 2)):
        assert env.spec.id == gym.spec(env_id).id == env_id
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `CartPoleSwingUp-v"):
        gym.make("CartPoleSwingUp")
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `CartPoleSwingUp-v"):
        gym.make("CartPoleSwingUp-v7")


@pytest.mark.parametrize("entry_point", ["gymnasium.envs.classic_control:CartPoleEnv", lambda **kwargs: None])
def test_an_id_that_is_taken_stays_with_who_took_it(registry, entry_point):
    registry[V0] = gym.envs.registration.EnvSpec(V0, entry_point)
    with pytest.warns(UserWarning, match=rf"{V0} is already registered .* registered as sb3_vpg/{V0}\."):
        register_environments()
    assert registry[V0].entry_point is entry_point
    env = gym.make(f"sb3_vpg/{V0}")
    assert isinstance(env.unwrapped, CartPoleSwingUpEnv)
    assert env.spec.reward_threshold == registry[f"sb3_vpg/{V0}"].reward_threshold == 300
    assert f"sb3_vpg/{V1}" not in registry


# ---------------------------------------------------------------------------------------------------------------
# Starts, seeds, copies
# ---------------------------------------------------------------------------------------------------------------


@one_and_many
def test_the_seed_determines_everything(num_envs):
    def play(**reset):
        env = make(V0, num_envs)
        env.reset(**reset)
        return transcript(env, 200)

    np.testing.assert_array_equal(play(seed=3), play(seed=3))
    assert not np.array_equal(play(seed=3), play(seed=4))
    assert not np.array_equal(play(), play())


def test_starts_are_normal_around_hanging():
    envs = make(V0, 10_000)
    envs.reset(seed=0)
    # Five standard errors
    np.testing.assert_allclose(envs.state.mean(axis=1), [0, 0, np.pi, 0], rtol=0, atol=5 * 0.002)
    np.testing.assert_allclose(envs.state.std(axis=1), 0.2, atol=5 * 0.0015)
    np.testing.assert_allclose(np.corrcoef(envs.state), np.eye(4), atol=5 * 0.01)


@one_and_many
def test_options_say_where_the_next_episode_starts(num_envs):
    env = make(V0, num_envs)
    start = [0.5, -1.0, 2.0, 3.0]
    observations, _ = env.reset(options={"mean": start, "std": 0})
    expected = [0.5, -1.0, np.cos(2.0), np.sin(2.0), 3.0]
    np.testing.assert_array_equal(np.atleast_2d(observations), np.tile(np.float32(expected), (num_envs or 1, 1)))
    assert observations.dtype == np.float32
    env.reset(options={"std": [0, 0, 0, 1]})
    np.testing.assert_array_equal(env.unwrapped.state[:3].T.reshape(-1, 3), [[0, 0, np.pi]] * (num_envs or 1))
    # None of it lasts
    env.reset(seed=0)
    expected = env.unwrapped.state
    env.reset(seed=0, options={})
    np.testing.assert_array_equal(env.unwrapped.state, expected)
    assert (np.abs(expected.T - [0, 0, np.pi, 0]) < 1).all()


@each_mode
def test_starts_spread_as_they_are_told_to(mode):
    many, separately = make(V0, 4, autoreset_mode=mode), separate(V0, 4, mode)
    many.set_start_std([0.1, 0.2, 3.0, 0.4])
    separately.call("set_start_std", [0.1, 0.2, 3.0, 0.4])
    assert_same_steps(many, separately, swinging(0), 600, seed=0)

    envs = make(V0, 10_000)
    envs.set_start_std([0.1, 0.2, 3.0, 0.4])
    envs.reset(seed=0)
    np.testing.assert_allclose(envs.unwrapped.state.mean(axis=1), [0, 0, np.pi, 0], atol=0.1)
    np.testing.assert_allclose(envs.unwrapped.state.std(axis=1), [0.1, 0.2, 3.0, 0.4], rtol=0.05)
    envs.reset(options=UPRIGHT)
    np.testing.assert_array_equal(envs.unwrapped.state, 0)


@one_and_many
def test_a_spread_is_copied(num_envs):
    env, std = make(V0, num_envs).unwrapped, np.zeros(4)
    env.set_start_std(std)
    std[:] = 9
    np.testing.assert_array_equal(env._start_std, 0)


@pytest.mark.parametrize("std", [-1.0, np.nan, [1, 2], "wide"])
@one_and_many
def test_a_spread_that_is_none_is_refused(num_envs, std):
    env = make(V0, num_envs).unwrapped
    with pytest.raises(ValueError, match="start_std="):
        env.set_start_std(std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"men": 0.0}, r"Unknown options of reset: \['men'\]; allowed: 'mean', 'std'"),
        ({1: 0.0, "mean": 0.0}, r"Unknown options of reset: \['1'\]"),
        ({"mean": [0.0, 0.0]}, "'mean'.*neither one number nor four"),
        ({"mean": "up"}, "'mean'.*neither one number nor four"),
        ({"std": np.zeros((1, 4))}, "'std'.*neither one number nor four"),
        ({"mean": np.nan}, "'mean'.*must be finite$"),
        ({"std": [0, 0, np.inf, 0]}, "'std'.*must be finite and not negative"),
        ({"std": [0.1, 0.1, 0.1, -0.1]}, "'std'.*must be finite and not negative"),
    ],
)
@one_and_many
def test_options_that_make_no_sense_are_refused(num_envs, options, message):
    env = make(V0, num_envs)
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    "make_env",
    [lambda: make(V0), lambda: make(V0, 3), lambda: SameStepCartPoleVectorEnv(3)],
    ids=["one", "many", "CartPoles"],
)
def test_a_copy_goes_on_as_the_original(make_env, copy_of):
    env = make_env()
    env.reset(seed=0)
    transcript(env, 40)
    twin = copy_of(env)
    expected = transcript(env, 200)
    np.testing.assert_array_equal(transcript(twin, 200), expected)
    np.testing.assert_array_equal(twin.reset()[0], env.reset()[0])


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_envs", "action", "message"),
    [
        (None, 0.0, r"shape \(1,\), not \(\)"),
        (None, [0.0, 0.0], r"shape \(1,\), not \(2,\)"),
        (None, [[0.0]], r"shape \(1,\), not \(1, 1\)"),
        (None, [np.nan], r"The action is not finite: \[nan\]"),
        (None, [-np.inf], r"The action is not finite: \[-inf\]"),
        (3, [0.0, 0.0, 0.0], r"shape \(3, 1\), not \(3,\)"),
        (3, [[0.0], [0.0]], r"shape \(3, 1\), not \(2, 1\)"),
        (3, [[0.0], [np.nan], [0.0]], r"The action of environment 1 is not finite: \[nan\]"),
        (3, [[0.0], [0.0], [np.inf]], r"The action of environment 2 is not finite: \[inf\]"),
    ],
)
def test_a_bad_action_is_refused_and_moves_nothing(num_envs, action, message):
    env = make(V0, num_envs).unwrapped
    env.reset(seed=0)
    before = env.state.copy()
    with pytest.raises(ValueError, match=message):
        env.step(np.array(action, dtype=np.float32))
    np.testing.assert_array_equal(env.state, before)


@pytest.mark.parametrize("wrapped", [True, False])
@one_and_many
def test_nothing_works_before_the_first_reset(num_envs, wrapped):
    env = make(V0, num_envs, render_mode="rgb_array")
    env = env if wrapped else env.unwrapped
    with pytest.raises(ResetNeeded):
        env.step(full_force(env))
    with pytest.raises(ResetNeeded):
        env.render()
