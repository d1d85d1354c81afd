"""How the zoo's runs are continued, bounded and ended: the parts that need no rl_zoo3."""

import json
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from stable_baselines3.common.callbacks import BaseCallback

from sb3_vpg.common.checkpoint import check_model_file
from sb3_vpg.vpg import VPG


class StopAtBudget(BaseCallback):
    """
    Stop a trial as soon as its budget is used up, also within a rollout: one of whole episodes may have many more steps. The
    zoo evaluates within the budget, so the rest of the rollout would not change the value of the trial.
    """

    def _on_step(self) -> bool:
        return self.num_timesteps < self.model._total_timesteps


class ContinuedVPG(VPG):
    """VPG as the zoo's ``-i model.zip`` continues it: counters, schedules and random numbers go on."""

    def learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> "ContinuedVPG":
        """
        :param total_timesteps: the budget of the whole run, including what the loaded model has been trained for
        """
        return super().learn(total_timesteps - self.num_timesteps, *args, **{**kwargs, "reset_num_timesteps": False})


def check_budget(model_file: str | Path, n_timesteps: int) -> None:
    """
    Check that there are steps left to train. Nothing is unpickled.

    :param model_file: the model to be trained further
    :param n_timesteps: the budget of the whole run, including what the model has been trained for
    :raises ValueError: if the budget is used up, or the file is not a model of VPG
    """
    check_model_file(model_file, keyword="estimator")
    with zipfile.ZipFile(model_file) as archive:
        done = json.loads(archive.read("data"))["num_timesteps"]
    if done >= n_timesteps:
        raise ValueError(
            f"{model_file} has been trained for {done} steps. The budget of the whole run (-n, or the entry's n_timesteps) is "
            f"{n_timesteps}: no steps are left. To train it for {n_timesteps} steps more, give -n {done + n_timesteps}"
        )


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In this context SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
