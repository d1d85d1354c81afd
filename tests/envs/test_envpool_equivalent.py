"""Wrappers and keyword arguments of gymnasium have the same effect in EnvPool, or an error names what it lacks."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import (
    AddRenderObservation,
    ClipAction,
    FlattenObservation,
    NormalizeObservation,
    RecordEpisodeStatistics,
    TimeLimit,
    TransformObservation,
    TransformReward,
)
from stable_baselines3.common.atari_wrappers import AtariWrapper, ClipRewardEnv, WarpFrame
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_vpg.envs import EnvPoolVecEnv
from sb3_vpg.envs.envpool_equivalent import find_equivalent

pytest.importorskip("envpool")
ale_py = pytest.importorskip("ale_py")
minigrid = pytest.importorskip("minigrid")
pytest.importorskip("mujoco")
wrappers = pytest.importorskip("minigrid.wrappers")

HOPPER, PENDULUM, INVADERS, GRID = "Hopper-v5", "Pendulum-v1", "SpaceInvadersNoFrameskip-v4", "MiniGrid-Empty-5x5-v0"


@pytest.fixture(autouse=True, scope="module")
def registered():
    gym.register_envs(ale_py)
    gym.register_envs(minigrid)


def make(env_id, n_envs=2, cls=EnvPoolVecEnv, wrapper_class=None, seed=0, **env_kwargs):
    return make_vec_env(env_id, n_envs, seed=seed, vec_env_cls=cls, wrapper_class=wrapper_class, env_kwargs=env_kwargs)


def play(env, actions):
    return [(env.reset(),), *(env.step(action) for action in actions)]


def random_actions(env, n_steps):
    rng = np.random.default_rng(0)
    return rng.integers(env.action_space.n, size=(n_steps, env.num_envs))


# ---------------------------------------------------------------------------------------------------------------
# Keyword arguments
# ---------------------------------------------------------------------------------------------------------------


def test_a_weight_of_the_reward_is_passed_on():
    action = np.array([[0.5, -1.0, 0.25]] * 2, dtype=np.float32)
    cheap, dear = (play(make(HOPPER, ctrl_cost_weight=weight), [action])[1][1] for weight in (0.0, 2.0))
    np.testing.assert_allclose(cheap - dear, 2.0 * (action**2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("bounds", [(1.24, np.inf), (1.24, float("inf")), np.array([1.24, np.inf])])
def test_a_range_is_passed_on(bounds):
    env = make(HOPPER, healthy_z_range=bounds)
    (first,), *steps = play(env, np.zeros((60, 2, 3), dtype=np.float32))
    heights = [[first[:, 0]], *([step[0][:, 0]] for step in steps)]
    assert np.min(heights) >= 1.24
    ends = [info["terminal_observation"][0] for *_, infos in steps for info in infos if "episode" in info]
    assert len(ends) >= 2
    assert 1.1 < min(ends) <= max(ends) < 1.24


def test_both_bounds_of_a_range_are_passed_on():
    # Ants begin at a height of 0.75
    action = np.zeros((1, 2, 8), dtype=np.float32)
    dones = [play(make("Ant-v5", healthy_z_range=bounds), action)[1][2].all() for bounds in ((0.2, 0.5), (0.2, 1.0), (0.9, 2))]
    assert dones == [True, False, True]


def test_default_values_need_no_equivalent():
    env = make("FrozenLake-v1", map_name="4x4")
    assert env.vector_env.options["max_episode_steps"] > env.vector_env.time_limit == 100


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        (PENDULUM, {"g": 9.81}, "EnvPool's Pendulum-v1 has no equivalent of g=9.81; it has "),
        (HOPPER, {"xml_file": "hopper.xml"}, "EnvPool's Hopper-v5 has no equivalent of xml_file='hopper.xml'; it has "),
        ("CartPole-v1", {"sutton_barto_reward": True}, "no equivalent of sutton_barto_reward=True"),
        ("FrozenLake-v1", {"is_slippery": False}, "no equivalent of is_slippery=False"),
        (HOPPER, {"healthy_z_range": (0.7, 2.0)}, r"Hopper-v5 has no equivalent of healthy_z_range=\(0.7, 2.0\)"),
        (HOPPER, {"camera_name": "track"}, "no equivalent of camera_name='track'"),
        (PENDULUM, {"render_mode": "human"}, "no equivalent of render_mode='human'"),
        ("Blackjack-v1", {}, r"has other observations than the given environment: Box\(.* instead of Tuple\("),
        (GRID, {}, f"SB3 does not support texts in observations, as {GRID} has"),
        (GRID, {"max_steps": 7}, "no equivalent of max_steps=7"),
        ("ALE/Pong-v5", {}, "EnvPool resizes the pictures of ALE/Pong-v5: use make_atari_env"),
    ],
)
def test_what_envpool_lacks_is_refused_by_name(env_id, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(env_id, **kwargs)


@pytest.mark.parametrize("limit", [-1, 5, 300])
def test_the_time_limit_is_that_of_the_environment(limit):
    env = make(PENDULUM, max_episode_steps=limit)
    steps = play(env, np.zeros((301, 2, 1), dtype=np.float32))
    lengths = [infos[0]["episode"]["l"] for *_, infos in steps[1:] if "episode" in infos[0]]
    assert lengths == ([] if limit == -1 else [limit] * (301 // limit))


def test_missions_have_time_limits_of_their_own():
    mission = "BabyAI-GoToLocal-v0"
    env = make(mission, 1, wrapper_class=wrappers.ImgObsWrapper)
    # Turns left all the time
    *_, (_, _, done, infos) = play(env, np.zeros((64, 1), dtype=int))
    assert done.all()
    assert (infos[0]["episode"]["l"], infos[0]["TimeLimit.truncated"]) == (64, True)
    with pytest.raises(ValueError, match=f"no equivalent of a TimeLimit around {mission}, whose missions have their own"):
        make(mission, 1, wrapper_class=wrappers.ImgObsWrapper, max_episode_steps=5)


def test_of_two_time_limits_the_shorter_one_holds():
    env = EnvPoolVecEnv([lambda: Monitor(TimeLimit(gym.make("CartPole-v1"), 4))])
    assert [done.item() for _, _, done, _ in play(env, [[0]] * 5)[1:]] == [False, False, False, True, False]


# ---------------------------------------------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------------------------------------------


class OwnMonitor(Monitor):
    """May do anything."""


class InAHelper(gym.ObservationWrapper):
    """Reads the state of the environment, as the two below."""

    def state(self):
        return self.unwrapped.state

    def observation(self, observation):
        return observation + self.state()[0]


class InAFunction(gym.ObservationWrapper):
    def observation(self, observation):
        return observation + (lambda: self.unwrapped.state)()[0]


class ByName(gym.ObservationWrapper):
    def observation(self, observation):
        return observation + self.get_wrapper_attr("state")[0]


def in_a_closure(env):
    inner = env.unwrapped
    return TransformObservation(env, lambda observation: observation + inner.state[0], env.observation_space)


@pytest.mark.parametrize(
    ("env_id", "wrap"),
    [
        *((PENDULUM, wrap) for wrap in (InAHelper, InAFunction, ByName, in_a_closure)),
        (PENDULUM, RecordEpisodeStatistics),
        (PENDULUM, AddRenderObservation),
        (PENDULUM, OwnMonitor),
        (PENDULUM, lambda env: ClipAction(env)),
        (PENDULUM, lambda env: TransformReward(env, abs)),
        # These read the state of the environment
        (GRID, wrappers.FullyObsWrapper),
        (GRID, wrappers.RGBImgPartialObsWrapper),
        (GRID, wrappers.ViewSizeWrapper),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_other_wrappers_are_refused_by_name(env_id, wrap):
    env = wrap(gym.make(env_id, render_mode="rgb_array"))
    with pytest.raises(ValueError, match=f"no equivalent of the wrapper {type(env).__name__} around {env_id}"):
        EnvPoolVecEnv([lambda: env])


class LookedUp(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.numbers = {i: 2 * i for i in range(16)}
        self.observation_space = gym.spaces.Discrete(32)

    def observation(self, observation):
        return self.numbers[observation]


def test_wrappers_take_discrete_observations_as_numbers():
    env = make("FrozenLake-v1", wrapper_class=LookedUp)
    assert (env.reset() == 0).all()
    env.step(np.ones(2, dtype=int))


def test_wrappers_that_know_the_spaces_only_are_applied():
    env = EnvPoolVecEnv([lambda: FlattenObservation(gym.make(PENDULUM))] * 2)
    assert env.reset().shape == (2, 3)


def test_an_environment_that_was_changed_is_refused():
    def changed():
        env = gym.make(PENDULUM)
        env.unwrapped.max_torque = 1.0
        return env

    with pytest.raises(ValueError, match=r"changed after gym.make\(\): max_torque=1.0 instead of 2.0"):
        EnvPoolVecEnv([changed])


def test_a_monitor_with_keywords_of_a_reset_is_refused():
    with pytest.raises(ValueError, match=r"no equivalent of Monitor\(reset_keywords=\.\.\.\)"):
        EnvPoolVecEnv([lambda: Monitor(gym.make(PENDULUM), reset_keywords=("a",))])


@pytest.mark.parametrize(
    "others",
    [
        [{}, {"max_episode_steps": 5}],
        [{"max_episode_steps": 4}, {"max_episode_steps": 5}],
        [{}, {"g": 9.81}],
        [{}, {"id": "CartPole-v1"}],
    ],
    ids=str,
)
def test_different_environments_are_refused(others):
    with pytest.raises(ValueError, match="EnvPool cannot replace different environments"):
        EnvPoolVecEnv([lambda kwargs=kwargs: gym.make(**{"id": PENDULUM, **kwargs}) for kwargs in others])


def test_different_wrappers_are_refused():
    with pytest.raises(ValueError, match="EnvPool cannot replace different environments"):
        EnvPoolVecEnv([lambda: FlattenObservation(gym.make(PENDULUM)), lambda: gym.make(PENDULUM)])


@pytest.mark.parametrize("kwargs", [{}, {"max_episode_steps": 30}, {"size": 6}], ids=str)
@pytest.mark.parametrize("name", ["ImgObsWrapper", "FlatObsWrapper"])
def test_grids_are_bit_by_bit_those_of_minigrid(name, kwargs):
    # Nothing is random here
    env, expected = (
        make(GRID, cls=cls, wrapper_class=getattr(wrappers, name), **kwargs) for cls in (EnvPoolVecEnv, DummyVecEnv)
    )
    assert type(env) is EnvPoolVecEnv
    assert env.observation_space == expected.observation_space
    actions = random_actions(env, 260)
    # To the goal, again and again
    straight = [2] * (kwargs.get("size", 5) - 3)
    actions[:, 1] = np.resize([*straight, 1, *straight], 260)
    ends = []
    for step, other in zip(play(env, actions), play(expected, actions)):
        for values, expected_values in zip(step[:3], other[:3]):
            np.testing.assert_array_equal(values, expected_values, strict=True)
        for info, expected_info in zip(*(s[3] if len(s) > 1 else () for s in (step, other))):
            for one in (info, expected_info):
                one["episode"] = {**one.get("episode", {}), "t": 0}
            np.testing.assert_equal(info, expected_info)
            ends += [info["TimeLimit.truncated"]] * ("terminal_observation" in info)
    assert set(ends) == {True, False}


def test_observation_wrappers_are_applied_from_the_innermost_to_the_outermost():
    def wrap(env):
        doubled = TransformObservation(env, lambda observation: 2 * observation, env.observation_space)
        return TransformObservation(doubled, lambda observation: observation[:2] + 1, gym.spaces.Box(-9, 9, (2,), np.float32))

    env, plain = make(PENDULUM, wrapper_class=wrap, max_episode_steps=4), make(PENDULUM, max_episode_steps=4)
    for step, plain_step in zip(*(play(one, np.ones((5, 2, 1), dtype=np.float32)) for one in (env, plain))):
        np.testing.assert_array_equal(step[0], 2 * plain_step[0][:, :2] + 1, strict=True)
        if len(step) > 1 and step[2].any():
            terminal, plain_terminal = (s[3][1]["terminal_observation"] for s in (step, plain_step))
            np.testing.assert_array_equal(terminal, 2 * plain_terminal[:2] + 1, strict=True)
            break
    else:
        pytest.fail("no episode has ended")


def test_each_environment_has_its_own_wrapper():
    # It knows the mean of what it has seen
    env, plain = make(PENDULUM, wrapper_class=NormalizeObservation), make(PENDULUM)
    steps, plain_steps = (play(one, np.ones((5, 2, 1), dtype=np.float32)) for one in (env, plain))
    for i in range(2):
        alone = NormalizeObservation(gym.make(PENDULUM))
        for step, plain_step in zip(steps, plain_steps):
            np.testing.assert_allclose(step[0][i], alone.observation(plain_step[0][i]), rtol=1e-5)


def test_a_wrapper_that_fails_is_named():
    def fail(observation):
        raise KeyError("color")

    env = make(PENDULUM, wrapper_class=lambda env: TransformObservation(env, fail, env.observation_space))
    with pytest.raises(ValueError, match="TransformObservation cannot be applied to EnvPool's observations of Pendulum-v1"):
        env.reset()


# ---------------------------------------------------------------------------------------------------------------
# Atari
# ---------------------------------------------------------------------------------------------------------------

# What AtariWrapper(env) is in EnvPool
ATARI = {
    "noop_max": 30,
    "frame_skip": 4,
    "episodic_life": True,
    "use_fire_reset": True,
    "img_width": 84,
    "img_height": 84,
    "reward_clip": True,
    "stack_num": 1,
    "repeat_action_probability": 0.0,
    "full_action_space": False,
    "max_episode_steps": 27000,
}


@pytest.mark.parametrize(
    ("kwargs", "changed", "absent"),
    [
        ({}, {}, ()),
        ({"noop_max": 7}, {"noop_max": 7}, ()),
        ({"noop_max": 0}, {"noop_max": 1}, ()),
        ({"frame_skip": 3}, {"frame_skip": 3, "max_episode_steps": 36000}, ()),
        ({"frame_skip": 1}, {"frame_skip": 1, "max_episode_steps": 108000}, ()),
        ({"screen_size": 42}, {"img_width": 42, "img_height": 42}, ()),
        ({"terminal_on_life_loss": False}, {}, ("episodic_life",)),
        ({"clip_reward": False}, {}, ("reward_clip",)),
        ({"action_repeat_probability": 0.25}, {"repeat_action_probability": 0.25}, ()),
    ],
    ids=str,
)
def test_each_option_of_the_atari_wrapper_has_its_equivalent(kwargs, changed, absent):
    task = find_equivalent([AtariWrapper(Monitor(gym.make(INVADERS)), **kwargs)])
    assert task.task_id == "SpaceInvaders-v5"
    assert task.options == {key: value for key, value in {**ATARI, **changed}.items() if key not in absent}
    assert task.raw_game_in_monitor


@pytest.mark.parametrize(
    ("make_env", "options"),
    [
        (lambda: gym.make(INVADERS, max_episode_steps=102), {"max_episode_steps": 26}),
        (lambda: gym.make(INVADERS, full_action_space=True), {"full_action_space": True}),
        (lambda: gym.make(INVADERS, mode=2, difficulty=1), {"mode": 2, "difficulty": 1}),
        (lambda: gym.make("PongNoFrameskip-v4"), {"use_fire_reset": True}),
        # A game without a button to start it
        (lambda: gym.make("AsterixNoFrameskip-v4"), {"use_fire_reset": False}),
    ],
)
def test_keywords_of_atari_have_their_equivalent(make_env, options):
    task = find_equivalent([AtariWrapper(make_env())])
    assert {key: task.options[key] for key in options} == options
    assert not task.raw_game_in_monitor


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (
            lambda: Monitor(gym.make(INVADERS)),
            "EnvPool resizes the pictures of SpaceInvadersNoFrameskip-v4: use make_atari_env",
        ),
        (lambda: AtariWrapper(gym.make("SpaceInvaders-v4")), r"no equivalent of frameskip=\(2, 5\): use the id \.\.\.NoFrame"),
        (
            lambda: AtariWrapper(gym.make(INVADERS, continuous_action_threshold=0.3)),
            "no equivalent of continuous_action_threshold=0.3 of SpaceInvaders",
        ),
        (lambda: TimeLimit(AtariWrapper(gym.make(INVADERS)), 50), "no equivalent of a TimeLimit around SB3's Atari wrappers"),
        (lambda: FlattenObservation(WarpFrame(gym.make(INVADERS))), "no equivalent of the wrapper FlattenObservation"),
    ],
)
def test_other_atari_environments_are_refused(make_env, message):
    env = make_env()
    with pytest.raises(ValueError, match=message):
        find_equivalent([env])


def test_different_atari_wrappers_are_refused():
    envs = [AtariWrapper(gym.make(INVADERS), noop_max=noop_max) for noop_max in (30, 10)]
    with pytest.raises(ValueError, match="EnvPool cannot replace different environments"):
        find_equivalent(envs)


@pytest.fixture(scope="module")
def game(registered):
    """Steps of one environment until two games are over, and its type."""
    env = VecFrameStack(make_atari_env(INVADERS, 1, seed=0, vec_env_cls=EnvPoolVecEnv), 4)
    assert type(env.unwrapped) is EnvPoolVecEnv
    rng, steps, n_games = np.random.default_rng(0), [(env.reset(),)], 0
    while n_games < 2 and len(steps) < 5000:
        steps.append(env.step(rng.integers(env.action_space.n, size=1)))
        n_games += "episode" in steps[-1][3][0]
    assert n_games == 2
    return env, steps


def test_pictures_are_those_of_dummy_vec_env(game):
    env, ((observation,), *_) = game
    expected = VecFrameStack(make_atari_env(INVADERS, 1), 4)
    assert env.observation_space == expected.observation_space
    assert env.action_space == expected.action_space
    assert (observation.shape, observation.dtype) == ((1, 84, 84, 4), np.uint8)
    assert expected.reset().shape == observation.shape
    # After a reset, the stack has one picture
    assert (observation[..., :3] == 0).all()
    assert observation[..., 3].any()


def test_a_lost_life_ends_an_episode_but_not_the_game(game):
    _, (_, *steps) = game
    ends = [t for t, (_, _, dones, _) in enumerate(steps) if dones[0]]
    overs = [t for t, (_, _, _, infos) in enumerate(steps) if "episode" in infos[0]]
    # Three lives
    assert [ends.index(t) for t in overs] == [2, 5]
    assert all("terminal_observation" in steps[t][3][0] and not steps[t][3][0]["TimeLimit.truncated"] for t in ends)


def test_rewards_are_clipped_but_not_in_the_monitor(game):
    _, (_, *steps) = game
    rewards = np.concatenate([rewards for _, rewards, _, _ in steps])
    assert set(rewards) == {0.0, 1.0}
    returns = [infos[0]["episode"]["r"] for _, _, _, infos in steps if "episode" in infos[0]]
    # A hit scores 5 to 30
    assert sum(returns) >= 5 * rewards.sum()
    assert all(r % 5 == 0 for r in returns)


def test_lengths_are_numbers_of_frames(game):
    _, (_, *steps) = game
    overs = [t for t, (_, _, _, infos) in enumerate(steps) if "episode" in infos[0]]
    lengths = [steps[t][3][0]["episode"]["l"] for t in overs]
    assert lengths == [4 * (overs[0] + 1), 4 * (overs[1] - overs[0])]


def test_without_clipping_and_lives_the_monitor_agrees_with_the_agent():
    kwargs = {"clip_reward": False, "terminal_on_life_loss": False, "screen_size": 21}
    env = make_atari_env(INVADERS, 1, seed=0, vec_env_cls=EnvPoolVecEnv, wrapper_kwargs=kwargs)
    rng, total, n_steps, done = np.random.default_rng(0), 0.0, 0, False
    assert env.reset().shape == (1, 21, 21, 1)
    while not done:
        _, (reward,), (done,), (info,) = env.step(rng.integers(6, size=1))
        total, n_steps = total + reward, n_steps + 1
    assert (info["episode"]["r"], info["episode"]["l"]) == (total, 4 * n_steps)
    assert total > 0


def test_a_monitor_around_the_wrappers_sees_what_the_agent_sees():
    def make_env():
        return Monitor(ClipRewardEnv(AtariWrapper(gym.make(INVADERS), screen_size=21)))

    env = EnvPoolVecEnv([make_env], seed=0)
    rng, total, n_steps, done = np.random.default_rng(0), 0.0, 0, False
    env.reset()
    while not done:
        _, (reward,), (done,), (info,) = env.step(rng.integers(6, size=1))
        total, n_steps = total + reward, n_steps + 1
    assert (info["episode"]["r"], info["episode"]["l"]) == (total, n_steps)


def test_an_id_of_envpool_alone_has_its_own_defaults():
    env = EnvPoolVecEnv("Pong-v5", 2, seed=0, num_threads=1, img_height=24, img_width=20)
    assert env.observation_space.shape == (4, 24, 20)
    assert env.reset().shape == (2, 4, 24, 20)
    assert env.vector_env.spec is None
    _, rewards, _, infos = env.step([0, 5])
    assert rewards.dtype == np.float32
    assert infos == [{"TimeLimit.truncated": False}] * 2
