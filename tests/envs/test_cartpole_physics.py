"""The physics of the swing-up against recordings and mechanics."""

import gymnasium as gym
import numpy as np
import pytest
from helpers.cartpole import UPRIGHT, V0, each_id, full_force, make, one_and_many, random_states
from helpers.installed import CHECKOUT

from sb3_vpg.envs import cartpole_physics as physics

DATA = CHECKOUT / "tests" / "data"

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


def test_a_step_of_many_is_bit_by_bit_that_of_each():
    states = random_states(10_000)
    actions = np.random.default_rng(1).uniform(-1, 1, 10_000)
    together = physics.next_state(states, actions)
    each = [physics.next_state(state, action) for state, action in zip(states.T, actions)]
    np.testing.assert_array_equal(together.T, each)
