"""Progress bar for data-parallel training."""

from stable_baselines3.common.callbacks import ProgressBarCallback


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
