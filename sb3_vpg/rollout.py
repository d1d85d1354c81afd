"""
Collect rollouts of a fixed length or of whole episodes, in one loop.

Why not SB3's ``OnPolicyAlgorithm.collect_rollouts``?

- It adds ``gamma V(terminal observation)`` to the stored reward at a time limit, and bootstraps the last segment with
  ``V(s_T)``, even if no value function is trained.
- It evaluates the value network and the log probabilities at every step.
- Its rollouts have a fixed length.

This loop keeps SB3's interface to callbacks, environments, policies and buffers.
"""

import copy
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, is_vecenv_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_vpg.buffers import Recorder, VPGBufferMixin, adapt_buffer
from sb3_vpg.common.checkpoint import ResumableAlgorithm
from sb3_vpg.common.collectives import SINGLE_PROCESS, SingleProcess
from sb3_vpg.common.faults import LOST_WORKER_ERRORS, discard_answers, find_failed_environment, is_raised_by
from sb3_vpg.common.policy_inputs import METHOD, checked_masks
from sb3_vpg.common.policy_runner import PolicyRunner, make_policy_runner
from sb3_vpg.common.recurrent_runner import States, is_finite, make_recurrent_runner, zero_states
from sb3_vpg.keywords import Plan


class RolloutCollector(ResumableAlgorithm):
    """
    An on-policy algorithm with VPG's rollouts. The subclass sets before ``learn``:

    - ``plan``: length and kind of the rollouts, and whether values are needed
    - ``processes``: the processes that train together, each with its own environments
    """

    plan: Plan
    processes: SingleProcess = SINGLE_PROCESS
    #: The buffer, or an adapter around it, that holds the last rollout
    recorder: Recorder
    #: Whether the environments give action masks, see :class:`sb3_vpg.maskable.MaskableVPG`
    use_masking = False

    #: If whole episodes are collected, a longer episode raises an error: it may never end
    max_episode_steps = 100_000

    def _setup_model(self) -> None:
        super()._setup_model()
        self.recorder = adapt_buffer(self.rollout_buffer, self.plan.formulation, self.policy)
        # Whether an environment was stepped since all of them were reset
        self._stepped_since_reset = True
        # Index of the next step of each environment within its episode; kept when training continues
        if np.shape(getattr(self, "_episode_steps", ())) != (self.n_envs,):
            self._episode_steps = np.zeros(self.n_envs, dtype=np.int64)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "plan", "processes", "recorder", "_vec_normalize_backup"]

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._backup_vec_normalize()
        before = self._last_obs
        try:
            discard_answers(self.env)  # type: ignore[arg-type]
            total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        except BaseException as error:
            self._last_obs = None  # They may have been reset
            if isinstance(error, LOST_WORKER_ERRORS) and is_raised_by(self.env, error):  # type: ignore[arg-type]
                self._raise_environment_error(self.env, error)  # type: ignore[arg-type]
            raise
        self._stepped_since_reset = self._stepped_since_reset and self._last_obs is before
        return total_timesteps, callback

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """
        Collect a rollout with the current policy. Its length depends on ``partial_episodes`` and ``n_episodes``:

        - "bootstrap", "truncate": ``n_rollout_steps`` steps of each environment
        - "finish": each environment starts from a reset and is done when an episode ends after that many steps or more
        - ``n_episodes``: each environment starts from a reset and is done after that many episodes

        An environment that is done continues to be stepped until all are done. These steps are not recorded, but count as
        timesteps.

        Callbacks see the same local variables as in SB3, but ``log_probs`` and ``values`` are None in most cases. They are
        computed at each step if the policy has its own ``forward()`` or the buffer is not derived from VPG's; ``values`` also
        if the formulation has a value function and actor and critic share layers of features, or the policy is recurrent.

        :param env: The training environment
        :param callback: Callback called at each step and at the beginning and end of the rollout
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of steps to collect per environment, see above
        :return: False if the callback ended the training
        :raises ValueError: if an observation, action, reward or value is not finite
        :raises RuntimeError: if an environment raises or its worker process exits; if whole episodes are collected and an
            episode is longer than ``max_episode_steps``; if another rank raises
        """
        with self.processes.propagate_errors():
            try:
                return self._collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
            except BaseException:
                # The environments may be a step ahead. If training continues, they are reset
                self._last_obs = None
                raise

    def _collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """:meth:`collect_rollouts` of this rank."""
        self.policy.set_training_mode(False)
        # Called before any random number is drawn: a model that is saved here resumes with the same rollout
        callback.on_rollout_start()
        recorder = self.recorder = adapt_buffer(rollout_buffer, self.plan.formulation, self.policy)
        self._start_rollout(env)
        runner = self._make_runner()
        fast_runner = runner if runner.samples_actions and not recorder.needs_log_probs else None
        # Values are computed in one batch after the rollout, unless features that actor and critic share are computed anyway
        values_at_each_step = self.plan.uses_value_function and (fast_runner is None or fast_runner.values_with_actions)

        n_steps = 0
        n_finished = np.zeros(env.num_envs, dtype=np.int64)
        recording = np.ones(env.num_envs, dtype=bool)
        reset_steps = self._reset_steps(env)

        while recording.any():
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)

            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            inputs = self._policy_inputs(env)
            actions, values, log_probs = self._sample_actions(obs_tensor, fast_runner, values_at_each_step, inputs)
            clipped_actions = self._clip_actions(actions)

            self._stepped_since_reset = True
            try:
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            except Exception as error:
                self._raise_environment_error(env, error)
            # A copy (environments may reuse the array) with dtype bool (it is used as a mask)
            dones = np.array(dones, dtype=bool)
            self.num_timesteps += env.num_envs

            callback.update_locals(locals())
            if not callback.on_step():
                # SB3 does not store the state here. With it, training can continue from this step
                self._advance(new_obs, dones | reset_steps)
                return self._end_rollout(False, (n_steps + 1) * env.num_envs)

            n_steps += 1
            self._record(actions, rewards, values, log_probs, dones, infos, recording & ~reset_steps, inputs)
            self._advance(new_obs, dones | reset_steps)
            self._check_finite("observation", new_obs)

            n_finished += dones
            recording = self._still_recording(recording, n_steps, n_rollout_steps, n_finished, dones)

        # The name by which A2C's callbacks find V of the last observation
        values = self._finish_recording(new_obs, dones, runner, values_at_each_step)
        if not self._end_rollout(True, n_steps * env.num_envs):
            return False
        self._compute_advantages(values, dones, runner)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _still_recording(
        self, recording: np.ndarray, n_steps: int, n_rollout_steps: int, n_finished: np.ndarray, dones: np.ndarray
    ) -> np.ndarray:
        """
        :param recording: whether the last step of each environment was recorded, shape (N,)
        :param n_steps: number of steps of each environment so far
        :param n_rollout_steps: minimum number of steps of each environment in a rollout
        :param n_finished: number of episodes that have ended in each environment, shape (N,)
        :param dones: whether the last step ended an episode, shape (N,)
        :return: whether the next step of each environment will be recorded, shape (N,)
        """
        if not self.plan.partial_episodes.whole_episodes:
            return recording & (n_steps < n_rollout_steps)
        if n_steps > self.max_episode_steps:
            self._check_episode_length(recording & ~dones)
        n_episodes = self.plan.n_episodes
        complete = n_steps >= n_rollout_steps if n_episodes is None else n_finished >= n_episodes
        return recording & ~(dones & complete)

    def _start_rollout(self, env: VecEnv) -> None:
        """Empty the buffer and, if the rollout consists of whole episodes, reset the environments."""
        self._episode_steps[self._last_episode_starts] = 0
        self._check_finite("observation", self._last_obs)
        self._backup_vec_normalize()
        if self.plan.partial_episodes.whole_episodes and self._stepped_since_reset:
            self._episode_steps[:] = 0
            try:
                self._last_obs = env.reset()  # type: ignore[assignment]
            except Exception as error:
                self._raise_environment_error(env, error)
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
            self._check_finite("observation", self._last_obs)

        self.recorder.reset()
        self.recorder.first_steps = self._episode_steps.copy()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)

    def _reset_steps(self, env: VecEnv) -> np.ndarray:
        """
        :return: whether each environment has spent the last step on its reset, shape (N,), updated in place at each step.
            Such a step is not recorded. See :attr:`NativeVecEnv.reset_steps
            <sb3_vpg.envs.native_vec_env.NativeVecEnv.reset_steps>`
        :raises ValueError: if there can be such steps, and the buffer has no mask of recorded steps, all steps of a rollout
            may be such steps, or frames are stacked, which would begin with the end of the episode before
        """
        reset_steps = getattr(env, "reset_steps", None)
        if reset_steps is None:
            return np.zeros(env.num_envs, dtype=bool)
        if not isinstance(self.recorder, VPGBufferMixin):
            raise ValueError(
                f"rollout_buffer_class={type(self.rollout_buffer).__name__} is not allowed with an environment that resets in "
                "the next step (AutoresetMode.NEXT_STEP); allowed: VPG's own buffers"
            )
        allowed = "is not allowed with an environment that resets in the next step; allowed: AutoresetMode.SAME_STEP"
        if self.n_steps == 1 and not self.plan.partial_episodes.whole_episodes:
            raise ValueError(f"n_steps=1 {allowed}, or a larger n_steps")
        if is_vecenv_wrapped(env, VecFrameStack):
            raise ValueError(f"VecFrameStack {allowed}")
        return reset_steps

    def _policy_inputs(self, env: VecEnv) -> dict[str, np.ndarray]:
        """
        :return: inputs of the policy in addition to the observations, by keyword of its methods, arrays of shape (N, ...)
        :raises ValueError: if an environment allows no action
        """
        try:
            masks = env.env_method(METHOD) if self.use_masking else None
        except Exception as error:
            self._raise_environment_error(env, error)
        return {} if masks is None else {METHOD: checked_masks(masks, env, self.action_space)}

    def _sample_actions(
        self, obs: PyTorchObs, fast_runner: Any | None, with_values: bool, inputs: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, th.Tensor | None, th.Tensor | None]:
        """
        :param obs: observations of N environments
        :param fast_runner: samples the actions; None to call the policy itself
        :param with_values: whether the fast runner computes values
        :param inputs: further inputs of the policy
        :return: actions in the shape of the action space; values and log probabilities, None if not computed
        """
        shape = (-1, *self.action_space.shape)  # type: ignore[misc]
        if fast_runner is not None:
            actions, values = fast_runner.sample(obs, with_values, **inputs)
            return actions.reshape(shape), values, None
        with th.no_grad():
            action_tensor, values, log_probs = self.policy(obs, **inputs)
        return action_tensor.cpu().numpy().reshape(shape), values, log_probs

    def _clip_actions(self, actions: np.ndarray) -> np.ndarray:
        """:return: the sampled actions, clipped or unscaled to the bounds of the action space"""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        self._check_finite("action", actions)
        if self.policy.squash_output:
            # From [-1, 1] to the bounds of the action space
            return self.policy.unscale_action(actions)
        # Samples of a Gaussian are unbounded. The update uses the action before clipping
        return np.clip(actions, self.action_space.low, self.action_space.high)

    def _record(
        self,
        actions: np.ndarray,
        rewards: np.ndarray,
        values: th.Tensor | None,
        log_probs: th.Tensor | None,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        recording: np.ndarray,
        inputs: dict[str, np.ndarray],
    ) -> None:
        """Add one step of all environments to the episode statistics and to the buffer."""
        # Episodes that end after their environment is done are not recorded: mostly short, they would bias the statistics
        ended = (dones & recording).nonzero()[0].tolist()
        if ended:
            self._update_info_buffer([infos[env_index] for env_index in ended], dones[ended])
        if self.plan.uses_value_function:
            for env_index in ended:
                # See https://github.com/DLR-RM/stable-baselines3/issues/633
                terminal_obs = infos[env_index].get("terminal_observation")
                if terminal_obs is not None and infos[env_index].get("TimeLimit.truncated", False):
                    self._check_finite("terminal observation", terminal_obs, env_index)
                    self._add_time_limit(env_index, terminal_obs)
        else:
            values = None
        self.recorder.add(
            self._last_obs,  # type: ignore[arg-type]
            actions.reshape(len(dones), -1),
            rewards,
            self._last_episode_starts,  # type: ignore[arg-type]
            values,
            log_probs,
            recording,
            **inputs,
        )

    def _finish_recording(self, new_obs: VecEnvObs, dones: np.ndarray, runner: PolicyRunner, has_values: bool) -> th.Tensor:
        """
        Compute the values of the rollout, if the formulation has a value function and they were not computed at each step.

        :param new_obs: observations after the last step
        :param dones: whether the last step ended an episode, shape (N,)
        :param runner: runs the policy
        :param has_values: whether values were computed at each step
        :return: V of ``new_obs`` if the plan bootstraps, else zeros, shape (N,)
        """
        self.recorder.finish()
        self._check_finite_rows("reward", self.recorder.rewards)
        if self.plan.uses_value_function:
            if not has_values:
                self._compute_values(self.recorder, runner)  # type: ignore[arg-type]
            self._check_finite_rows("value", self.recorder.values)

        if not self.plan.partial_episodes.bootstrap:
            return th.zeros(len(dones))
        with th.no_grad():
            last_values = self._last_values(obs_as_tensor(new_obs, self.device), dones, runner)  # type: ignore[arg-type]
        self._check_finite("value", last_values.cpu().numpy())
        return last_values

    def _end_rollout(self, continue_training: bool, n_steps: int) -> bool:
        """
        Add the steps of the other ranks to ``num_timesteps``.

        :param continue_training: whether training continues in this rank
        :param n_steps: number of steps of this rank in the rollout; ``num_timesteps`` includes them
        :return: whether training continues in all ranks
        """
        continue_training, n_steps_of_all = self.processes.end_rollout(continue_training, n_steps, self._vec_normalize_env)
        self.num_timesteps += n_steps_of_all - n_steps
        return continue_training

    def _compute_advantages(self, last_values: th.Tensor, dones: np.ndarray, runner: PolicyRunner) -> None:
        terminal_obs = self.recorder.terminal_observations()
        terminal_values = None
        if terminal_obs is not None:
            # V(terminal observation) at each time limit of the rollout
            with th.no_grad():
                terminal_values = self._terminal_values(obs_as_tensor(terminal_obs, self.device), runner).cpu().numpy()
        self.recorder.compute_returns_and_advantage(last_values, dones, terminal_values, self.processes)

    def _make_runner(self) -> PolicyRunner:
        return make_policy_runner(self.policy)

    def _add_time_limit(self, env_index: int, terminal_obs: VecEnvObs) -> None:
        self.recorder.add_time_limit(env_index, terminal_obs)  # type: ignore[arg-type]

    def _last_values(self, obs: PyTorchObs, dones: np.ndarray, runner: PolicyRunner) -> th.Tensor:
        """:return: V of the observations after the last step, shape (N,)"""
        return runner.values(obs)

    def _terminal_values(self, obs: PyTorchObs, runner: PolicyRunner) -> th.Tensor:
        """:return: V of the observations at the time limits of the rollout, in their order"""
        return runner.values(obs)

    def _advance(self, new_obs: VecEnvObs, dones: np.ndarray) -> None:
        """Store the state of the environments from which the next step starts."""
        self._last_obs = new_obs  # type: ignore[assignment]
        self._last_episode_starts = dones
        self._episode_steps += 1
        self._episode_steps[dones] = 0

    def _compute_values(self, rollout_buffer: VPGBufferMixin, runner: PolicyRunner) -> None:
        """Compute V(s_t) of all recorded steps in batches, and store them in the buffer."""
        flat_values = rollout_buffer.values.reshape(-1)
        for indices in rollout_buffer.batch_indices(rollout_buffer.chunk_size):
            with th.no_grad():
                values = runner.values(rollout_buffer.flat_observations(indices))
            flat_values[indices] = values.cpu().numpy()

    def _check_finite(self, quantity: str, array: VecEnvObs | None, env_index: int | None = None) -> None:
        """
        :param quantity: name of the quantity, for the error
        :param array: shape (N, ...), or without the first axis if ``env_index`` is given; can be a Dict observation
        :param env_index: index of the environment; None for all environments
        :raises ValueError: if a number is not finite
        """
        for part in map(np.asarray, array.values() if isinstance(array, dict) else (array,)):
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                if env_index is None:
                    env_index = int(np.argwhere(~np.isfinite(part))[0][0])
                    part = part[env_index]
                step = f"step {self._episode_steps[env_index]} of its episode (timestep {self.num_timesteps})"
                self._raise_non_finite(quantity, part, env_index, step)

    def _check_finite_rows(self, quantity: str, rows: np.ndarray) -> None:
        """:raises ValueError: if a number in ``rows``, shape (T, N), is not finite"""
        if not np.isfinite(rows).all():
            t, env_index = np.argwhere(~np.isfinite(rows))[0]
            step = f"step {t} of the rollout (which ended at timestep {self.num_timesteps})"
            self._raise_non_finite(quantity, rows[t, env_index], env_index, step)

    def _backup_vec_normalize(self) -> None:
        """Copy the statistics of VecNormalize, to restore them after an error: VecNormalize sees non-finite numbers first."""
        if self._vec_normalize_env is not None:
            names = ("obs_rms", "ret_rms")
            self._vec_normalize_backup = copy.deepcopy({name: getattr(self._vec_normalize_env, name, None) for name in names})

    def _raise_non_finite(self, quantity: str, value: Any, env_index: int, step: str) -> NoReturn:
        if self._vec_normalize_env is not None:
            vars(self._vec_normalize_env).update(self._vec_normalize_backup)
        raise ValueError(
            f"Non-finite {quantity} in environment {env_index} at {step}: {value}. No weight was changed, and the model can "
            "be saved. Possible causes: the environment, a wrapper (SB3's VecCheckNan finds it), or a too large learning rate."
        )

    def _raise_environment_error(self, env: VecEnv, error: Exception) -> NoReturn:
        index, cause = find_failed_environment(env, error)
        which = "An environment" if index is None else f"Environment {index}"
        step = "" if index is None else f" at step {self._episode_steps[index]} of its episode"
        failed = f"{which} failed{step} (timestep {self.num_timesteps})"
        raise RuntimeError(f"{failed}: {cause}. No weight was changed, and the model can be saved.") from error

    def _check_episode_length(self, recording: np.ndarray) -> None:
        """:raises RuntimeError: if a recorded episode is longer than ``max_episode_steps``"""
        env_index = int(np.argmax(self._episode_steps * recording))
        if self._episode_steps[env_index] <= self.max_episode_steps or not recording[env_index]:
            return
        raise RuntimeError(
            f"The episode in environment {env_index} has not ended after {self.max_episode_steps} steps, but the rollout "
            "consists of whole episodes. Give the environment a time limit (gymnasium.wrappers.TimeLimit), or use "
            "partial_episodes='truncate', or partial_episodes='bootstrap' with a value function. If episodes of this "
            "environment are longer than that, increase the model's `max_episode_steps`."
        )


