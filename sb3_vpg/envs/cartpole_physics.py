"""Physics, observation and reward of the cart-pole swing-up, as functions of arrays: for one environment or for N."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GRAVITY = 9.82  # m/s^2
CART_MASS = 0.5  # kg
POLE_MASS = 0.5  # kg
TOTAL_MASS = CART_MASS + POLE_MASS
POLE_LENGTH = 0.6  # m, full length
FRICTION = 0.1  # N s/m, between cart and track
MAX_FORCE = 10.0  # N
TIME_STEP = 0.01  # s
TRACK_LIMIT = 2.4  # m, to either side


def accelerations(state: Array, force: Array | float, friction: float = FRICTION) -> tuple[Array, Array]:
    """
    Equations of motion of a cart that carries a uniform thin rod on a hinge.

    :param state: position [m] and velocity [m/s] of the cart, angle [rad] and angular velocity [rad/s] of the pole,
        shape (4,) or (4, N)
    :param force: horizontal force on the cart [N], shape () or (N,)
    :param friction: friction of the cart [N s/m]
    :return: acceleration of the cart [m/s^2] and angular acceleration of the pole [rad/s^2], of the shape of ``force``
    """
    _, velocity, angle, angular_velocity = state
    sin, cos = np.sin(angle), np.cos(angle)
    drive = 2 * (force - friction * velocity) - POLE_MASS * POLE_LENGTH * np.square(angular_velocity) * sin
    inertia = 4 * TOTAL_MASS - 3 * POLE_MASS * np.square(cos)
    acceleration = (2 * drive + 3 * POLE_MASS * GRAVITY * sin * cos) / inertia
    angular_acceleration = (3 * drive * cos + 6 * TOTAL_MASS * GRAVITY * sin) / (POLE_LENGTH * inertia)
    return acceleration, angular_acceleration


def next_state(state: Array, action: Array | float) -> Array:
    """
    One explicit Euler step of ``TIME_STEP`` seconds: all derivatives are evaluated at the old state.

    :param state: shape (4,) or (4, N), see :func:`accelerations`
    :param action: force divided by ``MAX_FORCE``, clipped to [-1, 1], shape () or (N,)
    :return: the state after the step, same shape as ``state``
    """
    force = MAX_FORCE * np.minimum(np.maximum(action, -1.0), 1.0)
    derivative = np.empty_like(state)
    derivative[0], derivative[2] = state[1], state[3]
    derivative[1], derivative[3] = accelerations(state, force)
    return state + TIME_STEP * derivative


def outcome(state: Array, reward_in_unit_interval: bool) -> tuple[npt.NDArray[np.float32], Array]:
    """
    Compute observation and reward.

    :param state: the state after a step or a reset, shape (4,) or (4, N)
    :param reward_in_unit_interval: True for the reward (1 + cos(angle)) / 2, False for cos(angle)
    :return: the observation (position, velocity, cosine and sine of the angle, angular velocity), shape (5,) or (N, 5), and
        the reward, shape () or (N,)
    """
    position, velocity, angle, angular_velocity = state
    height = np.cos(angle)
    observation = np.empty((*state.shape[1:], 5), dtype=np.float32)
    observation[..., 0] = position
    observation[..., 1] = velocity
    observation[..., 2] = height
    observation[..., 3] = np.sin(angle)
    observation[..., 4] = angular_velocity
    return observation, (1.0 + height) / 2.0 if reward_in_unit_interval else height
