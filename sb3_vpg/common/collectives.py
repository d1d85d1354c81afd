"""
Data-parallel training: processes, on one machine or on several, that train one model.

The gradient of a batch is a sum over its parts. Under a process group of ``torch.distributed``, as ``torchrun`` starts it,
each process (*rank*) collects rollouts in environments of its own, and what is summed over a batch is summed over the parts of
all ranks: the statistics of baselines and normalisation, the losses, the gradients. All then take the same step. So k ranks
with n environments each are the algorithm of one process with k n environments.

In order, all ranks do together: at the beginning of ``learn``, :meth:`ProcessGroup.begin`; once each rollout,
:meth:`ProcessGroup.end_rollout`, where they agree whether to go on; then the sums of the formulation and of the update. A rank
that raises before they have agreed tells the others, which raise, too. One that is lost later is missed by the others at the
next sum: at once if its connection is closed, else after the timeout of the process group.
"""

import copy
import inspect
import io
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

if dist.is_available():
    # Its functions have the default group as a default argument. First imported within a process group, as an optimizer does
    # by way of torch._dynamo, they hold it, and its threads, beyond destroy_process_group(): these may then abort the process
    # at its exit (https://github.com/pytorch/pytorch/issues/190489)
    import torch.distributed.nn.functional

Array = np.ndarray

#: Up to this size, the parts of all ranks together, Gloo gathers faster than it sums
MAX_ALL_GATHER_BYTES = 2**20


class SingleProcess:
    """The processes that train one model together: here there is only one, and it has the whole batch."""

    rank = 0
    size = 1

    def sum(self, x: Array) -> Array:
        """:return: the sum over the processes, elementwise"""
        return x

    def gather(self, x: Array) -> Array:
        """:return: x of each process, along a new first axis"""
        return x[None]

    def seed(self, seed: int | None, n_envs: int) -> int | None:
        """
        :param seed: that of the training, the same in all ranks; None for any
        :param n_envs: number of environments of each rank, which get the seeds from the result on, as in one process
        :return: the seed of this rank
        """
        return seed

    def begin(self, model: OnPolicyAlgorithm, total_timesteps: int) -> None:
        """
        Begin a training with the weights, the state of the optimizer, the counters and the statistics of rank 0.

        :raises ValueError: if the process group is another one than when the model was made, or the ranks have other settings
        """
        now = current_processes()
        if (self.rank, self.size) != (now.rank, now.size):
            raise ValueError(
                f"The model was made in rank {self.rank} of {self.size}, but learns in rank {now.rank} of {now.size}: make or "
                "load it after torch.distributed.init_process_group(), or destroy_process_group()"
            )

    def propagate_errors(self) -> AbstractContextManager[None]:
        """In this context, up to :meth:`end_rollout`, an exception in one rank is raised in all."""
        return nullcontext()

    def end_rollout(self, continue_training: bool, n_steps: int, vec_normalize: VecNormalize | None) -> tuple[bool, int]:
        """
        :param continue_training: whether this rank wants to go on
        :param n_steps: what it has stepped in the rollout, all environments together
        :param vec_normalize: its running statistics become those of all
        :return: whether all ranks want to go on, steps of all
        """
        return continue_training, n_steps

    def sum_gradients(self, parameters: Iterable[th.nn.Parameter], losses: Mapping[str, float]) -> dict[str, float]:
        """
        Add up the gradients of the parameters, in place.

        :return: the losses, added up
        """
        return dict(losses)


