"""The cart-pole swing-up against recordings and mechanics, and many environments in one array against separate ones."""

import copy
import pickle
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_vpg.envs import cartpole_drawing as drawing
from sb3_vpg.envs import cartpole_physics as physics
from sb3_vpg.envs import register_environments
from sb3_vpg.envs.cartpole import SameStepCartPoleVectorEnv
from sb3_vpg.envs.cartpole_swingup import CartPoleSwingUpEnv, CartPoleSwingUpVectorEnv

DATA = Path(__file__).parent / "data"
V0, V1 = "CartPoleSwingUp-v0", "CartPoleSwingUp-v1"
HANGING, UPRIGHT = ({"mean": [0, 0, angle, 0], "std": 0} for angle in (np.pi, 0))
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
each_id = pytest.mark.parametrize("env_id", [V0, V1])
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
one_and_many = pytest.mark.parametrize("num_envs", [None, 3], ids=["one", "many"])


def make(env_id, num_envs=None, **kwargs):
    """One environment, or many in one array."""
    if num_envs is None:
        return gym.make(env_id, **kwargs)
    return gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **kwargs)


def separate(env_id, num_envs, mode, **kwargs):
    return SyncVectorEnv([lambda: gym.make(env_id, **kwargs) for _ in range(num_envs)], autoreset_mode=mode)


def full_force(env, share=1.0, dtype=None):
    """An action: to the right in each environment."""
    return np.full(env.action_space.shape, share, dtype=dtype or env.action_space.dtype)


def transcript(env, n_steps):
    """All that an environment, or many, gives while driven off the track again and again."""
    rows = []
    for _ in range(n_steps):
        observation, reward, terminated, truncated, _ = env.step(full_force(env))
        rows += [observation, reward, terminated, truncated]
        if isinstance(env, gym.Env) and (terminated or truncated):
            rows.append(env.reset()[0])
    return np.concatenate([np.ravel(row) for row in rows])


def random_states(n, seed=0):
    return np.random.default_rng(seed).normal(size=(4, n)) * [[1.0], [3.0], [3.0], [6.0]]


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
# Recordings of gym-cartpole-swingup 0.1.4
# ---------------------------------------------------------------------------------------------------------------

# Its float32 rewards: the cosine, rounded, of the rounded angle
REWARD_TOLERANCE = 1e-6


def recorded_transitions():
    """2000 steps from states all over, 200 of them within a millimetre of the end of the track."""
    data = np.load(DATA / "swingup_transitions.npz")
    return {**data, "tolerance": np.full((len(data["state"]), 1), 1e-12)}


def recorded_episodes():
    """The steps of 20 episodes. At their starts the recorded states are rounded to float32."""
    data = np.load(DATA / "swingup_episodes.npz")
    index, t = np.nonzero(np.arange(500) < data["length"][:, None])
    steps = {key: data[key][index, t] for key in ("state", "action", "reward_v0", "reward_v1", "terminated", "truncated")}
    after = {"next_state": data["state"][index, t + 1], "obs": data["obs"][index, t + 1]}
    return {**steps, **after, "t": t, "tolerance": np.where(t == 0, 1e-7, 1e-12)[:, None]}


