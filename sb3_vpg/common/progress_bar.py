"""Progress of a training, and a progress bar for data-parallel training."""

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback


def progress_of(model: BaseAlgorithm) -> float:
    """
    :param model: any algorithm of SB3, in a training
    :return: the finished fraction of the training, from 0 to 1. In the first rollout, SB3's ``_current_progress_remaining`` is
        still that of the training before
    """
    return min(model.num_timesteps / model._total_timesteps, 1.0)


class AllRanksProgressBar(ProgressBarCallback):
    """SB3's progress bar, counting the timesteps of all ranks."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self.start = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self.start - self.pbar.n)
        return True

    def _on_training_end(self) -> None:
        self._on_step()
        super()._on_training_end()


def with_progress_of_all_ranks(callback: MaybeCallback) -> list[BaseCallback]:
    """:return: the callbacks that ``learn`` was given, and a progress bar"""
    if not isinstance(callback, list):
        callback = [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
    return [*callback, AllRanksProgressBar()]