class ProcessGroup(SingleProcess):
    """
    The default process group of ``torch.distributed``, as one of its ranks sees it.

    :raises RuntimeError: from all methods that speak with the others, if one of them cannot be reached
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # NCCL alone has no sums in main memory
        self._device = th.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        self._agreed = True
        self._common: list[RunningMeanStd] = []

    def seed(self, seed: int | None, n_envs: int) -> int | None:
        # Processes that were forked from one have the same random numbers unless they are given others
        return secrets.randbits(31) if seed is None else seed + self.rank * n_envs

    # --- Sums

    def sum(self, x: Array) -> Array:
        return self._sum(self._tensor(x)).cpu().numpy()

    def gather(self, x: Array) -> Array:
        return self._gather(self._tensor(x)).cpu().numpy()

    def _tensor(self, x: Array) -> th.Tensor:
        return th.tensor(x, dtype=th.float64, device=self._device)

    def _gather(self, x: th.Tensor) -> th.Tensor:
        everyone = x.new_empty((self.size, *x.shape))
        with self._reaching_others():
            dist.all_gather(list(everyone), x)
        return everyone

    def _sum(self, x: th.Tensor) -> th.Tensor:
        if x.is_cpu and x.nbytes * self.size <= MAX_ALL_GATHER_BYTES:
            return self._gather(x).sum(dim=0)
        with self._reaching_others():
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[th.nn.Parameter], losses: Mapping[str, float]) -> dict[str, float]:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        # A rank without a step in a minibatch has no gradient; a parameter without one in all ranks is to stay so
        has_gradient = [parameter.grad is not None for parameter in parameters]
        gradients = [th.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        numbers = th.tensor([*has_gradient, *losses.values()], dtype=th.float32, device=parameters[0].device)
        everything = self._sum(th.cat([*(gradient.flatten() for gradient in gradients), numbers]))
        *sums, counts, loss_sums = everything.split([*(g.numel() for g in gradients), len(parameters), len(losses)])
        for parameter, gradient, count in zip(parameters, sums, counts.tolist()):
            if count:
                parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return dict(zip(losses, loss_sums.tolist()))

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self.rank} of {self.size} has lost the others: one of them has ended (its error is the cause), "
                f"one took longer than the timeout, or the network between them is cut. {error}"
            ) from error

    def _gather_objects(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with self._reaching_others():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """:return: the value of rank 0"""
        values = [value]
        with self._reaching_others():
            dist.broadcast_object_list(values, device=self._device)
        return values[0]

    # --- Beginning

    def begin(self, model: OnPolicyAlgorithm, total_timesteps: int) -> None:
        super().begin(model, total_timesteps)
        self._check_settings({**settings_of(model), "total_timesteps": total_timesteps})
        statistics = running_statistics(model.get_vec_normalize_env())
        state = io.BytesIO()
        th.save(model.get_parameters(), state)
        of_rank_0 = self.broadcast((state.getvalue(), model.num_timesteps, model._n_updates, statistics))
        weights, model.num_timesteps, model._n_updates, common = of_rank_0
        model.set_parameters(th.load(io.BytesIO(weights), map_location=model.device, weights_only=True))
        for own, other in zip(statistics, common):
            vars(own).update(vars(other))
        self._common = copy.deepcopy(statistics)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """:raises ValueError: in all ranks, if they have other settings than rank 0, naming one"""
        of_rank_0, *others = self._gather_objects(settings)
        for rank, other in enumerate(others, start=1):
            for keyword, value in of_rank_0.items():
                if other.get(keyword) != value:
                    raise ValueError(
                        f"{keyword}={other.get(keyword)!r} in rank {rank}, but {value!r} in rank 0; "
                        "allowed: the same in all ranks"
                    )

    # --- The end of a rollout

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        self._agreed = False
        try:
            yield
        except Exception as error:
            if not self._agreed:
                # What has been raised here is the cause, whether the others can be told or not
                with suppress(RuntimeError):
                    self.sum(np.array([0, 0, 1]))
                    self._gather_objects(f"{type(error).__name__}: {error}")
            raise

    def end_rollout(self, continue_training: bool, n_steps: int, vec_normalize: VecNormalize | None) -> tuple[bool, int]:
        self._agreed = True
        n_steps, n_stopped, n_failed = self.sum(np.array([n_steps, not continue_training, 0])).astype(int).tolist()
        if n_failed:
            errors = [f"rank {rank}: {error}" for rank, error in enumerate(self._gather_objects(None)) if error is not None]
            raise RuntimeError(f"The rollout has failed in {'; '.join(errors)}")
        self._share_statistics(running_statistics(vec_normalize))
        return n_stopped == 0, n_steps

    def _share_statistics(self, statistics: list[RunningMeanStd]) -> None:
        """
        Let the running statistics, which were ``_common`` after the last rollout, be those of everything that all ranks have
        seen since: counts, sums and sums of squares, about the mean that they had in common (Chan et al., 1979).
        """
        for own, common in zip(statistics, self._common):
            shift = own.mean - common.mean
            count, sums, squares = own.count - common.count, own.count * shift, own.count * (own.var + shift**2)
            new = self.sum(np.stack(np.broadcast_arrays(count, sums, squares - common.count * common.var)))
            count = common.count + new[0].flat[0]
            shift = new[1] / count
            own.mean, own.count = common.mean + shift, float(count)
            own.var = (common.count * common.var + new[2]) / count - shift**2
        self._common = copy.deepcopy(statistics)


def running_statistics(vec_normalize: VecNormalize | None) -> list[RunningMeanStd]:
    """:return: those of the observations, of each entry for Dict observations, and of the returns, where there are any"""
    if vec_normalize is None:
        return []
    of_observations = getattr(vec_normalize, "obs_rms", None)
    parts = list(of_observations.values()) if isinstance(of_observations, dict) else [of_observations]
    return [part for part in (*parts, vec_normalize.ret_rms) if part is not None]


def settings_of(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """:return: what must be the same in all ranks, as far as it can be compared"""
    own = {"env", "seed", "verbose", "device", "tensorboard_log"}
    keywords = [name for name in inspect.signature(type(model)).parameters if name not in own]
    plain = {name: getattr(model, name) for name in keywords if isinstance(getattr(model, name, ()), int | float | str | None)}
    return {**plain, "number of environments": model.n_envs, "policy": type(model.policy).__name__}


SINGLE_PROCESS = SingleProcess()


def current_processes() -> SingleProcess:
    """:return: the processes that train together: those of the process group, if there is one"""
    return ProcessGroup() if dist.is_available() and dist.is_initialized() else SingleProcess()
