"""
Policies for VPG: aliases of SB3's policies, a logistic policy, a Gaussian policy with a limited mean, and a schedule for the
noise of Gaussian policies.
"""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_vpg.common.checks import check_number
from sb3_vpg.common.progress_bar import progress_of

MlpPolicy = ActorCriticPolicy
CnnPolicy = ActorCriticCnnPolicy
MultiInputPolicy = MultiInputActorCriticPolicy


class LogisticDistribution(CategoricalDistribution):
    """
    Distribution of two actions with one logit z: P(a = 1) = 1 / (1 + exp(-z)).

    :param bias: Whether the layer that computes z has a bias
    """

    def __init__(self, bias: bool = False):
        super().__init__(action_dim=2)
        self.bias = bias

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        return nn.Linear(latent_dim, 1, bias=self.bias)

    def proba_distribution(self, action_logits: th.Tensor) -> "LogisticDistribution":
        # A softmax over (0, z) is the logistic function of z
        return super().proba_distribution(nn.functional.pad(action_logits, (1, 0)))


class LogisticPolicy(ActorCriticPolicy):
    """
    Logistic regression as a policy for two actions: P(a = 1 | s) = sigmoid(theta . x(s) [+ b]), where x(s) is the flattened
    observation. On CartPole, theta has 4 weights. The value function, if the formulation uses one, is also linear.

    :param observation_space: Observation space
    :param action_space: Action space, ``Discrete(2)``
    :param lr_schedule: Learning rate schedule
    :param net_arch: Sizes of the hidden layers before logit and value, as in ``ActorCriticPolicy``. Default: no hidden layers
    :param bias: Whether the logit has a bias
    :param kwargs: Other arguments of ``ActorCriticPolicy``
    :raises ValueError: if the action space is not ``Discrete(2)``, or the observation space is ``Dict``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        bias: bool = False,
        **kwargs: Any,
    ):
        if not (isinstance(action_space, spaces.Discrete) and action_space.n == 2):
            raise ValueError(f"LogisticPolicy supports two actions, Discrete(2), not {action_space}")
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(f"LogisticPolicy does not support Dict observations: {observation_space}")
        self.bias = bias
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[] if net_arch is None else net_arch, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.action_dist = LogisticDistribution(self.bias)
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "bias": self.bias}


class _Affine(nn.Module):
    """
    The function a + b x.

    :param a: offset, shape (n_actions,)
    :param b: factor, shape (n_actions,)
    """

    a: th.Tensor
    b: th.Tensor

    def __init__(self, a: th.Tensor, b: th.Tensor):
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.a + self.b * x


class TanhMeanPolicy(ActorCriticPolicy):
    """
    Gaussian policy, with or without gSDE, whose mean stays within the limits of the action space:

        mean = (high + low) / 2 + (high - low) / 2 tanh(z),

    where z is the output of the last layer. With ``MlpPolicy``, the mean can grow until all actions are clipped to the same
    limit, whatever their noise is. Then hardly any gradient leads back. SB3's SAC clips the mean, too, when it uses gSDE
    (``clip_mean``). The noise is not limited; as usual, actions beyond the limits are clipped.

    :param observation_space: Observation space
    :param action_space: Action space, a ``Box`` with finite limits
    :param lr_schedule: Learning rate schedule
    :param args: Other arguments of ``ActorCriticPolicy``
    :param kwargs: Other arguments of ``ActorCriticPolicy``
    :raises ValueError: if the action space is not a ``Box`` with finite limits, or with ``squash_output``
    """

    action_space: spaces.Box

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, *args: Any, **kwargs: Any
    ):
        if not (isinstance(action_space, spaces.Box) and action_space.is_bounded()):
            raise ValueError(f"TanhMeanPolicy needs a Box action space with finite limits, not {action_space}")
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        if self.squash_output:
            raise ValueError("TanhMeanPolicy limits the mean of the actions. Do not use it with squash_output=True")

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        low, high = (th.tensor(limit.flatten()).float() for limit in (self.action_space.low, self.action_space.high))
        self.action_net = nn.Sequential(self.action_net, nn.Tanh(), _Affine((high + low) / 2, (high - low) / 2))


class LogStdSchedule(BaseCallback):
    """
    Decreases the standard deviation of a Gaussian policy during training, instead of learning it: before each rollout,

        log std = final + p (initial - final)

    for all actions, where p is the remaining progress, from 1 to 0. With one policy step per rollout, the standard deviation
    that is learned hardly decreases. Then the actions of training and the deterministic ones of an evaluation differ much, and
    so may their returns. Works with VPG, and with SB3's other on-policy algorithms without gSDE.

    ``log_std`` is frozen until training ends. After an interruption (Ctrl-C, an error), it stays so until the end of a further
    training with this callback, or until ``model.policy.log_std.requires_grad_(True)``.

    :param initial: log standard deviation at the start of training. Typical: -1 to 0. Larger: more exploration.
    :param final: log standard deviation at the end. Typical: -3 to -1. Smaller: less difference between stochastic and
        deterministic actions.
    :raises ValueError: if a number is not finite; when training starts, if the policy has no ``log_std``
    """

    def __init__(self, initial: float = -0.5, final: float = -2.0, verbose: int = 0):
        super().__init__(verbose)
        check_number("initial", initial)
        check_number("final", final)
        self.initial = initial
        self.final = final

    def _on_training_start(self) -> None:
        if not hasattr(self.model.policy, "log_std"):
            raise ValueError(f"LogStdSchedule needs a Gaussian policy; the action space is {self.model.action_space}")
        log_std: Any = self.model.policy.log_std
        # A training that was interrupted has left it frozen
        log_std.was_trained = getattr(log_std, "was_trained", log_std.requires_grad)
        self.log_std = log_std.requires_grad_(False)

    def _on_rollout_start(self) -> None:
        self.log_std.fill_(self.final + (1.0 - progress_of(self.model)) * (self.initial - self.final))

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # The zoo calls this a second time, or after an error with which training has not begun
        if hasattr(getattr(self, "log_std", None), "was_trained"):
            self.log_std.requires_grad_(self.log_std.was_trained)
            del self.log_std.was_trained
