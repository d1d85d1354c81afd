"""
VPG in RL Baselines3 Zoo: the algorithm, the hyperparameter files, the native vectorisation, the Optuna search space.

Nothing here runs unless rl_zoo3 is used: either the import hook (``zoo_hook.py``) calls :func:`patch` on rl_zoo3's modules as
they are imported, or :func:`register` does so explicitly, as ``python -m sb3_vpg`` does.
"""

import functools
import importlib
import inspect
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import gymnasium as gym
import yaml
from stable_baselines3.common.callbacks import CheckpointCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_vpg import distributed
from sb3_vpg.callbacks import ProgressBarOfAllRanks
from sb3_vpg.distributed import ProcessGroup
from sb3_vpg.envs import ENVIRONMENTS
from sb3_vpg.vec_env import NativeVecEnv
from sb3_vpg.vpg import VPG

if TYPE_CHECKING:
    import optuna

_PACKAGE = Path(__file__).parent
#: Folder of the hyperparameter files: in the package where it is installed, beside it in a checkout
HYPERPARAMS = next(path for path in (_PACKAGE / "hyperparams", _PACKAGE.parent / "hyperparams") if path.is_dir())

# Formulations that Optuna chooses from; all go with partial_episodes=None and with normalize_advantage=False or True
FORMULATIONS: dict[str, tuple[str, str | None]] = {
    f"{estimator}-{baseline}" if baseline else estimator: (estimator, baseline)
    for estimator, baselines in {
        "total_return": (None, "mean", "time", "leave_one_out", "value"),
        "reward_to_go": (None, "mean", "time", "leave_one_out", "value"),
        "td_residual": (None,),
        "gae": (None,),
    }.items()
    for baseline in baselines
}


def register() -> None:
    """
    Add VPG to RL Baselines3 Zoo. Calling it again, or with the import hook at work, changes nothing.

    :raises ImportError: if rl_zoo3 is not installed
    """
    for name in PATCHES:
        patch(importlib.import_module(name))


def patch(module: ModuleType) -> None:
    """
    Add VPG to one of rl_zoo3's modules, in place.

    :param module: rl_zoo3.utils, rl_zoo3.hyperparams_opt or rl_zoo3.exp_manager
    """
    PATCHES[module.__name__](module)


def _add_algorithm(utils: ModuleType) -> None:
    utils.ALGOS["vpg"] = VPG


