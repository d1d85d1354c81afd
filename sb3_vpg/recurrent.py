"""VPG with memory, with sb3-contrib's recurrent policies."""

from typing import ClassVar

from sb3_contrib.common.recurrent import policies
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.rollout import RecurrentRolloutCollector
from sb3_vpg.vpg import VPG


class RecurrentVPG(RecurrentRolloutCollector, VPG):
    """
    Vanilla policy gradient with LSTMs. Usage is that of sb3-contrib's ``RecurrentPPO``. The update processes whole rollouts as
    sequences: the gradient goes back through time to the beginning of each episode, or of the rollout.

    At a time limit, V of the terminal observation is computed with the state that the critic's LSTM had there.

    :param policy: "MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy", or a subclass of sb3-contrib's
        ``RecurrentActorCriticPolicy``

    All other parameters are those of :class:`~sb3_vpg.vpg.VPG`. ``rollout_buffer_class`` must be one of VPG's own. Minibatches
    of the critic (``critic_batch_size``) have all steps of some environments.

    :raises ValueError: as for VPG
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpLstmPolicy": policies.RecurrentActorCriticPolicy,
        "CnnLstmPolicy": policies.RecurrentActorCriticCnnPolicy,
        "MultiInputLstmPolicy": policies.RecurrentMultiInputActorCriticPolicy,
    }
    policy: policies.RecurrentActorCriticPolicy

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, policies.RecurrentActorCriticPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not allowed; allowed: a subclass of RecurrentActorCriticPolicy"
            )
        super()._setup_model()
        if not isinstance(self.rollout_buffer, VPGBufferMixin):
            name = type(self.rollout_buffer).__name__
            raise ValueError(f"rollout_buffer_class={name} is not allowed with a recurrent policy; allowed: None")

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
