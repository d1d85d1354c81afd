"""Continue, bound and interrupt the zoo's runs. This module does not need rl_zoo3."""

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
    Stop a trial of a search as soon as its budget is used up, even within a rollout: a rollout of whole episodes may have many
    more steps. The zoo's last evaluation is within the budget, so the value of the trial does not change.
    """

    def _on_step(self) -> bool:
        return self.num_timesteps < self.model._total_timesteps


class ContinuedRun(VPG):
    """A model that the zoo's ``-i model.zip`` continues, with its counters, schedules and random states."""

    def learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> "ContinuedRun":
        """
        :param total_timesteps: budget of the whole run, including the timesteps of the loaded model
        """
        return super().learn(total_timesteps - self.num_timesteps, *args, **{**kwargs, "reset_num_timesteps": False})


def continue_in_place(model: VPG) -> None:
    """Give a loaded model the method ``learn`` of :class:`ContinuedRun`."""
    model.__class__ = type(f"Continued{type(model).__name__}", (ContinuedRun, type(model)), {})


def check_budget(model_file: str | Path, n_timesteps: int) -> None:
    """
    Check that the budget of a continued run is not used up. Nothing is unpickled.

    :param model_file: the model with which training continues
    :param n_timesteps: budget of the whole run, including the timesteps of the model
    :raises ValueError: if the budget is used up, or the file is not a model of VPG
    """
    check_model_file(model_file, keyword=VPG.identifying_keyword)
    with zipfile.ZipFile(model_file) as archive:
        done = json.loads(archive.read("data"))["num_timesteps"]
    if done >= n_timesteps:
        raise ValueError(
            f"{model_file} has been trained for {done} steps. The budget of the whole run (-n, or the entry's n_timesteps) is "
            f"{n_timesteps}: no steps are left. To train it for {n_timesteps} more steps, use -n {done + n_timesteps}"
        )


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers in the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
