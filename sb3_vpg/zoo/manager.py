"""
The zoo's experiment manager, extended for VPG.

When ``rl_zoo3.exp_manager`` is imported, and thus before ``rl_zoo3.train`` uses it, :mod:`sb3_vpg.zoo` replaces its
``ExperimentManager`` by this class.
"""

import functools
import os
import re
import sys
import warnings
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import optuna
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import get_class_by_name
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_vpg.common.collectives import ProcessGroup, current_processes
from sb3_vpg.common.faults import is_raised_by
from sb3_vpg.common.progress_bar import AllRanksProgressBar
from sb3_vpg.distributed.launcher import JOB_FILE, job_id, last_model_of_this_job, launched_by_torchrun, restarted_by_torchrun
from sb3_vpg.envs import ENVIRONMENTS, NativeVecEnv
from sb3_vpg.vpg import VPG
from sb3_vpg.zoo.hyperparameter_files import ALGORITHMS, own_config
from sb3_vpg.zoo.masks import attach_masks
from sb3_vpg.zoo.runs import StopAtBudget, check_budget, continue_in_place, sigterm_as_ctrl_c


class VPGExperimentManager(ExperimentManager):
    """
    For all algorithms:

    - The package's hyperparameter files and native vectorization are used for the package's environments.
    - The hyperparameter ``vec_env_class`` is the full name of the ``VecEnv`` class in which to train; its keyword arguments
      are ``vec_env_kwargs``. Evaluation does not use it. ``--vec-env dummy`` and ``--vec-env subproc`` have priority.

    For VPG:

    - ``-i`` continues a run with its counters, schedules, random states and, for a checkpoint, VecNormalize statistics.
    - SIGTERM has the effect of Ctrl-C. The model is saved also when the training ends with an error.
    - A trial of ``-optimize`` stops when its budget is used up.
    - Under torchrun, all ranks train one model. The environments are split across ranks. Only rank 0 saves, evaluates and
      logs, in one folder.
    """

    callbacks: list[BaseCallback]

    def __init__(self, args: Namespace, algo: str, env_id: str, *more: Any, **kwargs: Any) -> None:
        self.processes = current_processes()
        self.is_vpg = algo in ALGORITHMS
        if self.is_vpg and launched_by_torchrun() and self.processes.size != int(os.environ["WORLD_SIZE"]):
            raise ValueError("With torchrun, train VPG with `torchrun ... -m sb3_vpg train`, not with rl_zoo3.train")
        kwargs["config"] = kwargs.get("config") or own_config(algo, env_id)
        super().__init__(args, algo, env_id, *more, **kwargs)
        self.eval_vec_env_class = self.vec_env_class
        if isinstance(self.processes, ProcessGroup):
            self._join_ranks(self.processes)

    def _join_ranks(self, processes: ProcessGroup) -> None:
        """Use the seed, the folder and the model to continue of rank 0 in all ranks."""
        if not self.is_vpg or self.optimize_hyperparameters:
            raise ValueError(
                "torchrun can only train VPG: run other algorithms in one process, and a hyperparameter search in several "
                "independent processes that share one --storage"
            )
        agent = last_model_of_this_job(Path(self.log_path), self.env_name) if restarted_by_torchrun() else None
        if agent is not None:
            self.trained_agent, self.continue_training = str(agent), True
        # Without these, seed and folder may differ: they can be random, or depend on the files of a machine
        names = ("seed", "save_path", "params_path", "trained_agent", "continue_training")
        self.__dict__.update(processes.broadcast({name: getattr(self, name) for name in names}))

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        """Convert ``lin_0.001`` into a schedule for ``critic_learning_rate`` and ``ent_coef``, too."""
        preprocess = ExperimentManager._preprocess_schedules
        hyperparams = preprocess(hyperparams)
        for keyword in ("critic_learning_rate", "ent_coef"):
            if str(hyperparams.get(keyword)).startswith("lin_"):
                hyperparams[keyword] = preprocess({"learning_rate": hyperparams[keyword]})["learning_rate"]
        return hyperparams

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        hyperparams = hyperparams.copy()
        if "vec_env_kwargs" in hyperparams and "vec_env_class" not in hyperparams:
            raise ValueError("vec_env_kwargs has no effect without vec_env_class")
        class_name, kwargs = hyperparams.pop("vec_env_class", None), hyperparams.pop("vec_env_kwargs", {})
        # The zoo's parsed arguments do not distinguish its default from `--vec-env dummy`
        if not _is_given("--vec"):
            if class_name is not None:
                self.vec_env_class = vec_env_class_by_name(class_name)
                # As the zoo's other hyperparameters that are dicts, it can be the text "dict(...)"
                self.vec_env_kwargs = eval(kwargs) if isinstance(kwargs, str) else kwargs
                self._print(f"Training in {self.vec_env_class.__name__}, evaluation in {self.eval_vec_env_class.__name__}")
            elif self.vec_env_class is DummyVecEnv and uses_native_vec_env(self.algo, self.env_name.gym_id):
                self.vec_env_class = self.eval_vec_env_class = NativeVecEnv
                self._print("Using NativeVecEnv: all environments are stepped in one array (disable it with --vec-env dummy)")
        processed = super()._preprocess_hyperparams(hyperparams)
        if self._eval_env_kwargs_args is None:
            # The zoo uses the file's env_kwargs for training only
            self.eval_env_kwargs = self.env_kwargs
        return processed

    def _print(self, text: str) -> None:
        if self.verbose > 0:
            print(text)

    def create_log_folder(self) -> None:
        # Checked before the folder is created, so that an error leaves no folder. Not checked after a restart by torchrun: the
        # last checkpoint may be that of the last step
        if self.is_vpg and self.continue_training and not restarted_by_torchrun():
            check_budget(self.trained_agent, self.n_timesteps)
        super().create_log_folder()

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.processes.rank == 0:
            super()._save_config(saved_hyperparams)
            if self.processes.size > 1:
                (Path(self.params_path) / JOB_FILE).write_text(job_id())

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        size, rank = self.processes.size, self.processes.rank
        if eval_env:
            return self._create_eval_envs(n_envs)
        if size == 1:
            return super().create_envs(n_envs, eval_env, no_log)
        if n_envs % size:
            raise ValueError(
                f"n_envs={n_envs} cannot be split across {size} ranks; allowed: a multiple of {size}, for example "
                f"-params n_envs:{-(-n_envs // size) * size}"
            )
        n_own = n_envs // size
        make_vec_env = exp_manager.make_vec_env
        # Each rank needs its own names of monitor files
        exp_manager.make_vec_env = functools.partial(make_vec_env, start_index=rank * n_own)
        try:
            return super().create_envs(n_own, eval_env, no_log)
        finally:
            exp_manager.make_vec_env = make_vec_env

    def _create_eval_envs(self, n_envs: int) -> VecEnv:
        training = self.vec_env_class, self.vec_env_kwargs
        if self.eval_vec_env_class is not self.vec_env_class:
            self.vec_env_class, self.vec_env_kwargs = self.eval_vec_env_class, {}
            # They differ on purpose: what is reported does not depend on the engine
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
        try:
            return attach_masks(super().create_envs(n_envs, eval_env=True))
        finally:
            self.vec_env_class, self.vec_env_kwargs = training

    def create_callbacks(self) -> None:
        if self.processes.rank > 0:
            # Other ranks keep only the callbacks of the hyperparameter file
            self.save_freq, self.eval_freq, self.show_progress = -1, -1, False
        super().create_callbacks()
        for i, callback in enumerate(self.callbacks):
            if self.is_vpg and isinstance(callback, CheckpointCallback):
                # Continuing from a checkpoint needs the statistics of VecNormalize
                callback.save_vecnormalize = True
            if self.processes.size > 1 and isinstance(callback, ProgressBarCallback):
                self.callbacks[i] = AllRanksProgressBar()

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        checkpoint = re.fullmatch(r"(.*rl_model)(_\d+_steps)\.zip", self.trained_agent)
        statistics = Path(f"{checkpoint[1]}_vecnormalize{checkpoint[2]}.pkl") if checkpoint else None
        if not self.is_vpg or statistics is None or not statistics.is_file():
            return super()._maybe_normalize(env, eval_env)
        print(f"Loading saved VecNormalize stats: {statistics}")
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        if isinstance(model, VPG):
            continue_in_place(model)
            # The zoo always passes a seed to `load`, which discards the random states
            model._resumes = bool(model._random_states) and not _is_given("--seed")
            print(f"Continuing after {model.num_timesteps} of {self.n_timesteps} timesteps")
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        try:
            with self._sigterm_as_ctrl_c():
                super().learn(model)
        except (Exception, KeyboardInterrupt) as error:
            # Ctrl-C in a terminal also ends the processes of SubprocVecEnv, which cannot be closed then. Some press it twice
            interrupted = isinstance(error, ConnectionError | KeyboardInterrupt) and error.__context__ is None
            if interrupted and is_raised_by(model.env, error, "close"):  # type: ignore[arg-type]
                return
            if self.is_vpg and self.processes.size == 1 and model._n_updates > 0:
                self.save_trained_model(model)
            raise

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        if self.processes.rank == 0:
            super().save_trained_model(model)

    def hyperparameters_optimization(self) -> None:
        if self.is_vpg:
            specified = self.specified_callbacks or []
            specified = specified if isinstance(specified, list) else [specified]
            self.specified_callbacks = [*specified, f"{StopAtBudget.__module__}.{StopAtBudget.__name__}"]
        with self._sigterm_as_ctrl_c():
            super().hyperparameters_optimization()

    def objective(self, trial: optuna.Trial) -> float:
        if self.is_vpg:
            # The zoo does not pass the budget of a trial to the function that samples its hyperparameters
            trial.set_user_attr("n_timesteps", self.n_timesteps)
        return super().objective(trial)

    def _sigterm_as_ctrl_c(self) -> AbstractContextManager[None]:
        """
        Context in which SIGTERM has the effect of Ctrl-C, for VPG: the zoo saves the model, or ends the search and marks its
        trial as failed.
        """
        return sigterm_as_ctrl_c() if self.is_vpg else nullcontext()


def _is_given(option: str) -> bool:
    """:return: whether an option that begins with this text is on the command line"""
    return any(argument.startswith(option) for argument in sys.argv)


def vec_env_class_by_name(name: str) -> type[VecEnv]:
    """
    :param name: full name of a ``VecEnv`` class, such as "sb3_vpg.envs.EnvPoolVecEnv"
    :return: the class
    :raises ValueError: if there is no such class
    """
    try:
        cls = get_class_by_name(name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"vec_env_class={name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, VecEnv)):
        raise ValueError(f"vec_env_class={name!r} is not allowed; allowed: the full name of a VecEnv class")
    return cls


def uses_native_vec_env(algo: str, env_id: str) -> bool:
    """
    :return: whether to use NativeVecEnv by default: the environment has a vectorized form, and the algorithm is VPG or the
        environment is one of the package
    """
    return (algo in ALGORITHMS or env_id in ENVIRONMENTS) and gym.spec(env_id).vector_entry_point is not None
