"""
Collecting rollouts: fixed length or whole episodes, in one loop.

SB3's ``OnPolicyAlgorithm.collect_rollouts`` adds ``gamma V(terminal observation)`` to the stored reward at a time limit and
bootstraps the last piece with ``V(s_T)``, even where nothing trains the value function; it evaluates the value network and
the log probabilities at every step; and it can collect pieces of fixed length only. Hence a loop of our own. It keeps SB3's
contract with callbacks, environments, policies and buffers.
"""

import copy
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_vpg.buffers import NumpyObs, VPGBufferMixin
from sb3_vpg.distributed import OneProcess
from sb3_vpg.failures import LOST_WORKER, failed_environment
from sb3_vpg.passes import Passes, SeparatePasses, passes_of


class RolloutCollector(OnPolicyAlgorithm):
    """
    An on-policy algorithm with VPG's rollouts. Set by the subclass before ``learn``:

    - ``uses_value_function``: whether values are needed at all
    - ``partial_episodes_mode``: "bootstrap", "finish" or "truncate"
    - ``n_episodes``: None, or the number of whole episodes of each environment
    - ``processes``: those that train together, each with environments of its own, if there are several
    """

    uses_value_function: bool
    partial_episodes_mode: str
    n_episodes: int | None
    processes: OneProcess = OneProcess()

    #: A longer episode is taken for one that never ends, where whole episodes are asked for.
    max_episode_steps = 100_000

    def _setup_model(self) -> None:
        super()._setup_model()
        # Whether the environments have moved since they were all reset
        self._moved = True
        # Index within its episode of the next step of each environment; kept when training is continued
        if np.shape(getattr(self, "_episode_steps", ())) != (self.n_envs,):
            self._episode_steps = np.zeros(self.n_envs, dtype=np.int64)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._keep_statistics()
        before = self._last_obs
        try:
            total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        except LOST_WORKER as error:
            self._raise_failed(self.env, error)  # type: ignore[arg-type]
        if self._last_obs is not before:
            self._moved = False
        return total_timesteps, callback

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect a rollout with the current policy. What it is made of depends on ``partial_episodes`` and ``n_episodes``:

        - "bootstrap", "truncate": ``n_rollout_steps`` steps of each environment
        - "finish": every environment starts fresh and goes on until it has ``n_rollout_steps`` steps and its current episode
          has ended
        - ``n_episodes``: every environment starts fresh and goes on until it has that many whole episodes

        What an environment does while it waits for the others is not recorded, but counts as timesteps.

        Callbacks see the same local variables as with SB3. ``log_probs`` is None at each step, unless the policy has its own
        ``forward()`` or the buffer is not one of VPG's; so is ``values``, unless actor and critic share a features extractor.

        :param env: The training environment
        :param callback: Callback called at each step and at the beginning and end of the rollout
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of steps to collect per environment, see above
        :return: False if the callback ended the training
        :raises ValueError: if an observation, action, reward or value is not finite
        :raises RuntimeError: if an environment raises or its process ends; if an episode does not end within
            ``max_episode_steps``, where whole episodes are asked for; if another rank raises
        """
        with self.processes.failing_together():
            return self._collect(env, callback, rollout_buffer, n_rollout_steps)

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
        """:meth:`collect_rollouts` of this process"""
        if self.policy.training:
            self.policy.set_training_mode(False)
        # Before anything is drawn for the rollout: a model that is saved here goes on with the same rollout
        callback.on_rollout_start()
        passes = passes_of(self.policy)
        separate = passes if isinstance(passes, SeparatePasses) and isinstance(rollout_buffer, VPGBufferMixin) else None
        # Values are computed in one go after the rollout, unless the features they need are there at each step
        values_at_each_step = self.uses_value_function and (separate is None or separate.shares_features)
        whole_episodes = self.n_episodes is not None or self.partial_episodes_mode == "finish"

        self._start_rollout(env, rollout_buffer, fresh=whole_episodes)

        n_steps = 0
        n_finished = np.zeros(env.num_envs, dtype=np.int64)
        recording = np.ones(env.num_envs, dtype=bool)
        collecting = True

        while collecting:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            actions, values, log_probs = self._sample_actions(obs_tensor, separate, values_at_each_step)
            clipped_actions = self._clip_actions(actions)

            try:
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            except Exception as error:
                self._raise_failed(env, error)

            # A copy, and of this dtype: they are used as a mask
            dones = np.array(dones, dtype=bool)
            self.num_timesteps += env.num_envs

            callback.update_locals(locals())
            if not callback.on_step():
                # Unlike SB3, so that training can go on from here
                self._move_on(new_obs, dones)
                return self._end_rollout(False, (n_steps + 1) * env.num_envs)

            n_steps += 1
            self._record(rollout_buffer, actions, rewards, values, log_probs, dones, infos, recording)
            self._move_on(new_obs, dones)
            self._check_finite("observation", new_obs)

            if not whole_episodes:
                collecting = n_steps < n_rollout_steps
            elif dones.any():
                n_finished += dones
                complete = n_steps >= n_rollout_steps if self.n_episodes is None else n_finished >= self.n_episodes
                recording = recording & ~(dones & complete)
                collecting = bool(recording.any())
            if whole_episodes and n_steps > self.max_episode_steps:
                self._check_endless(recording)

        last_values = self._finish_rollout(rollout_buffer, new_obs, dones, passes, values_at_each_step)
        if not self._end_rollout(True, n_steps * env.num_envs):
            return False
        self._compute_advantages(rollout_buffer, last_values, dones, passes)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _start_rollout(self, env: VecEnv, rollout_buffer: RolloutBuffer, fresh: bool) -> None:
        """Empty the buffer and, if all episodes must be ``fresh``, reset the environments."""
        self._check_finite("observation", self._last_obs)
        self._keep_statistics()
        if fresh and self._moved:
            try:
                self._last_obs = env.reset()  # type: ignore[assignment]
            except Exception as error:
                self._raise_failed(env, error)
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
            self._check_finite("observation", self._last_obs)
        self._episode_steps[self._last_episode_starts] = 0

        rollout_buffer.reset()
        if isinstance(rollout_buffer, VPGBufferMixin):
            rollout_buffer.first_steps = self._episode_steps.copy()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)

    def _sample_actions(
        self, obs: PyTorchObs, passes: SeparatePasses | None, with_values: bool
    ) -> tuple[np.ndarray, th.Tensor | None, th.Tensor | None]:
        """
        :param passes: None for a call of the policy
        :return: actions as the environment shapes them; values and log probabilities, where they have been computed
        """
        shape = (-1, *self.action_space.shape)  # type: ignore[misc]
        if passes is not None:
            actions, values = passes.sample(obs, with_values)
            return actions.reshape(shape), values, None
        with th.no_grad():
            action_tensor, values, log_probs = self.policy(obs)
        return action_tensor.cpu().numpy().reshape(shape), values, log_probs

    def _clip_actions(self, actions: np.ndarray) -> np.ndarray:
        """From what the policy sampled to what the environment takes."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        self._check_finite("action", actions)
        if self.policy.squash_output:
            # Back from [-1, 1] to the bounds of the environment
            return self.policy.unscale_action(actions)
        # A Gaussian is unbounded; the gradient is that of the action before clipping
        return np.clip(actions, self.action_space.low, self.action_space.high)

    def _record(
        self,
        rollout_buffer: RolloutBuffer,
        actions: np.ndarray,
        rewards: np.ndarray,
        values: th.Tensor | None,
        log_probs: th.Tensor | None,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        recording: np.ndarray,
    ) -> None:
        """Add one step of all environments to the episode statistics and to the buffer."""
        own_buffer = rollout_buffer if isinstance(rollout_buffer, VPGBufferMixin) else None
        # Episodes that end while others are waited for are the short ones: they are not recorded, nor in the statistics
        ended = (dones & recording).nonzero()[0].tolist()
        if ended:
            self._update_info_buffer([infos[env_index] for env_index in ended], dones[ended])
        if self.uses_value_function:
            for env_index in ended:
                # See https://github.com/DLR-RM/stable-baselines3/issues/633
                terminal_obs = infos[env_index].get("terminal_observation")
                if terminal_obs is None or not infos[env_index].get("TimeLimit.truncated", False):
                    continue
                self._check_finite("terminal observation", terminal_obs, env_index)
                if own_buffer is not None:
                    own_buffer.add_time_limit(env_index, terminal_obs)
                else:
                    rewards[env_index] += self.gamma * self._value_of(terminal_obs)

        step = (self._last_obs, actions.reshape(len(dones), -1), rewards, self._last_episode_starts)
        if own_buffer is not None:
            own_buffer.add(*step, values if self.uses_value_function else None, log_probs, recording)  # type: ignore[arg-type]
        else:
            rollout_buffer.add(*step, values, log_probs)  # type: ignore[arg-type]

    def _finish_rollout(
        self, rollout_buffer: RolloutBuffer, new_obs: VecEnvObs, dones: np.ndarray, passes: Passes, has_values: bool
    ) -> th.Tensor:
        """
        Fill in values, where the formulation has a value function and they are not there yet.

        :return: V of the observations after the last step, where they are to be bootstrapped; else zeros, shape (N,)
        """
        own_buffer = rollout_buffer if isinstance(rollout_buffer, VPGBufferMixin) else None
        if own_buffer is not None:
            own_buffer.finish()
        self._check_finite_rows("reward", rollout_buffer.rewards)
        if self.uses_value_function:
            if own_buffer is not None and not has_values:
                self._fill_in_values(own_buffer, passes)
            self._check_finite_rows("value", rollout_buffer.values)

        if not self.uses_value_function or self.partial_episodes_mode != "bootstrap":
            return th.zeros(len(dones))
        with th.no_grad():
            last_values = passes.values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
        self._check_finite("value", last_values.cpu().numpy())
        return last_values

    def _end_rollout(self, goes_on: bool, n_steps: int) -> bool:
        """
        :param goes_on: whether this process wants to go on
        :param n_steps: its steps in the rollout, which have been counted already
        :return: whether all processes want to go on
        """
        goes_on, n_steps_of_all = self.processes.end_rollout(goes_on, n_steps, self._vec_normalize_env)
        self.num_timesteps += n_steps_of_all - n_steps
        return goes_on

    def _compute_advantages(
        self, rollout_buffer: RolloutBuffer, last_values: th.Tensor, dones: np.ndarray, passes: Passes
    ) -> None:
        if isinstance(rollout_buffer, VPGBufferMixin):
            terminal_values = self._terminal_values(rollout_buffer, passes)
            rollout_buffer.compute_returns_and_advantage(last_values, dones, terminal_values, self.processes)
        else:
            rollout_buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)

    def _move_on(self, new_obs: VecEnvObs, dones: np.ndarray) -> None:
        """The next step begins where the last one ended."""
        self._moved = True
        self._last_obs = new_obs  # type: ignore[assignment]
        self._last_episode_starts = dones
        self._episode_steps += 1
        self._episode_steps[dones] = 0

    def _fill_in_values(self, rollout_buffer: VPGBufferMixin, passes: Passes) -> None:
        """Compute V(s_t) of all recorded steps, in batches."""
        flat_values = rollout_buffer.values.reshape(-1)
        for indices in rollout_buffer.batch_indices(rollout_buffer.chunk_size):
            with th.no_grad():
                values = passes.values(rollout_buffer.flat_observations(indices))
            flat_values[indices] = values.cpu().numpy()

    def _terminal_values(self, rollout_buffer: VPGBufferMixin, passes: Passes) -> np.ndarray | None:
        """V(terminal observation) at each time limit of the rollout."""
        terminal_obs = rollout_buffer.terminal_observations()
        if terminal_obs is None:
            return None
        with th.no_grad():
            return passes.values(obs_as_tensor(terminal_obs, self.device)).cpu().numpy()

    def _value_of(self, obs: NumpyObs) -> float:
        """V(s) of a single observation."""
        with th.no_grad():
            return self.policy.predict_values(self.policy.obs_to_tensor(obs)[0]).item()

    def _check_finite(self, quantity: str, array: VecEnvObs | None, env_index: int | None = None) -> None:
        """
        :param array: shape (N, ...), or without the first axis if ``env_index`` is given; Dict observations too
        :raises ValueError: if it is not finite
        """
        for part in array.values() if isinstance(array, dict) else (array,):
            part = np.asarray(part)
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                if env_index is None:
                    env_index = int(np.argwhere(~np.isfinite(part))[0][0])
                    part = part[env_index]
                self._raise_non_finite(quantity, part, env_index, f"step {self._episode_steps[env_index]} of its episode")

    def _check_finite_rows(self, quantity: str, rows: np.ndarray) -> None:
        """:raises ValueError: if one of the numbers in ``rows`` of shape (T, N) is not finite"""
        if not np.isfinite(rows).all():
            step, env_index = np.argwhere(~np.isfinite(rows))[0]
            self._raise_non_finite(quantity, rows[step, env_index], env_index, f"step {step} of the rollout")

    def _keep_statistics(self) -> None:
        """Remember what VecNormalize knows, which has seen a number that is not finite before it can be refused."""
        if self._vec_normalize_env is not None:
            names = ("obs_rms", "ret_rms")
            self._statistics = copy.deepcopy({name: getattr(self._vec_normalize_env, name, None) for name in names})

    def _raise_non_finite(self, quantity: str, value: Any, env_index: int, step: str) -> NoReturn:
        # Continuing to train must begin with a reset
        self._last_obs = None
        if self._vec_normalize_env is not None:
            vars(self._vec_normalize_env).update(self._statistics)
        raise ValueError(
            f"Non-finite {quantity} in environment {env_index} at {step} (timestep {self.num_timesteps}): {value}. "
            "No weight has been changed by it, the model can be saved. Look for the cause in the environment, its wrappers or "
            "a too large learning rate; stable_baselines3.common.vec_env.VecCheckNan helps to find it."
        )

    def _raise_failed(self, env: VecEnv, error: Exception) -> NoReturn:
        index, what = failed_environment(env, error)
        which = "An environment" if index is None else f"Environment {index}"
        step = "" if index is None else f" at step {self._episode_steps[index]} of its episode"
        # Continuing to train must begin with a reset
        self._last_obs = None
        raise RuntimeError(
            f"{which} failed{step} (timestep {self.num_timesteps}): {what}. "
            "No weight has been changed by it, the model can be saved."
        ) from error

    def _check_endless(self, recording: np.ndarray) -> None:
        """:raises RuntimeError: if the episode of an environment that is being recorded is too long"""
        env_index = int(np.argmax(self._episode_steps * recording))
        if self._episode_steps[env_index] <= self.max_episode_steps or not recording[env_index]:
            return
        raise RuntimeError(
            f"The episode in environment {env_index} has not ended after {self.max_episode_steps} steps, but the rollout is "
            "to be made of whole episodes. Give the environment a time limit (gymnasium.wrappers.TimeLimit), or use "
            "partial_episodes='truncate', or partial_episodes='bootstrap' with a value function; if episodes really are that "
            "long, raise the model's `max_episode_steps`."
        )
