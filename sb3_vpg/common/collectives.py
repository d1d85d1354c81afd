"""
Data-parallel training: several processes, on one machine or on several, train one model.

In a process group of ``torch.distributed``, as ``torchrun`` starts it, each process (*rank*) collects rollouts in its own
environments. Every sum over a batch is a sum over the parts of all ranks: the statistics of baselines and normalization, the
losses, the gradients. Then all ranks take the same step. So k ranks with n environments each run the same algorithm as one
process with k n environments.

All ranks communicate at the same points, in this order:

1. at the start of ``learn``: :meth:`ProcessGroup.start_training`
2. at the end of each rollout: :meth:`ProcessGroup.end_rollout`, which decides whether training continues
3. after each rollout: the sums of the formulation and of the update

An exception that one rank raises before step 2 is raised in all ranks. If a rank is lost later, the others raise at the next
sum: immediately if its connection is closed, otherwise after the timeout of the process group.
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
    # Import this module before there is a process group. Its functions have the default group as a default argument: imported
    # later (an optimizer does so through torch._dynamo), they keep the group and its threads alive after
    # destroy_process_group(), which may abort the process at exit (https://github.com/pytorch/pytorch/issues/190489)
    import torch.distributed.nn.functional

Array = np.ndarray

#: Up to this total size over all ranks, Gloo's all_gather with a local sum is faster than its all_reduce
MAX_ALL_GATHER_BYTES = 2**20


class SingleProcess:
    """Collective operations of a single process, which has the whole batch: they return their arguments."""

    rank = 0
    size = 1

    def sum(self, x: Array) -> Array:
        """:return: the elementwise sum of ``x`` over all ranks"""
        return x

    def gather(self, x: Array) -> Array:
        """:return: ``x`` of each rank, stacked along a new first axis"""
        return x[None]

    def seed(self, seed: int | None, n_envs: int) -> int | None:
        """
        :param seed: seed of the training run, the same in all ranks; None for a random one
        :param n_envs: number of environments of each rank. Environment i of a rank gets the rank's seed plus i, so that k
            ranks have the same seeds as one process with all environments.
        :return: the seed of this rank
        """
        return seed

    def start_training(self, model: OnPolicyAlgorithm, total_timesteps: int) -> None:
        """
        Copy the weights, the state of the optimizer, the counters and the running statistics of rank 0 to all ranks.

        :raises ValueError: if the process group is not the one in which the model was created, or settings differ between
            ranks
        """
        now = current_processes()
        if (self.rank, self.size) != (now.rank, now.size):
            raise ValueError(
                f"The model was created in rank {self.rank} of {self.size}, but is trained in rank {now.rank} of {now.size}: "
                "create or load it after torch.distributed.init_process_group(), or destroy_process_group()"
            )

    def propagate_errors(self) -> AbstractContextManager[None]:
        """Context in which an exception in one rank is raised in all ranks, until :meth:`end_rollout` is called."""
        return nullcontext()

    def end_rollout(self, continue_training: bool, n_steps: int, vec_normalize: VecNormalize | None) -> tuple[bool, int]:
        """
        Combine what the ranks need from each other at the end of a rollout.

        :param continue_training: whether training continues in this rank
        :param n_steps: number of steps of this rank in the rollout, summed over its environments
        :param vec_normalize: its running statistics are merged with those of the other ranks, in place; None if not used
        :return: whether training continues in all ranks, and number of steps of all ranks
        """
        return continue_training, n_steps

    def sum_gradients(self, parameters: Iterable[th.nn.Parameter], losses: Mapping[str, float]) -> dict[str, float]:
        """
        Sum the gradients of the parameters over all ranks, in place.

        :param parameters: the parameters; frozen ones are skipped
        :param losses: losses by name
        :return: the losses, summed over all ranks
        """
        return dict(losses)


class ProcessGroup(SingleProcess):
    """
    Collective operations of the default process group of ``torch.distributed``.

    :raises RuntimeError: from each method that communicates, if another rank cannot be reached
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # NCCL cannot sum tensors in main memory
        self._device = th.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        self._rollout_ended = True
        # The running statistics of all ranks after the last rollout
        self._shared_statistics: list[RunningMeanStd] = []

    def seed(self, seed: int | None, n_envs: int) -> int | None:
        # Processes forked from the same parent have the same random states, so each rank needs its own seed
        return secrets.randbits(31) if seed is None else seed + self.rank * n_envs

    # --- Sums

    def sum(self, x: Array) -> Array:
        return self._sum(self._tensor(x)).cpu().numpy()

    def gather(self, x: Array) -> Array:
        return self._gather(self._tensor(x)).cpu().numpy()

    def _tensor(self, x: Array) -> th.Tensor:
        return th.tensor(x, dtype=th.float64, device=self._device)

    def _gather(self, x: th.Tensor) -> th.Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        with self._explain_lost_rank():
            dist.all_gather(list(gathered), x)
        return gathered

    def _sum(self, x: th.Tensor) -> th.Tensor:
        if x.is_cpu and x.nbytes * self.size <= MAX_ALL_GATHER_BYTES:
            return self._gather(x).sum(dim=0)
        with self._explain_lost_rank():
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[th.nn.Parameter], losses: Mapping[str, float]) -> dict[str, float]:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        # A rank without steps in a minibatch has no gradients. A parameter without a gradient in all ranks must keep None
        has_gradient = [parameter.grad is not None for parameter in parameters]
        gradients = [th.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        numbers = th.tensor([*has_gradient, *losses.values()], dtype=th.float32, device=parameters[0].device)
        summed = self._sum(th.cat([*(gradient.flatten() for gradient in gradients), numbers]))
        *sums, counts, loss_sums = summed.split([*(g.numel() for g in gradients), len(parameters), len(losses)])
        for parameter, gradient, count in zip(parameters, sums, counts.tolist()):
            if parameter.grad is not None:
                parameter.grad.copy_(gradient.view_as(parameter))
            elif count:
                parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return dict(zip(losses, loss_sums.tolist()))

    @contextmanager
    def _explain_lost_rank(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self.rank} of {self.size} lost the connection to the other ranks: one of them exited (see its error), "
                f"one took longer than the timeout, or the network failed. {error}"
            ) from error

    def _gather_objects(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with self._explain_lost_rank():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """:return: the value of rank 0"""
        values = [value]
        with self._explain_lost_rank():
            dist.broadcast_object_list(values, device=self._device)
        return values[0]

    # --- The start of a training run

    def start_training(self, model: OnPolicyAlgorithm, total_timesteps: int) -> None:
        super().start_training(model, total_timesteps)
        self._check_settings({**shared_settings(model), "total_timesteps": total_timesteps})
        statistics = running_statistics(model.get_vec_normalize_env())
        value_scale = model.value_scale.__dict__  # type: ignore[attr-defined]
        state = io.BytesIO()
        th.save(model.get_parameters(), state)
        rank_0 = self.broadcast((state.getvalue(), model.num_timesteps, model._n_updates, statistics, value_scale))
        weights, model.num_timesteps, model._n_updates, rank_0_statistics, rank_0_value_scale = rank_0
        model.set_parameters(th.load(io.BytesIO(weights), map_location=model.device, weights_only=True))
        for own, other in zip(statistics, rank_0_statistics):
            vars(own).update(vars(other))
        value_scale.update(rank_0_value_scale)
        self._shared_statistics = copy.deepcopy(statistics)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """:raises ValueError: in all ranks, if a setting differs between a rank and rank 0; the message names it"""
        rank_0, *others = self._gather_objects(settings)
        for rank, other in enumerate(others, start=1):
            for keyword, value in rank_0.items():
                if other.get(keyword) != value:
                    raise ValueError(
                        f"{keyword}={other.get(keyword)!r} in rank {rank}, but {value!r} in rank 0; "
                        "allowed: the same in all ranks"
                    )

    # --- The end of a rollout

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        self._rollout_ended = False
        try:
            yield
        except Exception as error:
            if not self._rollout_ended:
                # This error is the cause, even if the other ranks can no longer be reached
                with suppress(RuntimeError):
                    self.sum(np.array([0, 0, 1]))
                    self._gather_objects(f"{type(error).__name__}: {error}")
            raise

    def end_rollout(self, continue_training: bool, n_steps: int, vec_normalize: VecNormalize | None) -> tuple[bool, int]:
        self._rollout_ended = True
        n_steps, n_stopped, n_failed = self.sum(np.array([n_steps, not continue_training, 0])).astype(int).tolist()
        if n_failed:
            errors = [f"rank {rank}: {error}" for rank, error in enumerate(self._gather_objects(None)) if error is not None]
            raise RuntimeError(f"The rollout failed in {'; '.join(errors)}")
        self._merge_statistics(running_statistics(vec_normalize))
        return n_stopped == 0, n_steps

    def _merge_statistics(self, statistics: list[RunningMeanStd]) -> None:
        """
        Add to the shared statistics the samples that each rank has seen since the last rollout. The counts, sums and sums of
        squares of these samples are taken about the shared mean and summed over all ranks (Chan et al., 1979).
        """
        for own, shared in zip(statistics, self._shared_statistics):
            shift = own.mean - shared.mean
            count, sums, squares = own.count - shared.count, own.count * shift, own.count * (own.var + shift**2)
            new = self.sum(np.stack(np.broadcast_arrays(count, sums, squares - shared.count * shared.var)))
            count = shared.count + new[0].flat[0]
            shift = new[1] / count
            own.mean, own.count = shared.mean + shift, float(count)
            own.var = (shared.count * shared.var + new[2]) / count - shift**2
        self._shared_statistics = copy.deepcopy(statistics)


def running_statistics(vec_normalize: VecNormalize | None) -> list[RunningMeanStd]:
    """:return: running statistics of the observations (one for each entry of Dict observations) and of the returns"""
    if vec_normalize is None:
        return []
    obs_rms = getattr(vec_normalize, "obs_rms", None)
    parts = list(obs_rms.values()) if isinstance(obs_rms, dict) else [obs_rms]
    return [part for part in (*parts, vec_normalize.ret_rms) if part is not None]


def shared_settings(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """:return: the settings that must be the same in all ranks, as numbers and texts; other values are left out"""
    may_differ = {"env", "seed", "verbose", "device", "tensorboard_log"}
    keywords = [name for name in inspect.signature(type(model)).parameters if name not in may_differ]
    settings = {name: getattr(model, name, None) for name in [*keywords, "use_masking"]}
    for name in ("learning_rate", "critic_learning_rate", "ent_coef"):
        schedule = settings.get(name)
        if callable(schedule):
            settings[name] = [float(schedule(progress_remaining)) for progress_remaining in (1.0, 0.5, 0.0)]
    shapes = [statistics.mean.shape for statistics in running_statistics(model.get_vec_normalize_env())]
    return {
        **_comparable(settings),
        "number of environments": model.n_envs,
        "policy": type(model.policy).__name__,
        "shapes of VecNormalize's statistics": shapes,
    }


def _comparable(value: Any) -> Any:
    """:return: the value with names in place of classes, and None in place of other objects"""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(part) for part in value]
    if isinstance(value, type):
        return value.__qualname__
    return value if isinstance(value, int | float | str) else None


SINGLE_PROCESS = SingleProcess()


def current_processes() -> SingleProcess:
    """:return: the collective operations of the process group if there is one, else of a single process"""
    return ProcessGroup() if dist.is_available() and dist.is_initialized() else SingleProcess()
