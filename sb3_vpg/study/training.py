"""
Execute a run of a study with RL Baselines3 Zoo: train, evaluate, measure gradients.

Importing this module imports rl_zoo3, which changes gymnasium. Only processes of a study do.
"""

import argparse
import copy
import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import sync_envs_normalization, unwrap_vec_normalize

from sb3_vpg.common.checks import check_known
from sb3_vpg.common.progress_bar import progress_of
from sb3_vpg.diagnostics import UpdateSpec, gradient_statistics
from sb3_vpg.diagnostics.gradients import check_updates
from sb3_vpg.study.results import Measures, Point, learning_curve
from sb3_vpg.study.study import Cell, Run, Study
from sb3_vpg.zoo import register

register()
# After VPG is registered
from rl_zoo3.utils import ALGOS  # noqa: E402

from sb3_vpg.zoo.manager import VPGExperimentManager  # noqa: E402

#: Keys of hyperparameter files that are the zoo's own
ZOO_KEYS = (
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper", "env_kwargs", "monitor_kwargs"),
    *("callback", "vec_env_class", "vec_env_kwargs"),
)
#: Added to the seed of a run for the environments of evaluations and gradient statistics
EVALUATION_SEED = 10_000
#: Fractions of the budget after which gradients are measured
MEASURED_AT = (0.0, 0.5, 1.0)
#: Longest episode of an evaluation. Without a time limit, a deterministic policy may never end one
MAX_EPISODE_STEPS = 100_000
#: Minimum duration of a measurement of speed, in seconds
SECONDS_OF_SPEED = 2.0


