"""
VPG's rollout buffers, and an adapter for other rollout buffer classes.

VPG's buffers store which steps were recorded and where episodes end. Advantages are computed by :mod:`sb3_vpg.estimators`.
"""

from collections.abc import Generator, Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples, TensorDict

from sb3_vpg.common.collectives import SINGLE_PROCESS, SingleProcess
from sb3_vpg.common.policy_inputs import Samples, SamplesWithInputs, ValueSamples, map_obs, pinned_empty, stored_dtype
from sb3_vpg.estimators import NORMALIZATIONS, Formulation, Rollout

NumpyObs = np.ndarray | dict[str, np.ndarray]

# Arrays of shape (T, N) that ``add`` fills, and their dtypes
PER_STEP = {"rewards": np.float32, "episode_starts": np.float32, "mask": bool, "values": np.float32, "log_probs": np.float32}

# Approximate size of the observations of a chunk, in single precision, and bounds on its number of steps. On a CPU, a chunk
# fits the cache. On a GPU, it is large enough to use all units
CPU_CHUNK = 2**21, 16, 2**12
GPU_CHUNK = 2**30, 16, 2**16


class VPGBufferMixin(RolloutBuffer):
    """
    Base class of VPG's two rollout buffers. Differences from SB3's buffers:

    - Rewards are stored as the environment returned them. Time limits are stored separately (:meth:`add_time_limit`), and
      bootstrapped if the formulation has a value function.
    - The number of rows grows as needed. ``buffer_size`` is the initial number, and the length of the rollout once it is
      finished. All arrays have the shape (T, N, ...) throughout.
    - ``mask``, shape (T, N), is True at recorded steps. :meth:`get` yields only these.
    - ``values`` may be filled in after the rollout. ``log_probs`` are NaN unless they are given to :meth:`add`.
    - ``inputs`` are further inputs of the policy, such as action masks, by keyword of its methods.

    Constructor parameters are those of SB3's ``RolloutBuffer``. ``formulation`` is GAE unless VPG sets another one.
    """

    #: Whether the rollout must compute ``log_probs`` and ``values`` at each step
    needs_log_probs: ClassVar[bool] = False
    #: Whether a batch has all recorded steps of some environments, ordered by environment, as recurrent policies need
    by_environment = False

    formulation: Formulation
    #: True at recorded steps, shape (T, N)
    mask: np.ndarray
    #: index of each step within its episode, int, shape (T, N)
    steps: np.ndarray
    #: further inputs of the policy, arrays of shape (T, N, ...)
    inputs: dict[str, np.ndarray]
    #: True at the last step of each episode, shape (T, N)
    ends: np.ndarray
    #: input of the formulation, set when the advantages are computed
    rollout: Rollout
    #: index within its episode of the first step of each environment in the rollout, int, shape (N,)
    first_steps: np.ndarray

    def reset(self) -> None:
        if not hasattr(self, "formulation"):
            self.formulation = Formulation(gamma=self.gamma, gae_lambda=self.gae_lambda)
        self.pos = 0
        self.full = False
        self.first_steps = np.zeros(self.n_envs, dtype=np.int64)
        self._time_limits: list[tuple[int, int]] = []
        self._terminal_obs: list[NumpyObs] = []
        self._terminal_values: np.ndarray | None = None
        self.inputs = {}
        self._allocate(self.buffer_size)

    def _allocate(self, n_rows: int) -> None:
        """Allocate arrays of ``n_rows`` rows, and copy the first ``pos`` rows of the previous arrays."""

        def rows(name: str, shape: tuple[int, ...], dtype: Any, key: str | None = None) -> np.ndarray:
            empty = pinned_empty if name == "observations" and self.device.type == "cuda" else np.empty
            array = empty((n_rows, self.n_envs, *shape), dtype)
            if self.pos > 0:
                old = getattr(self, name) if key is None else getattr(self, name)[key]
                array[: self.pos] = old[: self.pos]
            return array

        if isinstance(self.observation_space, spaces.Dict):
            self.observations = {  # type: ignore[assignment]
                key: rows("observations", self.obs_shape[key], stored_dtype(space), key)  # type: ignore[call-overload]
                for key, space in self.observation_space.spaces.items()
            }
        else:
            self.observations = rows("observations", self.obs_shape, stored_dtype(self.observation_space))
        self.actions = rows("actions", (self.action_dim,), stored_dtype(self.action_space))
        for name, dtype in PER_STEP.items():
            setattr(self, name, rows(name, (), dtype))
        self.values[self.pos :] = 0.0
        self.log_probs[self.pos :] = np.nan
        self.inputs = {key: rows("inputs", array.shape[2:], array.dtype, key) for key, array in self.inputs.items()}
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
        **inputs: np.ndarray,
    ) -> None:
        """
        Append one step of all environments.

        :param obs: Observation before the action, shape (N, ...)
        :param action: Action as the policy sampled it, before clipping, shape (N, action_dim) or (N,)
        :param reward: Reward as the environment returned it, shape (N,)
        :param episode_start: Whether the observation is the first of its episode, shape (N,)
        :param value: V(s_t), N elements; None if it has not been computed
        :param log_prob: log probability of the action, N elements; None if it has not been computed
        :param recorded: Whether the step belongs to the rollout, shape (N,)
        :param inputs: Further inputs of the policy, shape (N, ...), the same ones at each step
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
        if row == 0:
            self.inputs = {key: np.empty((self.buffer_size, *array.shape), array.dtype) for key, array in inputs.items()}
        for key, array in inputs.items():
            self.inputs[key][row] = array
        self.pos += 1

    def add_time_limit(self, env_index: int, terminal_obs: NumpyObs) -> None:
        """
        Record that the next step to be added ends its episode by a time limit, not by termination.

        :param env_index: index of the environment
        :param terminal_obs: the observation at the time limit, without the environment axis
        """
        self._time_limits.append((self.pos, env_index))
        # A copy, since environments may reuse the array
        self._terminal_obs.append(map_obs(np.array, terminal_obs))

    def finish(self) -> None:
        """Cut the arrays to the rows that were added. Call once, after the last step."""
        rows = slice(self.pos)
        self.observations = map_obs(lambda array: array[rows], self.observations)  # type: ignore[assignment]
        for name in ("actions", *PER_STEP):
            setattr(self, name, getattr(self, name)[rows])
        self.inputs = {key: array[rows] for key, array in self.inputs.items()}
        self.buffer_size = self.pos
        self.full = True

    @property
    def recorded_values(self) -> np.ndarray:
        """V(s_t) of the recorded steps, shape (n_recorded,)."""
        return self.values[self.mask]

    @property
    def recorded_returns(self) -> np.ndarray:
        """Targets of the value function of the recorded steps, shape (n_recorded,)."""
        return self.returns[self.mask]

    @property
    def n_recorded(self) -> int:
        """Number of recorded steps."""
        return int(self.mask.sum())

    @property
    def n_segments(self) -> int:
        """Number of segments (episodes, whole or in part) among the recorded steps."""
        return int((self._last & self.mask).sum())

    @property
    def n_episodes(self) -> int:
        """Number of recorded episodes that ended, by termination or by a time limit."""
        return int((self.ends & self.mask).sum())

    @property
    def _last(self) -> np.ndarray:
        """True at the last step of each segment, that is, at the end of an episode or of the rollout, shape (T, N)."""
        last = self.ends.copy()
        last[-1] = True
        return last

    def terminal_observations(self) -> NumpyObs | None:
        """
        :return: the observations at the time limits, in the order in which they were added, stacked along a new first axis;
            None if there are none
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
        processes: SingleProcess = SINGLE_PROCESS,
    ) -> None:
        """
        Compute ``advantages`` (psi_t minus the baseline, not normalized) and ``returns`` (the targets of the value function)
        with the formulation.

        :param last_values: V(s_T) of the observation after the last step, N elements; zeros for no bootstrapping
        :param dones: whether the last step ended an episode, shape (N,)
        :param terminal_values: V of :meth:`terminal_observations`; None for those of the last call, or none (like termination)
        :param processes: the processes that share the batch
        """
        if not self.full:
            self.finish()
        starts = self.episode_starts.astype(bool)
        self.ends = np.concatenate([starts[1:], np.reshape(dones, (1, self.n_envs)).astype(bool)])

        next_values = np.zeros_like(self.values)
        next_values[:-1] = self.values[1:]
        next_values[-1] = last_values.detach().cpu().numpy().reshape(self.n_envs)
        next_values[self.ends] = 0.0
        if terminal_values is not None:
            self._terminal_values = terminal_values
        if self._terminal_values is not None:
            next_values[tuple(np.transpose(self._time_limits))] = self._terminal_values

        rows = np.arange(self.buffer_size)[:, None]
        begins = np.maximum.accumulate(np.where(starts, rows, -1), axis=0)
        self.steps = np.where(begins >= 0, rows - begins, self.first_steps + rows)

        self.rollout = Rollout(self.rewards, self.values, next_values, self._last, self.mask, self.steps)
        # Advantages stay in double precision, since normalization subtracts a mean that may be large
        self.advantages, returns = self.formulation.advantages(self.rollout, processes)
        self.returns = returns.astype(np.float32)

    def normalized_advantages(self, processes: SingleProcess = SINGLE_PROCESS) -> np.ndarray:
        """
        :param processes: the processes that share the batch
        :return: the weights of grad log pi in the update: ``advantages``, normalized and weighted by the formulation, shape
            (T, N)
        """
        return self.formulation.normalize(self.advantages, self.rollout, processes)

    def get(  # type: ignore[override]
        self, batch_size: int | None = None, shuffle: bool = True
    ) -> Generator[Samples, None, None]:
        """
        Yield each recorded step once, in batches.

        :param batch_size: maximum number of steps in a batch; None for a single batch
        :param shuffle: True for random order (NumPy's global generator, as in SB3). False: each batch is an evenly spaced
            sample of the rollout, in order of time.
        :return: batches as in SB3; ``returns`` are the targets of the value function
        """
        for indices in self.batch_indices(batch_size, shuffle):
            yield self._get_samples(indices)

    def get_value_samples(
        self, batch_size: int | None = None, shuffle: bool = True, part: tuple[int, int] = (0, 1)
    ) -> Iterator[ValueSamples]:
        """Like :meth:`get`, with what the value regression needs only. For ``part``, see :meth:`batch_indices`."""
        for indices in self.batch_indices(batch_size, shuffle, part):
            returns = self.flat(self.returns, indices)
            yield ValueSamples(self.flat_observations(indices), returns, self.flat_inputs(indices))

    def get_normalized(self, batch_size: int | None, processes: SingleProcess = SINGLE_PROCESS) -> Iterator[Samples]:
        """Like :meth:`get` without shuffling, with ``advantages`` replaced by :meth:`normalized_advantages`."""
        normalized = self.normalized_advantages(processes)
        for indices in self.batch_indices(batch_size):
            yield self._get_samples(indices)._replace(advantages=self.flat(normalized, indices))

    def batch_indices(
        self, batch_size: int | None = None, shuffle: bool = False, part: tuple[int, int] = (0, 1)
    ) -> Iterator[np.ndarray | slice]:
        """
        Yield the indices of the steps in each batch of :meth:`get`. Step t of environment i has the index t N + i.

        :param part: (k, n): of n evenly spaced parts of the rollout, only the one that begins with the recorded step k < n.
            Not used if ``shuffle`` is True, or if a batch has all steps of some environments
        :return: arrays of indices; slices, which avoid copies, if all steps were recorded and ``shuffle`` is False
        """
        n = self.n_recorded
        batch_size = batch_size or n
        if self.by_environment:
            yield from self._indices_of_environments(min(-(-n // batch_size), self.n_envs), shuffle)
            return
        recorded = None if n == self.mask.size else np.flatnonzero(self.mask)
        if shuffle:
            # SB3 seeds the global generator
            permutation = np.random.permutation(n)  # noqa: NPY002
            indices = permutation if recorded is None else recorded[permutation]
            for start in range(0, n, batch_size):
                yield indices[start : start + batch_size]
        else:
            start, n_parts = part
            n_batches = -(-len(range(start, n, n_parts)) // batch_size)
            for first in range(n_batches):
                batch = slice(start + first * n_parts, n, n_parts * n_batches)
                yield batch if recorded is None else recorded[batch]

    def _indices_of_environments(self, n_batches: int, shuffle: bool) -> Iterator[np.ndarray]:
        order = np.random.permutation(self.n_envs) if shuffle else np.arange(self.n_envs)  # noqa: NPY002
        rows = np.arange(self.buffer_size) * self.n_envs
        for columns in np.array_split(order, n_batches):
            yield (rows + columns[:, None])[self.mask.T[columns]]

    @property
    def chunk_size(self) -> int:
        """Number of steps that the networks process at a time. It bounds the memory of an update."""
        sizes = self.obs_shape.values() if isinstance(self.obs_shape, dict) else [self.obs_shape]
        obs_bytes = 4 * sum(int(np.prod(shape)) for shape in sizes)
        chunk_bytes, smallest, largest = CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK
        return int(np.clip(chunk_bytes // max(obs_bytes, 1), smallest, largest))

    def flat_observations(self, indices: np.ndarray | slice) -> th.Tensor | TensorDict:
        """
        :param indices: indices of steps, see :meth:`batch_indices`
        :return: their observations on the buffer's device, shape (n, ...)
        """
        return map_obs(lambda array: self._flat(array, indices), self.observations)

    def flat_inputs(self, indices: np.ndarray | slice) -> dict[str, th.Tensor]:
        """
        :param indices: indices of steps, see :meth:`batch_indices`
        :return: further inputs of the policy at these steps, on the buffer's device
        """
        return {key: self._flat(array, indices) for key, array in self.inputs.items()}

    def flat(self, array: np.ndarray, indices: np.ndarray | slice) -> th.Tensor:
        """
        :param array: shape (T, N)
        :param indices: indices of steps, see :meth:`batch_indices`
        :return: the numbers of these steps on the buffer's device, in single precision, shape (n,)
        """
        return self.to_torch(array.reshape(-1)[indices].astype(np.float32, copy=False), copy=False)

    def _flat(self, array: np.ndarray, indices: np.ndarray | slice) -> th.Tensor:
        return self.to_torch(array.reshape(-1, *array.shape[2:])[indices], copy=False)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray | slice, env: Any = None
    ) -> Samples:
        samples: Any = DictRolloutBufferSamples if isinstance(self.observations, dict) else RolloutBufferSamples
        inputs: dict[str, Any] = {}
        if self.inputs:
            samples, inputs = SamplesWithInputs, {"inputs": self.flat_inputs(batch_inds)}
        return samples(
            observations=self.flat_observations(batch_inds),
            # In single precision, as in SB3: some distributions do not support the dtype of MultiBinary
            actions=self._flat(self.actions, batch_inds).to(th.float32),
            old_values=self.flat(self.values, batch_inds),
            old_log_prob=self.flat(self.log_probs, batch_inds),
            advantages=self.flat(self.advantages, batch_inds),
            returns=self.flat(self.returns, batch_inds),
            **inputs,
        )


class VPGRolloutBuffer(VPGBufferMixin, RolloutBuffer):
    """VPG's rollout buffer for array observations, see :class:`VPGBufferMixin`."""


class VPGDictRolloutBuffer(VPGBufferMixin, DictRolloutBuffer):  # type: ignore[misc]
    """VPG's rollout buffer for Dict observations, see :class:`VPGBufferMixin`."""


def buffer_class_for(observation_space: spaces.Space) -> type[RolloutBuffer]:
    """:return: VPG's rollout buffer class for this observation space"""
    return VPGDictRolloutBuffer if isinstance(observation_space, spaces.Dict) else VPGRolloutBuffer


class RolloutBufferAdapter:
    """
    Gives a rollout buffer that is not derived from VPG's the interface that rollout and update use. Such a buffer has a fixed
    length, records every step and computes its own advantages. At a time limit, gamma V(terminal observation) is added to the
    reward, as in A2C.

    :param buffer: the buffer
    :param formulation: only its normalization is used
    :param policy: computes V(terminal observation)
    """

    needs_log_probs: ClassVar[bool] = True
    #: Set by the rollout and not used: such a buffer does not store the index of a step within its episode
    first_steps: np.ndarray

    def __init__(self, buffer: RolloutBuffer, formulation: Formulation, policy: ActorCriticPolicy):
        self.buffer = buffer
        self.formulation = formulation
        self.policy = policy
        self._values_at_time_limits: dict[int, float] = {}

    def reset(self) -> None:
        self.buffer.reset()

    def add_time_limit(self, env_index: int, terminal_obs: NumpyObs) -> None:
        with th.no_grad():
            value = self.policy.predict_values(self.policy.obs_to_tensor(terminal_obs)[0])
        self._values_at_time_limits[env_index] = value.item()

    def add(
        self,
        obs: NumpyObs,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | None = None,
        log_prob: th.Tensor | None = None,
        recorded: np.ndarray | bool = True,
        **inputs: np.ndarray,
    ) -> None:
        for env_index, terminal_value in self._values_at_time_limits.items():
            reward[env_index] += self.buffer.gamma * terminal_value
        self._values_at_time_limits.clear()
        self.buffer.add(obs, action, reward, episode_start, value, log_prob, **inputs)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Do nothing: the length is fixed."""

    def terminal_observations(self) -> None:
        """Return None: the values of terminal observations have been added to the rewards."""

    def compute_returns_and_advantage(
        self,
        last_values: th.Tensor,
        dones: np.ndarray,
        terminal_values: np.ndarray | None = None,
        processes: SingleProcess = SINGLE_PROCESS,
    ) -> None:
        self.buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        starts = self.buffer.episode_starts.astype(bool)
        self.n_episodes = int(starts[1:].sum() + dones.sum())
        self.n_segments = self.n_episodes + int((~dones).sum())

    @property
    def rewards(self) -> np.ndarray:
        return self.buffer.rewards

    @property
    def values(self) -> np.ndarray:
        return self.buffer.values

    @property
    def recorded_values(self) -> np.ndarray:
        return self.buffer.values.flatten()

    @property
    def recorded_returns(self) -> np.ndarray:
        return self.buffer.returns.flatten()

    @property
    def n_recorded(self) -> int:
        return self.buffer.buffer_size * self.buffer.n_envs

    @property
    def chunk_size(self) -> int:
        return self.n_recorded

    def get_value_samples(
        self, batch_size: int | None = None, shuffle: bool = True, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Any]:
        return self.buffer.get(batch_size)

    def get_normalized(self, batch_size: int | None, processes: SingleProcess = SINGLE_PROCESS) -> Iterator[Samples]:
        """Yield the whole batch at once, with normalized advantages; ``batch_size`` is ignored."""
        normalize = NORMALIZATIONS[self.formulation.normalize_advantage]
        for batch in self.buffer.get(batch_size=None):
            advantages = batch.advantages.numpy(force=True).reshape(-1, 1)
            all_true = np.ones(advantages.shape, dtype=bool)
            normalized = normalize(advantages, all_true, all_true, processes)
            yield batch._replace(advantages=th.as_tensor(normalized.flatten()).to(batch.advantages))


#: A rollout is recorded into one of these; the update reads from it
Recorder = VPGBufferMixin | RolloutBufferAdapter


def adapt_buffer(buffer: RolloutBuffer, formulation: Formulation, policy: ActorCriticPolicy) -> Recorder:
    """:return: the buffer itself if it is derived from VPG's, else an adapter"""
    if isinstance(buffer, VPGBufferMixin):
        buffer.formulation = formulation
        return buffer
    return RolloutBufferAdapter(buffer, formulation, policy)
