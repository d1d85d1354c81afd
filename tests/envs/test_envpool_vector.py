"""EnvPoolVectorEnv is a vectorized environment of gymnasium, whose arrays fit the spaces that it is given."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from sb3_vpg.envs.envpool_vector import (
    EnvPoolVectorEnv,
    envpool_options,
    has_text,
    make_vector_env,
    same_layout,
    single_observation,
    to_space,
)

pytest.importorskip("envpool")

CARTPOLE, PENDULUM, GRID = "CartPole-v1", "Pendulum-v1", "MiniGrid-DoorKey-5x5-v0"
BOX = spaces.Box(-1, 1, (3,), np.float32)
BYTES, TEXT = spaces.Box(0, 255, (8,), np.uint8), spaces.Text(8)


def test_it_is_a_vectorized_environment_with_same_step_autoreset():
    env = EnvPoolVectorEnv(CARTPOLE, 3, num_threads=1, time_limit=4)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.observation_space.shape == (3, 4)
    observations, infos = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert infos == {}
    for t in range(8):
        given, _, terminated, truncated, infos = env.step(np.array([0, 1, 0]))
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (t % 4 == 3)
        if t % 4 == 3:
            assert infos["_final_obs"].all()
            # Last observations are where the poles have moved to, first ones are near the middle
            assert all(np.abs(infos["final_obs"][i]).max() > 0.3 for i in range(3))
            assert np.abs(given).max() <= 0.05
        else:
            assert infos == {}


def test_the_time_limit_is_envpools_own_if_none_is_given():
    env = EnvPoolVectorEnv(PENDULUM, 1, max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros((1, 1)))[3].item() for _ in range(6)] == [False, False, True] * 2


def test_a_step_that_terminates_at_envpools_own_limit_is_told_to_terminate():
    ends = []
    for limit in ({}, {"time_limit": 10, "max_episode_steps": 10}):
        env = EnvPoolVectorEnv(CARTPOLE, 8, **limit)
        env.reset(seed=0)
        ends.append([env.step(np.ones(8, dtype=int))[2] for _ in range(10)])
    np.testing.assert_array_equal(*ends)
    # Some poles fall in that step
    assert ends[0][9].any()


def test_only_the_infos_that_are_asked_for_are_returned():
    env = EnvPoolVectorEnv("Hopper-v5", 2, time_limit=2)
    env.return_infos(["x_position"])
    env.reset(seed=0)
    actions = np.ones((2, 3))
    *_, infos = env.step(actions)
    np.testing.assert_array_equal(infos["x_position"], env.last_infos["x_position"])
    assert infos.keys() == {"x_position"}
    *_, infos = env.step(actions)
    assert infos["final_info"].keys() == {"x_position"}
    assert "x_velocity" in env.last_infos
    # Of environments that go on, the infos are there in each step
    env.reset(seed=0)
    env._steps[0] = 1
    *_, infos = env.step(actions)
    assert infos["_final_info"].tolist() == [True, False]
    assert infos["_x_position"].tolist() == [False, True]
    assert infos["x_position"][1] == env.last_infos["x_position"][1]
    with pytest.raises(ValueError, match=r"Hopper-v5 has no info 'color'"):
        env.return_infos(["color"])


def test_a_reset_without_a_seed_continues_the_random_numbers():
    first, second = (EnvPoolVectorEnv(CARTPOLE, 2) for _ in range(2))
    resets = [[env.reset(seed=1)[0], env.reset()[0], env.reset()[0]] for env in (first, second)]
    np.testing.assert_array_equal(*resets)
    assert len({tuple(observations.ravel()) for observations in resets[0]}) == 3


def test_with_lives_the_time_limit_is_that_of_the_game():
    env = EnvPoolVectorEnv("Breakout-v5", 1, time_limit=40, episodic_life=True, img_height=8, img_width=8)
    env.reset(seed=0)
    ends = {}
    for t in range(40):
        *_, (terminated,), (truncated,), _ = env.step(np.array([0]))
        if terminated or truncated:
            ends[t] = bool(truncated)
    # A life is lost before
    assert list(ends.values()) == [False, True]
    assert 39 in ends


def test_spaces_and_time_limit_of_an_id_are_those_of_gymnasium():
    env = make_vector_env("Hopper-v5", 2)
    assert env.single_observation_space == gym.make("Hopper-v5").observation_space
    assert (env.time_limit, env.spec.id) == (1000, "Hopper-v5")
    # A tuple, in gymnasium
    env = make_vector_env("Blackjack-v1", 2)
    assert env.single_observation_space.shape == (3,)
    assert env.reset(seed=0)[0].shape == (2, 3)


def test_texts_are_bytes_to_an_id_of_its_own():
    gym.register_envs(pytest.importorskip("minigrid"))
    env = make_vector_env(GRID, 2)
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    assert bytes(observations["mission"][1]).rstrip(b"\0") == b"use the key to open the door and then get to the goal"


def test_spaces_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"CartPole-v1 has other observations than the given environment: .* instead of Box"):
        EnvPoolVectorEnv(CARTPOLE, 2, observation_space=BOX)
    with pytest.raises(ValueError, match=r"CartPole-v1 has other actions than the given environment: .* of Discrete\(3\)"):
        EnvPoolVectorEnv(CARTPOLE, 2, action_space=spaces.Discrete(3))


@pytest.mark.parametrize(
    ("own", "given", "fits"),
    [
        (BOX, spaces.Box(-1, 1, (3,), np.float64), True),
        (BOX, spaces.Box(-1, 1, (1, 3), np.float32), True),
        (BOX, spaces.Box(-1, 1, (4,), np.float32), False),
        (spaces.Box(-1, 1, (3, 2)), spaces.Box(-1, 1, (2, 3)), False),
        (BOX, spaces.Discrete(3), False),
        (spaces.Discrete(3), spaces.Discrete(3), True),
        (spaces.Discrete(3), spaces.Discrete(4), False),
        (spaces.Discrete(3), spaces.Discrete(3, start=1), False),
        (spaces.Discrete(3), BOX, False),
        (BOX, spaces.Tuple([BOX]), False),
        (BYTES, TEXT, True),
        (BOX, TEXT, False),
        (spaces.Dict(a=BOX, b=BYTES), spaces.Dict(b=TEXT), True),
        (spaces.Dict(a=BOX), spaces.Dict(a=BOX, b=BOX), False),
        (spaces.Dict(a=BOX), BOX, False),
        (BOX, spaces.Dict(a=BOX), False),
    ],
)
def test_a_layout_fits_by_a_change_of_dtype_and_of_axes_of_length_one(own, given, fits):
    assert same_layout(own, given) is fits


def test_arrays_become_observations():
    space = spaces.Dict(image=spaces.Box(0, 1, (2, 1), np.float64), index=spaces.Discrete(5), text=TEXT)
    assert has_text(space)
    assert not has_text(spaces.Dict(image=space["image"]))
    words = np.frombuffer(b"red\0\0\0\0\0blue key", np.uint8).reshape(2, 8)
    arrays = {"image": np.array([[0, 1], [1, 0]], np.float32), "index": np.array([3, 4], np.int32), "text": words, "more": 0}
    converted = to_space(space, arrays)
    assert converted.keys() == space.spaces.keys()
    assert (converted["image"].dtype, converted["image"].shape, converted["index"].dtype) == (np.float64, (2, 2, 1), np.int64)
    observation = single_observation(space, converted, 1)
    assert observation["text"] == "blue key"
    assert observation["index"] == 4
    np.testing.assert_array_equal(observation["image"], [[1], [0]])
    assert single_observation(space, converted, 0)["text"] == "red"


def test_options_that_are_set_elsewhere_are_not_listed():
    options = envpool_options("Pong-v5")
    assert (options["stack_num"], options["frame_skip"]) == (4, 4)
    assert not {"num_envs", "batch_size", "num_threads", "seed", "env_seed"} & options.keys()