class RecurrentRolloutCollector(RolloutCollector):
    """Rollouts of sb3-contrib's recurrent policies: the states of their LSTMs are kept from step to step."""

    policy: Any
    recorder: VPGBufferMixin
    #: States before the next step. Those of environments whose episode begins are not used
    _lstm_states: States
    #: States before the first step of the rollout
    _first_states: States

    def _start_rollout(self, env: VecEnv) -> None:
        super()._start_rollout(env)
        self.recorder.by_environment = True
        states = getattr(self, "_lstm_states", None)
        # After an error, they may be NaN
        if states is None or states.pi[0].shape[1] != env.num_envs or not is_finite(states):
            states = zero_states(self.policy, env.num_envs)
        # A loaded model may be on another device than the saved one
        self._lstm_states = self._first_states = states.to(self.device)
        self._states_at_time_limits: list[list[th.Tensor]] = []

    def _make_runner(self) -> PolicyRunner:
        return make_recurrent_runner(self.policy, self._first_states)

    def _policy_inputs(self, env: VecEnv) -> dict[str, np.ndarray]:
        starts = np.asarray(self._last_episode_starts, dtype=np.float32)
        return {"env_indices": np.arange(env.num_envs), "episode_starts": starts}

    def _sample_actions(
        self, obs: PyTorchObs, fast_runner: Any | None, with_values: bool, inputs: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, th.Tensor | None, th.Tensor | None]:
        starts = th.as_tensor(inputs["episode_starts"], device=self.device)
        if fast_runner is not None:
            actions, values, self._lstm_states = fast_runner.sample(obs, self._lstm_states, starts, with_values)
            return actions.reshape(-1, *self.action_space.shape), values, None  # type: ignore[misc]
        with th.no_grad():
            actions, values, log_probs, states = self.policy(obs, self._lstm_states, starts)
        self._lstm_states = States(*states)
        return actions.cpu().numpy(), values, log_probs

    def _add_time_limit(self, env_index: int, terminal_obs: VecEnvObs) -> None:
        super()._add_time_limit(env_index, terminal_obs)
        self._states_at_time_limits.append([part[:, env_index] for part in self._lstm_states.vf])

    def _terminal_values(self, obs: PyTorchObs, runner: PolicyRunner) -> th.Tensor:
        hidden, cell = (th.stack(parts, dim=1) for parts in zip(*self._states_at_time_limits))
        no_starts = th.zeros(hidden.shape[1], device=self.device)
        return self.policy.predict_values(obs, (hidden, cell), no_starts).flatten()

    def _last_values(self, obs: PyTorchObs, dones: np.ndarray, runner: PolicyRunner) -> th.Tensor:
        starts = th.as_tensor(dones, dtype=th.float32, device=self.device)
        return self.policy.predict_values(obs, self._lstm_states.vf, starts).flatten()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_first_states", "_states_at_time_limits"]