class Episodes(BaseCallback):
    """
    Records the training episodes: their ends, in timesteps and seconds, and their returns.

    :param report: called with the finished fraction of the budget, about once a second
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        super().__init__()
        self.report = report
        self.ended: list[tuple[int, float, float]] = []

    def _on_training_start(self) -> None:
        self.start = self.reported = time.perf_counter()

    def _on_step(self) -> bool:
        if "dones" not in self.locals:
            # ARS: callbacks see no episodes
            return True
        # VPG does not use the episodes of environments that wait for others
        ended = self.locals["dones"] & self.locals.get("recording", True)
        for index in ended.nonzero()[0]:
            episode = self.locals["infos"][index].get("episode")
            if episode is not None:
                self.ended.append((self.num_timesteps, time.perf_counter() - self.start, episode["r"]))
        return True

    def _on_rollout_start(self) -> None:
        if time.perf_counter() > self.reported + 1:
            self.reported = time.perf_counter()
            self.report(progress_of(self.model))


class StopAfterSeconds(BaseCallback):
    """Stops training after :data:`SECONDS_OF_SPEED` and at least two rollouts, the first of which warms up."""

    def _on_training_start(self) -> None:
        self.starts: list[tuple[float, int]] = []

    def _on_rollout_start(self) -> None:
        self.starts.append((time.perf_counter(), self.num_timesteps))

    def _on_step(self) -> bool:
        return len(self.starts) < 3 or self.starts[-1][0] < self.starts[1][0] + SECONDS_OF_SPEED

    def _on_training_end(self) -> None:
        start, timesteps = self.starts[1 if len(self.starts) > 2 else 0]
        self.seconds_per_step = (time.perf_counter() - start) / (self.num_timesteps - timesteps)


class GradientMeasurement(BaseCallback):
    """Measures the gradients of all settings with ``n_episodes``, at the start, in the middle and at the end of training."""

    def __init__(self, study: Study, manager: VPGExperimentManager, run: Run):
        super().__init__()
        self.study, self.manager, self.run = study, manager, run
        self.points: list[Point] = []
        self.moments = list(MEASURED_AT)

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()
        self.env = self.manager.create_envs(self.manager.n_envs, no_log=True)
        self.updates = update_specs(self.study, self.run, Path(self.manager.save_path))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.moments and self.num_timesteps >= self.moments[0] * self.model._total_timesteps:
            self.measure()

    def _on_training_end(self) -> None:
        self.measure()
        self.env.close()

    def measure(self) -> None:
        del self.moments[0]
        if (normalize := unwrap_vec_normalize(self.env)) is not None:
            sync_envs_normalization(self.training_env, self.env)
            normalize.training = False
        statistics = gradient_statistics(
            self.model,  # type: ignore[arg-type]
            self.env,
            self.updates,
            n_episodes=self.study.statistics.n_episodes,
            reference=self.study.statistics.reference or None,
            seed=EVALUATION_SEED + self.run.seed,
        )
        now = (self.num_timesteps, time.perf_counter() - self.start)
        for name, of_setting in statistics.items():
            for field in fields(of_setting):
                estimate = getattr(of_setting, field.name)
                for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high)):
                    self.points.append(Point(*now, field.name + end, name, float(value)))


def set_up(
    study: Study, run: Run, folder: Path, tensorboard_log: str = ""
) -> tuple[VPGExperimentManager, Any, dict[str, Any]]:
    """
    :param study: the study
    :param run: one of its runs
    :param folder: folder for the run's own files
    :param tensorboard_log: folder of TensorBoard's logs; empty for none
    :return: the zoo's manager of the run, the model, and its hyperparameters as the zoo's files have them
    """
    study.import_packages()
    folder.mkdir(parents=True, exist_ok=True)
    keywords = copy.deepcopy(study.keywords(*run.cell))
    if run.learning_rate is not None:
        keywords["learning_rate"] = run.learning_rate
    entries = study.entries_of(run.algorithm)
    config = entries if isinstance(entries, str) else None
    if entries is False:
        config = str(folder / "entry.yml")
        Path(config).write_text(yaml.safe_dump({run.environment: {"policy": "MlpPolicy", **keywords}}))
    settings: dict[str, Any] = {"config": config, "hyperparams": keywords, "seed": run.seed, "device": "cpu"}
    settings |= {"tensorboard_log": tensorboard_log, "eval_freq": -1, "log_interval": -1, "verbose": 0}
    manager = VPGExperimentManager(argparse.Namespace(), run.algorithm, run.environment, str(folder), **settings)
    model, hyperparameters = manager.setup_experiment()  # type: ignore[misc]
    return manager, model, hyperparameters


def update_specs(study: Study, run: Run, folder: Path) -> dict[str, UpdateSpec]:
    """:return: the updates of all settings of the run's algorithm that use whole episodes, by name"""
    specs = {}
    for setting in study.settings:
        _, model, _ = set_up(study, run._replace(setting=setting), folder)
        if model.n_episodes is not None:
            n_episodes = model.n_envs * model.n_episodes
            specs[setting] = UpdateSpec(model.plan.formulation, n_episodes, model.loss_reduction)
        model.env.close()
    return specs


def execute(
    study: Study, run: Run, folder: Path, tracking: tuple[str, Path] | None, report: Callable[[float], None]
) -> tuple[Measures, list[Point]]:
    """
    Train the model of a run, and evaluate it or measure gradients. See :func:`set_up`.

    :param tracking: "tensorboard" or "wandb", and the folder of the study; None for no logs of training
    :param report: called with the finished fraction of the run
    :return: measures and points
    """
    set_random_seed(run.seed)
    with start_tracking(tracking, study, run) as tensorboard_log:
        manager, model, _ = set_up(study, run, folder, tensorboard_log)
        gradients = GradientMeasurement(study, manager, run) if run.phase == "statistics" else None
        episodes = Episodes(report)
        manager.callbacks += [episodes] if gradients is None else [episodes, gradients]
        start, processor_start = time.perf_counter(), time.process_time()
        # The manager's own `learn` would end normally when it is interrupted
        model.learn(manager.n_timesteps, callback=manager.callbacks)
        wall, processor = time.perf_counter() - start, time.process_time() - processor_start
    measures = Measures(model.num_timesteps, wall, processor)
    if gradients is not None:
        points = gradients.points
    else:
        # A callback may have stopped the training
        points, training_return = learning_curve(episodes.ended, min(manager.n_timesteps, model.num_timesteps))
        measures = measures._replace(training_return=training_return)
        if run.phase == "final" or study.score != "training_return":
            measures = measures._replace(**evaluate(study, run, manager, model))
    model.env.close()
    return measures, points