def assert_recorded(recorded, env_id, next_states, observations, rewards, terminated):
    assert (np.abs(next_states - recorded["next_state"]) <= recorded["tolerance"]).all()
    np.testing.assert_allclose(observations, recorded["obs"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(rewards, recorded[f"reward_{env_id[-2:]}"], rtol=0, atol=REWARD_TOLERANCE)
    np.testing.assert_array_equal(terminated, recorded["terminated"])


@pytest.mark.parametrize("recording", [recorded_transitions, recorded_episodes])
@each_id
def test_each_recorded_step_by_the_vectorised_form(env_id, recording):
    recorded = recording()
    envs = make(env_id, len(recorded["state"]))
    envs.reset()
    envs.state = recorded["state"].T
    observations, rewards, terminated, _, _ = envs.step(recorded["action"])
    assert_recorded(recorded, env_id, envs.state.T, observations, rewards, terminated)


@pytest.mark.parametrize("recording", [recorded_transitions, recorded_episodes])
@each_id
def test_each_recorded_step_by_one_environment(env_id, recording):
    recorded = recording()
    env = gym.make(env_id)
    env.reset()
    rows = []
    for i, state in enumerate(recorded["state"]):
        if "t" in recorded and recorded["t"][i] == 0:
            env.reset()
        env.unwrapped.state = state
        rows.append([*env.step(recorded["action"][i])[:4], env.unwrapped.state])
    observations, rewards, terminated, truncated, next_states = map(np.array, zip(*rows))
    assert_recorded(recorded, env_id, next_states, observations, rewards, terminated)
    if "truncated" in recorded:
        np.testing.assert_array_equal(truncated, recorded["truncated"])


# ---------------------------------------------------------------------------------------------------------------
# Mechanics
# ---------------------------------------------------------------------------------------------------------------


def energy(state):
    """Of the cart, and of the pole: a point mass in its middle that turns with the inertia of a uniform thin rod."""
    _, velocity, angle, angular_velocity = state
    half = physics.POLE_LENGTH / 2
    middle = (velocity - half * angular_velocity * np.cos(angle)) ** 2 + (half * angular_velocity * np.sin(angle)) ** 2
    inertia = physics.POLE_MASS * physics.POLE_LENGTH**2 / 12
    kinetic = physics.CART_MASS * velocity**2 + physics.POLE_MASS * middle + inertia * angular_velocity**2
    return kinetic / 2 + physics.POLE_MASS * physics.GRAVITY * half * np.cos(angle)


def momentum(state):
    """The horizontal one."""
    _, velocity, angle, angular_velocity = state
    middle = velocity - physics.POLE_LENGTH / 2 * angular_velocity * np.cos(angle)
    return physics.CART_MASS * velocity + physics.POLE_MASS * middle


def derivative(state, force, friction=physics.FRICTION):
    acceleration, angular_acceleration = physics.accelerations(state, force, friction)
    return np.stack([state[1], acceleration, state[3], angular_acceleration])


@pytest.mark.parametrize("friction", [0.0, physics.FRICTION, 2.0])
@pytest.mark.parametrize("quantity", [energy, momentum])
def test_energy_and_momentum_change_by_force_and_friction_alone(quantity, friction):
    # Together the two determine both accelerations
    state = random_states(1000)
    force = np.random.default_rng(1).uniform(-10, 10, 1000)
    net_force = force - friction * state[1]
    expected = net_force * state[1] if quantity is energy else net_force
    # The derivative along the motion, exact to rounding: by a step into the complex plane
    rate = quantity(state + 1e-30j * derivative(state, force, friction)).imag / 1e-30
    np.testing.assert_allclose(rate, expected, rtol=1e-10, atol=1e-10)


def test_the_energy_error_of_the_integration_is_of_first_order():
    def error(time_step):
        state = start = random_states(50) / 3
        for _ in range(round(1 / time_step)):
            state = state + time_step * derivative(state, 0.0, friction=0.0)
        return energy(state) - energy(start)

    np.testing.assert_allclose(error(5e-4) / error(2.5e-4), 2, rtol=0.1)


def test_a_step_is_one_explicit_euler_step():
    state = random_states(100)
    actions = np.random.default_rng(1).uniform(-1, 1, 100)
    expected = state + 0.01 * derivative(state, 10 * actions)
    np.testing.assert_allclose(physics.next_state(state, actions), expected, rtol=1e-14)


@one_and_many
def test_a_force_beyond_the_limits_is_clipped(num_envs):
    env = make(V0, num_envs)
    for share in (1.0, -1.0):
        after = []
        for factor in (1, 1.5, 1e30):
            env.reset(options=UPRIGHT)
            after.append(env.step(full_force(env, factor * share))[0])
        np.testing.assert_array_equal(after[1:], [after[0]] * 2)
        assert (np.sign(after[0][..., 1]) == share).all()


# ---------------------------------------------------------------------------------------------------------------
# Many environments in one array
# ---------------------------------------------------------------------------------------------------------------


def assert_same_steps(many, separately, act, n_steps, **reset):
    """The two give the same, bit by bit, over episodes that end in both ways."""
    observations, expected = (envs.reset(**reset)[0] for envs in (many, separately))
    np.testing.assert_array_equal(observations, expected, strict=True)
    n_terminated = n_truncated = 0
    for _ in range(n_steps):
        actions = act(observations)
        (*step, infos), (*expected, expected_infos) = many.step(actions), separately.step(actions)
        for values, expected_values in zip(step, expected):
            np.testing.assert_array_equal(values, expected_values)
        assert infos.keys() == expected_infos.keys() - {"final_info", "_final_info"}
        if infos:
            np.testing.assert_array_equal(infos["_final_obs"], expected_infos["_final_obs"])
            for final in (infos["final_obs"], expected_infos["final_obs"]):
                assert [one is not None for one in final] == infos["_final_obs"].tolist()
            np.testing.assert_array_equal(*(np.stack(x["final_obs"][x["_final_obs"]]) for x in (infos, expected_infos)))
        observations, _, terminated, truncated = step
        n_terminated += terminated.sum()
        n_truncated += truncated.sum()
    assert n_terminated > 0
    assert n_truncated > 0


def swinging(seed):
    """Actions for swing-ups: the first environments drive off the track, the others push at random, partly too hard."""
    rng = np.random.default_rng(seed)

    def act(observations):
        actions = rng.uniform(-1.2, 1.2, (len(observations), 1)).astype(np.float32)
        actions[:2] = 1.0
        return actions

    return act


def balancing(seed):
    """Actions for CartPole: every second environment balances, the others do anything."""
    rng = np.random.default_rng(seed)

    def act(observations):
        actions = rng.integers(2, size=len(observations))
        actions[::2] = (observations @ np.array([0.02, 0.05, 1.0, 0.3]) > 0)[::2]
        return actions

    return act


def test_a_step_of_many_is_bit_by_bit_that_of_each():
    states = random_states(10_000)
    actions = np.random.default_rng(1).uniform(-1, 1, 10_000)
    together = physics.next_state(states, actions)
    each = [physics.next_state(state, action) for state, action in zip(states.T, actions)]
    np.testing.assert_array_equal(together.T, each)


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


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def picture(state, share=0.0):
    """A picture of one environment in about this state, with this force."""
    env = gym.make(V0, render_mode="rgb_array")
    env.reset(options={"mean": state, "std": 0})
    if share:
        env.step(full_force(env, share))
    return env.render()


def place(frame, color):
    """Mean row and column of the pixels of a color, and their number."""
    rows, columns = (frame == color).all(axis=-1).nonzero()
    return rows.mean(), columns.mean(), len(rows)


def test_a_picture_is_an_array_of_its_own():
    env = gym.make(V0, render_mode="rgb_array")
    env.reset(options=HANGING)
    frame = env.render()
    before = frame.copy()
    assert (frame.shape, frame.dtype) == ((400, 600, 3), np.uint8)
    env.step(full_force(env))
    assert (env.render() != before).any()
    np.testing.assert_array_equal(frame, before)
    env.close()


def test_the_cart_is_where_it_is():
    # 600 pixels for 5 m
    for x in (-2.0, -1.0, 0.0, 0.5, 2.0):
        assert place(picture([x, 0, np.pi, 0]), drawing.CART)[1] == pytest.approx(299.5 + 120 * x, abs=1)


@pytest.mark.parametrize(("angle", "right", "up"), [(0, 0, 1), (np.pi / 2, -1, 0), (np.pi, 0, -1), (-np.pi / 4, 0.7, 0.7)])
def test_the_pole_points_where_it_does(angle, right, up):
    # A positive angle is counter-clockwise; the middle of the pole is 0.3 m from the hinge
    row, column, _ = place(picture([0, 0, angle, 0]), drawing.POLE)
    assert (column - 299.5, 0.55 * 400 - row) == (pytest.approx(36 * right, abs=4), pytest.approx(36 * up, abs=4))


def test_an_arrow_shows_the_force():
    assert not (picture([0, 0, 0, 0]) == drawing.ARROW).all(axis=-1).any()
    sizes = {}
    for share in (-1.0, -0.5, 0.5, 1.0, 7.0):
        frame = picture([0, 0, 0, 0], share)
        _, column, sizes[share] = place(frame, drawing.ARROW)
        assert np.sign(column - place(frame, drawing.CART)[1]) == np.sign(share)
    assert sizes[0.5] < sizes[1.0] == sizes[7.0]
    assert sizes[-0.5] < sizes[-1.0]


def test_the_arrow_is_gone_after_a_reset():
    for num_envs in (None, 2):
        env = make(V0, num_envs, render_mode="rgb_array")
        env.reset()
        env.step(full_force(env))
        assert (np.array(env.render()) == drawing.ARROW).all(axis=-1).any()
        env.reset()
        assert not (np.array(env.render()) == drawing.ARROW).all(axis=-1).any()


def test_many_environments_give_a_picture_each():
    envs = make(V0, 3, render_mode="rgb_array")
    envs.reset()
    states = np.array([[-1.0, 0, 0, 0], [0.0, 0, 2, 0], [1.5, 0, 4, 0]])
    envs.state = states.T.copy()
    envs.step(np.array([[0.0], [-1.0], [0.5]], dtype=np.float32))
    frames = envs.render()
    assert isinstance(frames, tuple)
    for frame, state, share in zip(frames, states, (1e-9, -1.0, 0.5)):
        np.testing.assert_array_equal(frame, picture(state, share))
    envs.close()
    envs.close()


def test_a_window_opens_and_closes(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make(V0, render_mode="human")
    for move, share in ((lambda: env.reset(options=HANGING), 0.0), (lambda: env.step(full_force(env)), 1.0)):
        move()
        # Without a call of render()
        window = pygame.surfarray.array3d(pygame.display.get_surface()).transpose(1, 0, 2)
        np.testing.assert_array_equal(window, picture([0, 0, np.pi, 0], share))
    assert env.render() is None
    env.close()
    env.close()
    assert not pygame.display.get_init()


@one_and_many
def test_without_a_render_mode_there_is_a_warning_and_no_picture(num_envs):
    env = make(V0, num_envs)
    env.reset()
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.unwrapped.render() is None


@one_and_many
def test_a_missing_pygame_is_named_with_the_command_that_installs_it(num_envs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = make(V0, num_envs, render_mode="rgb_array")
    env.reset()
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'sb3_vpg\[render\]'"):
        env.render()