def _add_search_space(hyperparams_opt: ModuleType) -> None:
    convert = functools.partial(convert_vpg_params, convert_onpolicy_params=hyperparams_opt.convert_onpolicy_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER["vpg"] = convert
    hyperparams_opt.HYPERPARAMS_SAMPLER["vpg"] = lambda trial, *_: convert(sample_vpg_params(trial))


def _extend_manager(exp_manager: Any) -> None:
    if getattr(exp_manager, "knows_vpg", False):
        return
    exp_manager.knows_vpg = True
    _add_default_config(exp_manager.ExperimentManager)
    _let_runs_go_on(exp_manager.ExperimentManager)
    processes = distributed.current()
    if isinstance(processes, ProcessGroup):
        exp_manager.ExperimentManager = data_parallel(exp_manager, processes)


def _add_default_config(manager: Any) -> None:
    original_init, original_schedules = manager.__init__, manager._preprocess_schedules
    signature = inspect.signature(original_init)

    @functools.wraps(original_init)
    def init_with_own_config(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        algo, env_id = bound.arguments["algo"], bound.arguments["env_id"]
        if algo == "vpg" and distributed.launched() and distributed.current().size != int(os.environ["WORLD_SIZE"]):
            raise ValueError("VPG trains on several processes with `torchrun ... -m sb3_vpg train`, not with rl_zoo3.train")
        if not bound.arguments.get("config"):
            bound.arguments["config"] = _own_config(algo, env_id)
        original_init(*bound.args, **bound.kwargs)

        self = bound.arguments["self"]
        if self.vec_env_class is DummyVecEnv and _is_to_be_native(algo, env_id):
            self.vec_env_class = NativeVecEnv
            if self.verbose > 0:
                print("Stepping all environments in one array (--vec-env dummy switches that off)")

    def with_critic_schedule(hyperparams: dict[str, Any]) -> dict[str, Any]:
        """The zoo turns ``learning_rate: lin_0.001`` into a schedule; the critic's learning rate may be written so, too."""
        hyperparams = original_schedules(hyperparams)
        if hyperparams.get("critic_learning_rate") is not None:
            schedule = original_schedules({"learning_rate": hyperparams["critic_learning_rate"]})
            hyperparams["critic_learning_rate"] = schedule["learning_rate"]
        return hyperparams

    manager.__init__ = init_with_own_config
    manager._preprocess_schedules = staticmethod(with_critic_schedule)


def _let_runs_go_on(manager: Any) -> None:
    original_load, original_learn = manager._load_pretrained_agent, manager.learn
    original_callbacks, original_normalize = manager.create_callbacks, manager._maybe_normalize

    @functools.wraps(original_callbacks)
    def callbacks_with_statistics(self: Any) -> None:
        """What is needed to go on from a checkpoint belongs to it."""
        original_callbacks(self)
        for callback in self.callbacks:
            if self.algo == "vpg" and isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = True

    @functools.wraps(original_normalize)
    def normalize_as_checkpoint(self: Any, env: VecEnv, eval_env: bool) -> VecEnv:
        checkpoint = re.fullmatch(r"(.*rl_model)(_\d+_steps)\.zip", self.trained_agent)
        statistics = Path(f"{checkpoint[1]}_vecnormalize{checkpoint[2]}.pkl") if checkpoint else None
        if self.algo != "vpg" or statistics is None or not statistics.is_file():
            return original_normalize(self, env, eval_env)
        print(f"Loading saved VecNormalize stats: {statistics}")
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    @functools.wraps(original_load)
    def load_and_continue(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original_load(self, *args, **kwargs)
        if self.algo == "vpg":
            model.__class__ = ContinuedVPG
            # The zoo always gives a seed
            model._resumes = bool(model._random_states)
        return model

    @functools.wraps(original_learn)
    def learn_until_terminated(self: Any, model: Any) -> None:
        """The zoo saves the model when it is interrupted from the keyboard: let the system's SIGTERM do the same."""
        with terminated_like_interrupted() if self.algo == "vpg" else nullcontext():
            original_learn(self, model)

    manager._load_pretrained_agent = load_and_continue
    manager.learn = learn_until_terminated
    manager.create_callbacks = callbacks_with_statistics
    manager._maybe_normalize = normalize_as_checkpoint


def data_parallel(exp_manager: Any, processes: ProcessGroup) -> type:
    """
    :param exp_manager: rl_zoo3.exp_manager, which has the zoo's manager of a training
    :param processes: ranks that train together
    :return: a manager for them: one folder; rank 0 alone writes models, evaluates and tells; the environments are dealt out
    """

    class DataParallelManager(exp_manager.ExperimentManager):
        def __init__(self, args: Any, algo: str, env_id: str, *more: Any, **kwargs: Any) -> None:
            super().__init__(args, algo, env_id, *more, **kwargs)
            if algo != "vpg" or self.optimize_hyperparameters:
                raise ValueError(
                    "torchrun is for training VPG: other algorithms train in one process, and a search for hyperparameters "
                    "runs in as many independent processes as you start, with one --storage"
                )
            agent = last_model_of_this_job(Path(self.log_path), self.env_name) if restarted() else None
            if agent is not None:
                self.trained_agent, self.continue_training = str(agent), True
            # Seed and folder may have been chosen at random, or by what lies on this machine's disk
            names = ("seed", "save_path", "params_path", "trained_agent", "continue_training")
            self.__dict__.update(processes.broadcast({name: getattr(self, name) for name in names}))

        def create_callbacks(self) -> None:
            if processes.rank > 0:
                # Those of the hyperparameter file are for the environments of every rank
                self.save_freq, self.eval_freq, self.show_progress = -1, -1, False
            super().create_callbacks()
            bars = [i for i, callback in enumerate(self.callbacks) if isinstance(callback, ProgressBarCallback)]
            for i in bars:
                self.callbacks[i] = ProgressBarOfAllRanks()

        def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
            if eval_env:
                return super().create_envs(n_envs, eval_env, no_log)
            if n_envs % processes.size:
                raise ValueError(
                    f"n_envs={n_envs} cannot be dealt out to {processes.size} ranks; allowed: a multiple of "
                    f"{processes.size}, for example -params n_envs:{-(-n_envs // processes.size) * processes.size}"
                )
            n_own = n_envs // processes.size
            make_vec_env = exp_manager.make_vec_env
            # So that their monitor files have names of their own
            exp_manager.make_vec_env = functools.partial(make_vec_env, start_index=processes.rank * n_own)
            try:
                return super().create_envs(n_own, eval_env, no_log)
            finally:
                exp_manager.make_vec_env = make_vec_env

        def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
            if processes.rank == 0:
                super()._save_config(saved_hyperparams)
                (Path(self.params_path) / JOB_FILE).write_text(job_id())

        def save_trained_model(self, model: VPG) -> None:
            if processes.rank == 0:
                super().save_trained_model(model)

    return DataParallelManager


#: In the folder of a training that torchrun has started: which of its jobs
JOB_FILE = "torchrun_job.txt"


def job_id() -> str:
    """:return: the same in all attempts of one torchrun, and another one in each torchrun"""
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    # What torchrun says if it has not been told
    return f"{socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id


def restarted() -> bool:
    """:return: whether torchrun has started the processes again, after a failure"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def last_model_of_this_job(folder: Path, env_name: str) -> Path | None:
    """
    :param folder: of the trainings of an algorithm
    :return: the newest model that an earlier attempt of this job has saved, be it a checkpoint or because it was interrupted
    """
    files = [file for file in folder.glob(f"{env_name}_*/{env_name}/{JOB_FILE}") if file.read_text() == job_id()]
    runs = [file.parent.parent for file in files]
    models = [path for run in runs for pattern in ("rl_model_*_steps.zip", f"{env_name}.zip") for path in run.glob(pattern)]
    return max(models, key=lambda path: path.stat().st_mtime, default=None)


class ContinuedVPG(VPG):
    """VPG as the zoo's ``-i model.zip`` continues it: counters, schedules and random numbers go on."""

    def learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> "ContinuedVPG":
        """
        :param total_timesteps: of the run that was interrupted and this one together; of this one alone, if the other had come
            to its end
        """
        if self.num_timesteps < total_timesteps:
            total_timesteps -= self.num_timesteps
        return super().learn(total_timesteps, *args, **{**kwargs, "reset_num_timesteps": False})


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
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


def _own_config(algo: str, env_id: str) -> str | None:
    """:return: our hyperparameter file, if the zoo has none for the algorithm or no entry for one of our environments"""
    path = HYPERPARAMS / f"{algo}.yml"
    if algo == "vpg" or (path.is_file() and env_id in yaml.safe_load(path.read_text())):
        return str(path)
    return None


def _is_to_be_native(algo: str, env_id: str) -> bool:
    """
    :return: whether the environment has a vectorised form, the algorithm or the environment is ours, and the command line does
        not say what to use
    """
    if algo != "vpg" and env_id not in ENVIRONMENTS:
        return False
    # The zoo does not tell its default from `--vec-env dummy`
    asked = any(argument.startswith("--vec") for argument in sys.argv)
    return not asked and gym.spec(env_id).vector_entry_point is not None


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _add_algorithm,
    "rl_zoo3.hyperparams_opt": _add_search_space,
    "rl_zoo3.exp_manager": _extend_manager,
}


def sample_vpg_params(trial: "optuna.Trial") -> dict[str, Any]:
    """
    Draw hyperparameters of VPG. Estimator and baseline are drawn together, so that every draw is a valid combination.

    :param trial: the trial to draw for
    :return: the drawn values under the names of Optuna's study, to be converted by :func:`convert_vpg_params`
    """
    params: dict[str, Any] = {
        "formulation": trial.suggest_categorical("formulation", list(FORMULATIONS)),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "n_steps_pow": trial.suggest_int("n_steps_pow", 3, 11),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.1, log=True),
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.2, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.03, log=True),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 0.03, log=True),
        "n_critic_updates": trial.suggest_categorical("n_critic_updates", [1, 2, 5, 10, 20]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2),
        "net_arch": trial.suggest_categorical("net_arch", ["tiny", "small", "medium"]),
        "activation_fn": trial.suggest_categorical("activation_fn", ["tanh", "relu"]),
    }
    # Display true values
    trial.set_user_attr("gamma", 1 - params["one_minus_gamma"])
    trial.set_user_attr("gae_lambda", 1 - params["one_minus_gae_lambda"])
    trial.set_user_attr("n_steps", 2 ** params["n_steps_pow"])
    return params


def convert_vpg_params(
    sampled_params: dict[str, Any], convert_onpolicy_params: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """
    :param sampled_params: values as :func:`sample_vpg_params` draws them and Optuna stores them
    :param convert_onpolicy_params: the zoo's own converter for what VPG has in common with A2C and PPO
    :return: keyword arguments of VPG
    """
    params = sampled_params.copy()
    estimator, baseline = FORMULATIONS[params.pop("formulation")]
    # Also what the hyperparameter file may have set and the formulation may not go with
    whole = {"partial_episodes": None, "n_episodes": None}
    return {**convert_onpolicy_params(params), "estimator": estimator, "baseline": baseline, **whole}