@contextmanager
def start_tracking(tracking: tuple[str, Path] | None, study: Study, run: Run) -> Iterator[str]:
    """
    Context of a training that is tracked as by the zoo's ``--track``.

    :return: folder of TensorBoard's logs; empty for none
    """
    if tracking is None:
        yield ""
        return
    service, folder = tracking
    name = "__".join(str(part) for part in run if part not in ("", None)).replace("/", "_")
    logs = folder / "tensorboard" / name
    shutil.rmtree(logs, ignore_errors=True)
    session: AbstractContextManager[Any] = nullcontext()
    if service == "wandb":
        import wandb

        config = {**run._asdict(), **study.keywords(*run.cell)}
        session = wandb.init(name=name, project="sb3", group=folder.name, config=config, sync_tensorboard=True, dir=folder)
    with session:
        yield str(logs)


def evaluate(study: Study, run: Run, manager: VPGExperimentManager, model: Any) -> dict[str, Any]:
    """:return: returns of the model in gymnasium's own environments, deterministic and stochastic, and length of episodes"""
    env = manager.create_envs(study.evaluation_episodes, eval_env=True)
    env.seed(EVALUATION_SEED + run.seed)
    sync_envs_normalization(model.env, env)

    def check_length(variables: dict[str, Any], _: Any) -> None:
        if variables["current_lengths"][variables["i"]] >= MAX_EPISODE_STEPS:
            raise ValueError(
                f"an evaluation episode has not ended after {MAX_EPISODE_STEPS} steps: {run.environment} has no time limit; "
                "env_kwargs: {max_episode_steps: ...} sets one"
            )

    (returns, lengths), (stochastic, _) = (
        evaluate_policy(
            model, env, study.evaluation_episodes, deterministic, callback=check_length, return_episode_rewards=True
        )
        for deterministic in (True, False)
    )
    env.close()
    means = {"deterministic_return": returns, "stochastic_return": stochastic, "episode_length": lengths}
    return {name: float(np.mean(values)) for name, values in means.items()}


def measure_speed(study: Study, run: Run, folder: Path, report: Callable[[float], None]) -> float:
    """:return: seconds per timestep, of a training of :data:`SECONDS_OF_SPEED`"""
    manager, model, _ = set_up(study, run, folder)
    callback = StopAfterSeconds()
    if hasattr(model, "learning_starts"):
        # Steps before the first update are much faster than the others
        model.learning_starts = min(model.learning_starts, 100)
    model.learn(manager.n_timesteps, callback=[*manager.callbacks, callback])
    model.env.close()
    return callback.seconds_per_step


def check_cells(
    study: Study, environment: str, contestants: Sequence[str], folder: Path, report: Callable[[float], None]
) -> dict[Cell, dict[str, Any]]:
    """
    Make the model of each cell of an environment, and check its gradient statistics.

    :return: for each cell the hyperparameters, as the zoo's files have them, with the number of timesteps
    :raises ValueError: if a name is not known, a model cannot be made, or the gradient statistics cannot be measured: no
        setting has ``n_episodes``, or there are too few episodes
    """
    cells = {}
    for name in contestants:
        run = Run("final", environment, *study.contestants[name], study.first_seed)
        check_known("algorithm", run.algorithm, ALGOS)
        known = {*inspect.signature(ALGOS[run.algorithm]).parameters, *ZOO_KEYS}
        for keyword in study.keywords(*run.cell):
            check_known(f"{run.setting or environment}: keyword", keyword, known)
        try:
            manager, model, hyperparameters = set_up(study, run, folder)
        except Exception as error:
            raise ValueError(f"{' '.join(filter(None, run.cell))}: {error}") from error
        model.env.close()
        cells[run.cell] = {**hyperparameters, "n_timesteps": manager.n_timesteps}
    measured = next(study.statistics_runs([environment], contestants, {}), None)
    if measured is not None:
        specs = update_specs(study, measured, folder)
        if not specs:
            raise ValueError("statistics: no setting has n_episodes; only whole episodes are measured")
        try:
            check_updates(specs, study.statistics.n_episodes, study.statistics.reference or None)
        except ValueError as error:
            raise ValueError(f"statistics: {environment}: {error}") from error
    return cells
