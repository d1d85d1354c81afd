"""VPG for environments in which some actions are not allowed, with sb3-contrib's maskable policies."""

from typing import ClassVar

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable import policies
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_vpg.buffers import VPGBufferMixin
from sb3_vpg.common.policy_inputs import METHOD, check_has_masks, mask_sizes
from sb3_vpg.vpg import VPG


class MaskableVPG(VPG):
    """
    Vanilla policy gradient with invalid action masking. Usage is that of sb3-contrib's ``MaskablePPO``: the environment has a
    method ``action_masks()``, or is wrapped in ``ActionMasker``. The distributions of the update are those of the rollout:
    actions that were not allowed have probability 0, and do not contribute to log probabilities, entropy and KL divergence.

    Paper: https://arxiv.org/abs/2006.14171

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a subclass of sb3-contrib's ``MaskableActorCriticPolicy``

    Action spaces: Discrete, MultiDiscrete and MultiBinary. All other parameters are those of
    :class:`~sb3_vpg.vpg.VPG`; gSDE does not apply.

    :raises ValueError: as for VPG; in ``learn``, if an environment has no masks, or allows no action
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": policies.MaskableActorCriticPolicy,
        "CnnPolicy": policies.MaskableActorCriticCnnPolicy,
        "MultiInputPolicy": policies.MaskableMultiInputActorCriticPolicy,
    }
    supported_action_spaces = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    policy: policies.MaskableActorCriticPolicy  # type: ignore[assignment]
    use_masking = True

    def _setup_model(self) -> None:
        mask_sizes(self.action_space)
        if not issubclass(self.policy_class, policies.MaskableActorCriticPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not allowed; allowed: a subclass of MaskableActorCriticPolicy"
            )
        policy_class = self.policy_class
        # SB3 passes use_sde, which these policies do not have
        self.policy_class = lambda *args, use_sde, **kwargs: policy_class(*args, **kwargs)  # type: ignore[assignment]
        try:
            super()._setup_model()
        finally:
            self.policy_class = policy_class
        with_masks = (VPGBufferMixin, MaskableRolloutBuffer, MaskableDictRolloutBuffer)
        if not isinstance(self.rollout_buffer, with_masks):
            raise ValueError(
                f"rollout_buffer_class={type(self.rollout_buffer).__name__} is not allowed; allowed: None, or a buffer of "
                "this package or of sb3_contrib.common.maskable"
            )

    def learn(  # type: ignore[override]
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str = "MaskableVPG",
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> "MaskableVPG":
        """
        :param use_masking: whether the environments give action masks; False to train without
        """
        self.use_masking = use_masking
        if use_masking and self.env is not None:
            check_has_masks(self.env)
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        :param action_masks: True where an action is allowed, shape (N, entries of a mask). None for the masks that the
            observation carries, as in the zoo's evaluations; without these, or if the model was trained with
            ``use_masking=False``, all actions are allowed
        """
        # sb3-contrib's MaskablePPO, which uses this method in the zoo, has no such attribute
        if action_masks is None and getattr(self, "use_masking", True):
            action_masks = getattr(observation, METHOD, None)
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)
