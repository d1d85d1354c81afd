"""VPG with memory, with sb3-contrib's recurrent policies."""

from typing import ClassVar

import numpy as np
import torch as th
from sb3_contrib.common.recurrent import policies
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, PyTorchObs
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.common.policy_runner import FastPolicyRunner, PolicyRunner
from sb3_vpg.common.recurrent_runner import RecurrentRunner, States, zero_states
from sb3_vpg.vpg import VPG


class RecurrentVPG(VPG):
    """
    Vanilla policy gradient with LSTMs. Usage is that of sb3-contrib's ``RecurrentPPO``. The update processes whole rollouts as
    sequences: the gradient goes back through time to the beginning of each episode, or of the rollout.

    At a time limit, V of the terminal observation is computed with the state that the critic's LSTM had there.

    :param policy: "MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy", or a subclass of sb3-contrib's
        ``RecurrentActorCriticPolicy``

    All other parameters are those of :class:`~sb3_vpg.vpg.VPG`. ``rollout_buffer_class`` must be one of VPG's own. The logged
    KL divergence is an estimate. Minibatches of the critic (``critic_batch_size``) have all steps of some environments.

    :raises ValueError: as for VPG
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": policies.RecurrentActorCriticPolicy,
        "CnnLstmPolicy": policies.RecurrentActorCriticCnnPolicy,
        "MultiInputLstmPolicy": policies.RecurrentMultiInputActorCriticPolicy,
    }
    policy: policies.RecurrentActorCriticPolicy
    recorder: VPGBufferMixin

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, policies.RecurrentActorCriticPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not allowed; allowed: a subclass of RecurrentActorCriticPolicy"
            )
        if not (self.rollout_buffer_class is None or issubclass(self.rollout_buffer_class, VPGBufferMixin)):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class.__name__} is not allowed with a recurrent policy; "
                "allowed: None"
            )
        super()._setup_model()
        # States before the next step. Those of environments whose episode begins are not used
        states = getattr(self, "_lstm_states", None)
        if states is None or states.pi[0].shape[1] != self.n_envs:
            self._lstm_states = zero_states(self.policy, self.n_envs)

    def _start_rollout(self, env: VecEnv) -> None:
        super()._start_rollout(env)
        self.recorder.by_environment = True
        self._first_states = self._lstm_states
        self._states_at_time_limits: list[list[th.Tensor]] = []

    def _make_runner(self) -> PolicyRunner:
        return RecurrentRunner(self.policy, getattr(self, "_first_states", self._lstm_states))

    def _policy_inputs(self, env: VecEnv) -> dict[str, np.ndarray]:
        starts = np.asarray(self._last_episode_starts, dtype=np.float32)
        return {"env_indices": np.arange(env.num_envs), "episode_starts": starts}

    def _sample_actions(
        self, obs: PyTorchObs, fast_runner: FastPolicyRunner | None, with_values: bool, inputs: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, th.Tensor | None, th.Tensor | None]:
        starts = th.as_tensor(inputs["episode_starts"], device=self.device)
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
        return self.policy.predict_values(obs, (hidden, cell), no_starts).flatten()  # type: ignore[arg-type]

    def _last_values(self, obs: PyTorchObs, dones: np.ndarray, runner: PolicyRunner) -> th.Tensor:
        starts = th.as_tensor(dones, dtype=th.float32, device=self.device)
        return self.policy.predict_values(obs, self._lstm_states.vf, starts).flatten()  # type: ignore[arg-type]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_first_states", "_states_at_time_limits"]

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str = "RecurrentVPG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "RecurrentVPG":
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
