"""The cart-pole swing-up task: a single environment, and a vectorized environment."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from sb3_vpg.common.checks import check_choice
from sb3_vpg.envs.cartpole_drawing import Renderer
from sb3_vpg.envs.cartpole_physics import TIME_STEP, TRACK_LIMIT, Array, next_state, outcome
from sb3_vpg.envs.vector import SeparatelySeededVectorEnv, final_observations

START_MEAN = (0.0, 0.0, math.pi, 0.0)
START_STD = 0.2
# An integer, since comparing integers with a float infinity would convert the array
NO_LIMIT = np.iinfo(np.int64).max


def _to_four_numbers(name: str, value: Any, *, negative: bool = True) -> Array:
    """
    Convert one number, or four, to an array of four: position, velocity, angle and angular velocity.

    :param name: name of the value, for the error
    :param value: the value
    :param negative: whether negative numbers are allowed
    :return: shape (4,)
    :raises ValueError: if the value is neither one number nor four, not finite, or negative where that is not allowed
    """
    try:
        four = np.broadcast_to(np.array(value, dtype=np.float64), (4,))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is neither one number nor four (x, v, theta, w)") from error
    if not np.isfinite(four).all() or (not negative and (four < 0).any()):
        raise ValueError(f"{name}={value!r} must be finite{'' if negative else ' and not negative'}")
    return four


def _start_distribution(options: dict[str, Any] | None, std: Array) -> tuple[Array, Array]:
    """
    :param options: options of ``reset``
    :param std: standard deviations if the options have none, shape (4,)
    :return: means and standard deviations of the start state, shape (4,) each
    :raises ValueError: if an option is unknown, not one number or four, or not finite, or if ``std`` is negative
    """
    given = {"mean": START_MEAN, "std": std, **(options or {})}
    if unknown := set(given) - {"mean", "std"}:
        raise ValueError(f"Unknown options of reset: {sorted(map(str, unknown))}; allowed: 'mean', 'std'")
    return _to_four_numbers("options['mean']", given["mean"]), _to_four_numbers("options['std']", given["std"], negative=False)


class _StartStdMixin:
    """A standard deviation of the start state that can be changed during training."""

    _start_std = _to_four_numbers("START_STD", START_STD)

    def set_start_std(self, std: npt.ArrayLike) -> None:
        """
        Set the standard deviation of the start state, for all episodes that start after this call. ``options`` of ``reset``
        take precedence.

        :param std: standard deviations of position [m], velocity [m/s], angle [rad] and angular velocity [rad/s], or one
            number for all; >= 0
        :raises ValueError: if ``std`` is neither one number nor four, not finite, or negative
        """
        self._start_std = _to_four_numbers("start_std", std, negative=False)


def _validate_actions(actions: Any, shape: tuple[int, ...]) -> Array:
    """
    :param actions: actions of one or of all environments
    :param shape: the expected shape
    :return: the actions, float64
    :raises ValueError: if the actions have another shape or are not finite
    """
    array = np.array(actions, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"The action must have the shape {shape}, not {array.shape}: {actions!r}")
    if not np.isfinite(array).all():
        where = f" of environment {np.argwhere(~np.isfinite(array))[0][0]}" if len(shape) > 1 else ""
        raise ValueError(f"The action{where} is not finite: {array[~np.isfinite(array)]}")
    return array


def _make_spaces() -> tuple[spaces.Box, spaces.Box]:
    """:return: new observation and action spaces of one environment (a space has a random generator and is not shared)"""
    return spaces.Box(-np.inf, np.inf, (5,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)


class CartPoleSwingUpEnv(_StartStdMixin, gym.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """
    ## Description

    A pole hangs from a cart that moves along a track. The goal is to swing the pole up by pushing the cart left and right, and
    to keep it upright, without leaving the track.

    v0 has a local optimum: leaving the track immediately gives a return of about -28, letting the pole hang gives about -485.
    So a policy gradient first learns to leave the track. Episodes of about 68 steps indicate this.

    The equations of motion are those of the cart-pole in PILCO (Deisenroth & Rasmussen, 2011, "PILCO: A Model-Based and
    Data-Efficient Approach to Policy Search"), integrated by the explicit Euler method at 100 Hz.

    ## Action Space

    An `ndarray` of shape `(1,)`, dtype `float32`: the horizontal force on the cart divided by 10 N, positive to the right.
    Values outside [-1, 1] are clipped.

    | Num | Action               | Min | Max |
    |-----|----------------------|-----|-----|
    | 0   | Force on the cart    | -1  | 1   |

    ## Observation Space

    An `ndarray` of shape `(5,)`, dtype `float32`:

    | Num | Observation                     | Min  | Max |
    |-----|---------------------------------|------|-----|
    | 0   | Position of the cart [m]        | -Inf | Inf |
    | 1   | Velocity of the cart [m/s]      | -Inf | Inf |
    | 2   | Cosine of the angle of the pole | -1   | 1   |
    | 3   | Sine of the angle of the pole   | -1   | 1   |
    | 4   | Angular velocity [rad/s]        | -Inf | Inf |

    The angle is 0 when the pole is upright and increases counterclockwise. The space itself is an unbounded `Box`.

    ## Rewards

    The reward is a function of the state after the step: `cos(angle)` in v0, `(1 + cos(angle)) / 2` in v1. Over 500 steps, a
    pole that hangs at rest gives -500 in v0 and 0 in v1; a balanced pole gives 500 in both. `reward_threshold` is 300 in v0
    and 400 in v1: the pole is swung up and balanced for most of the episode.

    ## Starting State

    Position, velocity, angle and angular velocity are independent normal variables with means (0, 0, pi, 0) and standard
    deviation 0.2. `set_start_std` and the options of `reset` change these.

    ## Episode End

    1. Termination: the center of the cart is more than 2.4 m from the middle of the track.
    2. Truncation: 500 steps (by the `TimeLimit` wrapper).

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import sb3_vpg
    >>> env = gym.make("CartPoleSwingUp-v0", render_mode="rgb_array")
    >>> env.reset(seed=0, options={"mean": [0, 0, 0, 0], "std": 0})  # upright, at rest
    (array([0., 0., 1., 0., 0.], dtype=float32), {})

    ```

    | Parameter                 | Type     | Default | Description                                                  |
    |---------------------------|----------|---------|--------------------------------------------------------------|
    | `reward_in_unit_interval` | **bool** | `False` | The reward of v1                                             |
    | `render_mode`             | **str**  | `None`  | `"human"`, `"rgb_array"`, or `None`                          |

    | Option of `reset` | Type                         | Default          | Description                                |
    |-------------------|------------------------------|------------------|--------------------------------------------|
    | `mean`            | **float** or 4 of them       | `(0, 0, pi, 0)`  | Mean of the start state (x, v, angle, w)   |
    | `std`             | **float** or 4 of them, >= 0 | `0.2`            | Standard deviation of the start state      |

    Raises `ValueError` if an action has another shape or is not finite, or if an option is unknown. Raises `ResetNeeded` if
    `step` or `render` is called before `reset`.

    ## Vectorized environment

    ```python
    >>> envs = gym.make_vec("CartPoleSwingUp-v0", num_envs=3, vectorization_mode="vector_entry_point")
    >>> envs
    CartPoleSwingUpVectorEnv(CartPoleSwingUp-v0, num_envs=3)

    ```

    ## Version History

    * v1: rewards in [0, 1]
    * v0: equations, constants, starting state and reward of gym-cartpole-swingup 0.1.4
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": round(1 / TIME_STEP)}

    def __init__(self, reward_in_unit_interval: bool = False, render_mode: str | None = None):
        self.observation_space, self.action_space = _make_spaces()  # type: ignore[assignment]
        self.reward_in_unit_interval = reward_in_unit_interval
        self.render_mode = render_mode
        #: position, velocity, angle, angular velocity, shape (4,); None before the first reset
        self.state: Array | None = None
        self._last_action = 0.0
        self._renderer: Renderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.normal(*_start_distribution(options, self._start_std))
        self._last_action = 0.0
        if self.render_mode == "human":
            self.render()
        return outcome(self.state, self.reward_in_unit_interval)[0], {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self.state is None:
            raise ResetNeeded("Call reset() before step().")
        self._last_action = _validate_actions(action, (1,))[0]
        self.state = next_state(self.state, self._last_action)
        observation, reward = outcome(self.state, self.reward_in_unit_interval)
        terminated = bool(abs(self.state[0]) > TRACK_LIMIT)
        if self.render_mode == "human":
            self.render()
        return observation, float(reward), terminated, False, {}

    def render(self) -> npt.NDArray[np.uint8] | None:
        if self.state is None:
            raise ResetNeeded("Call reset() before render().")
        if self.render_mode is None:
            gym.logger.warn("render() draws nothing without a render_mode: gym.make(..., render_mode='rgb_array')")
            return None
        if self._renderer is None:
            self._renderer = Renderer(self.metadata["render_fps"] if self.render_mode == "human" else None)
        return self._renderer.show(self.state, self._last_action)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class CartPoleSwingUpVectorEnv(_StartStdMixin, SeparatelySeededVectorEnv[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """
    Vectorized :class:`CartPoleSwingUpEnv` with a time limit: one array holds the states of all environments. Each environment
    has its own random generator. With the same seeds and actions, observations are those of ``SyncVectorEnv`` over the same
    environments.

    :param num_envs: number of environments N, >= 1
    :param max_episode_steps: time limit of an episode, >= 1; None for no limit
    :param reward_in_unit_interval: whether to use the reward of v1
    :param render_mode: "rgb_array" or None
    :param autoreset_mode: ``AutoresetMode.NEXT_STEP``, gymnasium's default: the step after the end of an episode ignores the
        action and returns the first observation of the next episode. ``SAME_STEP``: the step that ends an episode returns the
        first observation of the next one, and the last observation is ``infos["final_obs"][i]``.
    :raises ValueError: if the number of environments, the time limit, the render mode or the autoreset mode has another value
    """

    # Some versions of gymnasium call close() after an error in __init__
    _renderer: Renderer | None = None

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = 500,
        reward_in_unit_interval: bool = False,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ):
        autoreset_mode = AutoresetMode(autoreset_mode)
        if autoreset_mode == AutoresetMode.DISABLED:
            raise ValueError(f"autoreset_mode={autoreset_mode} is not supported; allowed: NEXT_STEP, SAME_STEP")
        for keyword, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{keyword}={value} is not allowed; it must be at least 1")
        check_choice("render_mode", render_mode, (None, "rgb_array"))
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": CartPoleSwingUpEnv.metadata["render_fps"],
            "autoreset_mode": autoreset_mode,
        }
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.reward_in_unit_interval = reward_in_unit_interval
        self.render_mode = render_mode
        self.autoreset_mode = autoreset_mode
        self.single_observation_space, self.single_action_space = _make_spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        #: position, velocity, angle, angular velocity, shape (4, N); None before the first reset
        self.state: Array | None = None
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=bool)
        self._last_actions = np.zeros(num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """
        Start a new episode in every environment.

        :param seed: environment i gets ``seed + i``, or ``seed[i]`` of a list; None does not change the random generators
        :param options: options of :class:`CartPoleSwingUpEnv`, for this reset only
        :return: observations, shape (N, 5), and no infos
        :raises ValueError: if a list of seeds has not N entries, or an option is unknown
        """
        mean, std = _start_distribution(options, self._start_std)
        self.seed_generators(seed)
        self.state = np.empty((4, self.num_envs))
        self._start(np.arange(self.num_envs), mean, std)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return outcome(self.state, self.reward_in_unit_interval)[0], {}

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], Array, npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        if self.state is None:
            raise ResetNeeded("Call reset() before step().")
        self._last_actions = _validate_actions(actions, (self.num_envs, 1))[:, 0]
        self.state = next_state(self.state, self._last_actions)
        self._steps += 1
        # NEXT_STEP: environments whose episode has ended start a new one in this step
        started = self._ended.nonzero()[0]
        if started.size:
            self._start(started)
        observations, rewards = outcome(self.state, self.reward_in_unit_interval)
        terminated = np.abs(self.state[0]) > TRACK_LIMIT
        truncated = self._steps >= (NO_LIMIT if self.max_episode_steps is None else self.max_episode_steps)
        if started.size:
            rewards[started], terminated[started] = 0.0, False
        ended = terminated | truncated
        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._ended = ended
        elif ended.any():
            infos |= final_observations(observations, ended)
            indices = ended.nonzero()[0]
            self._start(indices)
            observations[indices] = outcome(self.state[:, indices], self.reward_in_unit_interval)[0]
        return observations, rewards, terminated, truncated, infos

    def _start(self, indices: npt.NDArray[np.integer], mean: Any = START_MEAN, std: Array | None = None) -> None:
        """Start a new episode in these environments."""
        std = self._start_std if std is None else std
        for i in indices:
            self.state[:, i] = self.generators[i].normal(mean, std, 4)  # type: ignore[index]
        self._steps[indices] = 0
        self._last_actions[indices] = 0.0

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """:return: one image for each environment, shape (height, width, 3)"""
        if self.state is None:
            raise ResetNeeded("Call reset() before render().")
        if self.render_mode is None:
            gym.logger.warn("render() draws nothing without a render_mode: gym.make_vec(..., render_mode='rgb_array')")
            return None
        if self._renderer is None:
            self._renderer = Renderer()
        return tuple(self._renderer.show(*args) for args in zip(self.state.T, self._last_actions))  # type: ignore[misc]

    def close_extras(self, **kwargs: Any) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
