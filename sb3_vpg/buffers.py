"""
Rollout buffers that know which steps were recorded, how long each rollout really was and where episodes end, and that
leave the advantages to :mod:`sb3_vpg.estimators`.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples, TensorDict

from sb3_vpg.estimators import ONE_PROCESS, Collectives, Formulation, Rollout

NumpyObs = np.ndarray | dict[str, np.ndarray]
In = TypeVar("In")
Out = TypeVar("Out")

# One number per step and environment, filled in by ``add``
PER_STEP = {"rewards": np.float32, "episode_starts": np.float32, "mask": bool, "values": np.float32, "log_probs": np.float32}

# Observations in a chunk of steps take about this many bytes in single precision, within the limits below
CHUNK_BYTES = 2**21
MIN_CHUNK, MAX_CHUNK = 16, 4096


def map_obs(function: Callable[[In], Out], obs: In | dict[str, In]) -> Out | dict[str, Out]:
    """Apply ``function`` to an array observation, or to each entry of a Dict observation."""
    if isinstance(obs, dict):
        return {key: function(value) for key, value in obs.items()}
    return function(obs)


class VPGBufferMixin(RolloutBuffer):
    """
    What VPG's two buffers have in common. Differences from SB3's buffers:

    - rewards are stored as the environment gave them; time limits are remembered (:meth:`add_time_limit`) and
      bootstrapped where the formulation has a value function
    - the number of rows is not fixed: ``buffer_size`` is where it starts, and the length of the rollout once that is
      finished; the arrays are (T, N, ...) at all times
    - ``mask`` (T, N) tells which steps were recorded; :meth:`get` yields only those, without copying where it can
    - ``values`` may be filled in after the rollout; ``log_probs`` are not recorded unless given (NaN then)

    Constructor parameters are those of SB3's ``RolloutBuffer``. ``formulation`` is GAE unless VPG sets another one.
    """

    formulation: Formulation
    mask: np.ndarray
    steps: np.ndarray
    ends: np.ndarray
    #: what the formulation was given, once the advantages are computed
    rollout: Rollout
    #: index within its episode of each environment's first step in the rollout, int, shape (N,)
    first_steps: np.ndarray

    def reset(self) -> None:
        if not hasattr(self, "formulation"):
            self.formulation = Formulation(gamma=self.gamma, gae_lambda=self.gae_lambda)
        self.pos = 0
        self.full = False
        self.generator_ready = False
        self.first_steps = np.zeros(self.n_envs, dtype=np.int64)
        self._time_limits: list[tuple[int, int]] = []
        self._terminal_obs: list[NumpyObs] = []
        self._allocate(self.buffer_size)

    def _allocate(self, n_rows: int) -> None:
        """Make room for ``n_rows`` steps, keeping the first ``pos`` of them."""

        def rows(name: str, shape: tuple[int, ...], dtype: Any, key: str | None = None) -> np.ndarray:
            array = np.empty((n_rows, self.n_envs, *shape), dtype)
            if self.pos > 0:
                old = getattr(self, name) if key is None else getattr(self, name)[key]
                array[: self.pos] = old[: self.pos]
            return array

        if isinstance(self.observation_space, spaces.Dict):
            self.observations = {  # type: ignore[assignment]
                key: rows("observations", self.obs_shape[key], space.dtype, key)  # type: ignore[call-overload]
                for key, space in self.observation_space.spaces.items()
            }
        else:
            self.observations = rows("observations", self.obs_shape, self.observation_space.dtype)
        self.actions = rows("actions", (self.action_dim,), self.action_space.dtype)
        for name, dtype in PER_STEP.items():
            setattr(self, name, rows(name, (), dtype))
        self.values[self.pos :] = 0.0
        self.log_probs[self.pos :] = np.nan
        self.buffer_size = n_rows

    def add(
        self,
        obs: NumpyObs,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | None = None,
        log_prob: th.Tensor | None = None,
        recorded: np.ndarray | bool = True,
    ) -> None:
        """
        Append one step of all environments.

        :param obs: Observation before the action, shape (N, ...)
        :param action: Action as the policy sampled it, shape (N, action_dim) or (N,)
        :param reward: Reward of the environment, nothing added, shape (N,)
        :param episode_start: Whether the observation is the first of its episode, shape (N,)
        :param value: V(s_t), if it is known already, N elements
        :param log_prob: log probability of the action, if it is known already, N elements
        :param recorded: Whether the step belongs to the rollout, shape (N,)
        """
        if self.pos == self.buffer_size:
            self._allocate(2 * self.buffer_size)
        row = self.pos
        if isinstance(self.observations, dict):
            for key, stored in self.observations.items():
                stored[row] = np.reshape(obs[key], stored.shape[1:])
        else:
            self.observations[row] = np.reshape(obs, self.observations.shape[1:])  # type: ignore[arg-type]
        self.actions[row] = np.reshape(action, (self.n_envs, self.action_dim))
        self.rewards[row] = reward
        self.episode_starts[row] = episode_start
        self.mask[row] = recorded
        if value is not None:
            self.values[row] = value.detach().cpu().numpy().reshape(self.n_envs)
        if log_prob is not None:
            self.log_probs[row] = log_prob.detach().cpu().numpy().reshape(self.n_envs)
        self.pos += 1

    def add_time_limit(self, env_index: int, terminal_obs: NumpyObs) -> None:
        """
        Note that the step to be added next ends its episode by a time limit, not by termination.

        :param env_index: the environment
        :param terminal_obs: the observation at the time limit, without the axis of environments
        """
        self._time_limits.append((self.pos, env_index))
        # The environments may use the same array again
        self._terminal_obs.append(map_obs(np.array, terminal_obs))

    def finish(self) -> None:
        """Call once after the last step: cuts the arrays to the rows that were added."""
        rows = slice(self.pos)
        self.observations = map_obs(lambda array: array[rows], self.observations)  # type: ignore[assignment]
        for name in ("actions", *PER_STEP):
            setattr(self, name, getattr(self, name)[rows])
        self.buffer_size = self.pos
        self.full = True

    @property
    def n_recorded(self) -> int:
        """Number of recorded steps."""
        return int(self.mask.sum())

    @property
    def n_pieces(self) -> int:
        """Number of episodes, whole or in part, that the recorded steps belong to."""
        return int((self._last & self.mask).sum())

    @property
    def n_episodes(self) -> int:
        """Number of recorded episodes that ended, by termination or by a time limit."""
        return int((self.ends & self.mask).sum())

    @property
    def _last(self) -> np.ndarray:
        """Last step of each piece, shape (T, N): the end of an episode, or of the rollout."""
        last = self.ends.copy()
        last[-1] = True
        return last

    def terminal_observations(self) -> NumpyObs | None:
        """
        :return: the observations at the time limits, stacked along a new first axis, in the order in which they were
            added; None if there was no time limit
        """
        if not self._terminal_obs:
            return None
        if isinstance(self._terminal_obs[0], dict):
            return {key: np.stack([obs[key] for obs in self._terminal_obs]) for key in self._terminal_obs[0]}
        return np.stack(self._terminal_obs)  # type: ignore[arg-type]

    def compute_returns_and_advantage(
        self,
        last_values: th.Tensor,
        dones: np.ndarray,
        terminal_values: np.ndarray | None = None,
        over: Collectives = ONE_PROCESS,
    ) -> None:
        """
        Compute ``advantages`` (psi_t minus the baseline, not normalized yet) and ``returns`` (the targets of the value
        function) by the formulation.

        :param last_values: V(s_T) of the observation after the last step, N elements; zeros if nothing is to be
            bootstrapped there
        :param dones: whether the last step ended an episode, shape (N,)
        :param terminal_values: values of :meth:`terminal_observations`; None for 0, which treats a time limit like
            termination
        :param over: the processes that share the batch, if there are several
        """
        if not self.full:
            self.finish()
        starts = self.episode_starts.astype(bool)
        self.ends = np.concatenate([starts[1:], np.reshape(dones, (1, self.n_envs)).astype(bool)])

        next_values = np.zeros_like(self.values)
        next_values[:-1] = self.values[1:]
        next_values[-1] = last_values.detach().cpu().numpy().reshape(self.n_envs)
        next_values[self.ends] = 0.0
        if terminal_values is not None and self._time_limits:
            next_values[tuple(np.transpose(self._time_limits))] = terminal_values

        rows = np.arange(self.buffer_size)[:, None]
        begins = np.maximum.accumulate(np.where(starts, rows, -1), axis=0)
        self.steps = np.where(begins >= 0, rows - begins, self.first_steps + rows)

        self.rollout = Rollout(self.rewards, self.values, next_values, self._last, self.mask, self.steps)
        # In double precision: normalizing subtracts the mean, which may be large
        self.advantages, returns = self.formulation.advantages(self.rollout, over)
        self.returns = returns.astype(np.float32)

    def normalized_advantages(self, over: Collectives = ONE_PROCESS) -> np.ndarray:
        """
        :param over: the processes that share the batch, if there are several
        :return: what multiplies grad log pi in the update: ``advantages``, normalized and weighted as the formulation says,
            shape (T, N)
        """
        return self.formulation.normalize(self.advantages, self.rollout, over)

    def get(  # type: ignore[override]
        self, batch_size: int | None = None, shuffle: bool = True
    ) -> Generator[RolloutBufferSamples | DictRolloutBufferSamples, None, None]:
        """
        Yield the recorded steps once, and only those.

        :param batch_size: number of steps in a batch, at most; None for all in one
        :param shuffle: whether in random order (NumPy's global generator, as in SB3); if not, each batch is an evenly
            spaced sample of the rollout, in order of time
        :return: batches as in SB3, with ``returns`` as the targets of the value function
        """
        for indices in self.batch_indices(batch_size, shuffle):
            yield self._get_samples(indices)

    def batch_indices(self, batch_size: int | None = None, shuffle: bool = False) -> Iterator[np.ndarray | slice]:
        """
        Which steps make up each batch, see :meth:`get`, counted in order of time, then of environment.

        :return: arrays of indices, or slices where all steps were recorded and are not shuffled
        """
        n = self.n_recorded
        batch_size = batch_size or n
        recorded = None if n == self.mask.size else np.flatnonzero(self.mask)
        if shuffle:
            # SB3 seeds the global generator
            permutation = np.random.permutation(n)  # noqa: NPY002
            indices = permutation if recorded is None else recorded[permutation]
            for start in range(0, n, batch_size):
                yield indices[start : start + batch_size]
        else:
            n_batches = -(-n // batch_size)
            for first in range(n_batches):
                batch = slice(first, n, n_batches)
                yield batch if recorded is None else recorded[batch]

    @property
    def chunk_size(self) -> int:
        """Number of steps that go through the networks at a time, so that large rollouts need little memory."""
        sizes = self.obs_shape.values() if isinstance(self.obs_shape, dict) else [self.obs_shape]
        obs_bytes = 4 * sum(int(np.prod(shape)) for shape in sizes)
        return int(np.clip(CHUNK_BYTES // max(obs_bytes, 1), MIN_CHUNK, MAX_CHUNK))

    def flat_observations(self, indices: np.ndarray | slice) -> th.Tensor | TensorDict:
        """
        :param indices: which steps, counted in order of time, then of environment
        :return: their observations on the buffer's device, along one axis
        """
        return map_obs(lambda array: self._flat(array, indices), self.observations)

    def flat(self, array: np.ndarray, indices: np.ndarray | slice) -> th.Tensor:
        """
        :param array: a number for each step and environment, shape (T, N)
        :param indices: which steps, counted in order of time, then of environment
        :return: their numbers on the buffer's device, in single precision
        """
        return self.to_torch(array.reshape(-1)[indices].astype(np.float32, copy=False), copy=False)

    def _flat(self, array: np.ndarray, indices: np.ndarray | slice) -> th.Tensor:
        return self.to_torch(array.reshape(-1, *array.shape[2:])[indices], copy=False)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray | slice, env: Any = None
    ) -> RolloutBufferSamples | DictRolloutBufferSamples:
        samples = DictRolloutBufferSamples if isinstance(self.observations, dict) else RolloutBufferSamples
        return samples(
            observations=self.flat_observations(batch_inds),  # type: ignore[arg-type]
            # As in SB3, in single precision: some distributions cannot take the dtype of MultiBinary
            actions=self._flat(self.actions, batch_inds).to(th.float32),
            old_values=self.flat(self.values, batch_inds),
            old_log_prob=self.flat(self.log_probs, batch_inds),
            advantages=self.flat(self.advantages, batch_inds),
            returns=self.flat(self.returns, batch_inds),
        )


class VPGRolloutBuffer(VPGBufferMixin, RolloutBuffer):
    """VPG's buffer for array observations, see :class:`VPGBufferMixin`."""


class VPGDictRolloutBuffer(VPGBufferMixin, DictRolloutBuffer):  # type: ignore[misc]
    """VPG's buffer for Dict observations, see :class:`VPGBufferMixin`."""


def buffer_class_for(observation_space: spaces.Space) -> type[RolloutBuffer]:
    """:return: VPG's buffer for such observations"""
    return VPGDictRolloutBuffer if isinstance(observation_space, spaces.Dict) else VPGRolloutBuffer
