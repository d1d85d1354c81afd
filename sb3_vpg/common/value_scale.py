"""A bounded scale for the targets of the value regression."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_vpg.common.collectives import SingleProcess

#: Added to the variance, as in VecNormalize
EPSILON = 1e-8


class ValueScale:
    """
    The running standard deviation sigma of all value targets so far.

    While the critic is fitted, its output layer is divided by sigma, so that the network predicts V / sigma. Its targets are
    then y / sigma, with a standard deviation of about 1. Outside of the update, the network predicts V. So V does not change
    when sigma does (PopArt, van Hasselt et al., 2016, https://arxiv.org/abs/1602.07714). The mean is not shifted.
    """

    def __init__(self) -> None:
        self.targets = RunningMeanStd()
        #: sigma; 1 before the first update
        self.sigma = 1.0

    def update(self, targets: np.ndarray, processes: SingleProcess) -> None:
        """
        :param targets: value targets of this process, in any shape
        :param processes: the targets of all processes count
        """
        x = targets.astype(np.float64)
        count, total = processes.sum(np.array([x.size, x.sum()]))
        mean = total / count
        (squares,) = processes.sum(np.array([((x - mean) ** 2).sum()]))
        if not np.isfinite(squares):
            # The value loss is not finite either, which raises the error
            return
        self.targets.update_from_moments(mean, squares / count, count)
        self.sigma = float(np.sqrt(self.targets.var + EPSILON))

    @contextmanager
    def applied(self, policy: ActorCriticPolicy, targets: np.ndarray, processes: SingleProcess) -> Iterator[None]:
        """
        :meth:`update`, and a context in which the network predicts V / sigma. If it ends with an error before the output
        layer has changed, both are as before.

        :param policy: a policy whose ``value_net`` is a linear layer
        """
        before = {"targets": self.targets.copy(), "sigma": self.sigma}
        self.update(targets, processes)
        output_layer: list[th.Tensor] = list(policy.value_net.parameters())
        with th.no_grad():
            original = [parameter.clone() for parameter in output_layer]
            th._foreach_div_(output_layer, self.sigma)
            scaled = [parameter.clone() for parameter in output_layer]
        unchanged = False
        try:
            yield
        except BaseException:
            unchanged = all(map(th.equal, output_layer, scaled))
            raise
        finally:
            with th.no_grad():
                if unchanged:
                    th._foreach_copy_(output_layer, original)
                    vars(self).update(before)
                else:
                    th._foreach_mul_(output_layer, self.sigma)
                    for parameter, value in zip(output_layer, original):
                        if not parameter.requires_grad:
                            # Without rounding
                            parameter.copy_(value)


def scaled_values(model: Any) -> AbstractContextManager[None]:
    """
    :param model: VPG with a rollout
    :return: the context of its update: :meth:`ValueScale.applied` if it scales value targets
    """
    if not model.scale_value_targets:
        model.value_scale = ValueScale()
    elif model.plan.uses_value_function:
        check_linear_value_net(model.policy)
        return model.value_scale.applied(model.policy, model.recorder.recorded_returns, model.processes)
    return nullcontext()


def check_linear_value_net(policy: ActorCriticPolicy) -> None:
    """:raises ValueError: if the last layer of the critic is not a linear layer with a weight of its own"""
    layer = getattr(policy, "value_net", None)
    # A weight that is computed, as with spectral normalization, is no parameter
    if not (isinstance(layer, th.nn.Linear) and isinstance(layer.weight, th.nn.Parameter)):
        raise ValueError(
            "scale_value_targets=True rescales policy.value_net, which must be a torch.nn.Linear with weight and bias as "
            "parameters; "
            "allowed for this policy: scale_value_targets=False"
        )
