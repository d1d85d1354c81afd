"""
VPG in RL Baselines3 Zoo: the algorithm, the hyperparameter files, the native vectorisation, the Optuna search space.

Nothing here runs unless rl_zoo3 is used: either the import hook (``zoo_hook.py``) calls :func:`patch` on rl_zoo3's modules as
they are imported, or :func:`register` does so explicitly, as ``python -m sb3_vpg`` does.
"""

import functools
import importlib
import inspect
import json
import os
import re
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import gymnasium as gym
import yaml
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_vpg import distributed, hub
from sb3_vpg.distributed import ProcessGroup
from sb3_vpg.envs import ENVIRONMENTS
from sb3_vpg.saving import check_model_file
from sb3_vpg.torchrun import data_parallel, launched, restarted
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

#: Steps of a rollout that Optuna chooses from, all environments together
SMALLEST_BATCH, LARGEST_BATCH = 32, 16384
#: Updates that the budget of a trial is enough for, at least
UPDATES_OF_A_TRIAL = 8


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
    # The Hub's packages have been imported by now, and those of the zoo's modules that use them not yet
    hub.patch()


def _add_search_space(hyperparams_opt: ModuleType) -> None:
    convert = functools.partial(convert_vpg_params, convert_onpolicy_params=hyperparams_opt.convert_onpolicy_params)
    hyperparams_opt.HYPERPARAMS_CONVERTER["vpg"] = convert

    def sample(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        return convert(sample_vpg_params(trial, n_envs, trial.user_attrs.get("n_timesteps")))

    hyperparams_opt.HYPERPARAMS_SAMPLER["vpg"] = sample


def _extend_manager(exp_manager: Any) -> None:
    if getattr(exp_manager, "knows_vpg", False):
        return
    exp_manager.knows_vpg = True
    _add_default_config(exp_manager.ExperimentManager)
    _bound_trials(exp_manager.ExperimentManager)
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
        if algo == "vpg" and launched() and distributed.current().size != int(os.environ["WORLD_SIZE"]):
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


def _bound_trials(manager: Any) -> None:
    original_optimization, original_objective = manager.hyperparameters_optimization, manager.objective

    @functools.wraps(original_optimization)
    def optimization_within_budget(self: Any) -> None:
        if self.algo == "vpg":
            specified = self.specified_callbacks or []
            specified = specified if isinstance(specified, list) else [specified]
            self.specified_callbacks = [*specified, f"{__name__}.{StopAtBudget.__name__}"]
        original_optimization(self)

    @functools.wraps(original_objective)
    def objective_with_budget(self: Any, trial: "optuna.Trial") -> float:
        """The zoo does not pass the budget of a trial to the function that draws its hyperparameters."""
        if self.algo == "vpg":
            trial.set_user_attr("n_timesteps", self.n_timesteps)
        return original_objective(self, trial)

    manager.hyperparameters_optimization = optimization_within_budget
    manager.objective = objective_with_budget


class StopAtBudget(BaseCallback):
    """
    Stop a trial as soon as its budget is used up, also within a rollout: one of whole episodes may have many more steps. The
    zoo evaluates within the budget, so the rest of the rollout would not change the value of the trial.
    """

    def _on_step(self) -> bool:
        return self.num_timesteps < self.model._total_timesteps


def _let_runs_go_on(manager: Any) -> None:
    original_load, original_create_log_folder = manager._load_pretrained_agent, manager.create_log_folder
    original_callbacks, original_normalize = manager.create_callbacks, manager._maybe_normalize

    @functools.wraps(original_create_log_folder)
    def create_log_folder_if_budget_is_left(self: Any) -> None:
        """An error leaves no folder of a run that has not begun."""
        # Where torchrun has started its processes again, the last checkpoint may be the end of the run
        if self.algo == "vpg" and self.continue_training and not restarted():
            check_budget(self.trained_agent, self.n_timesteps)
        original_create_log_folder(self)

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
            print(f"Continuing: {model.num_timesteps} of {self.n_timesteps} steps are done")
        return model

    def until_terminated(method: Callable[..., None]) -> Callable[..., None]:
        """
        Interrupted from the keyboard, the zoo saves the model that it trains, or ends the search and tells the study that the
        trial has failed: let the system's SIGTERM do the same.
        """

        @functools.wraps(method)
        def heedful(self: Any, *args: Any) -> None:
            with terminated_like_interrupted() if self.algo == "vpg" else nullcontext():
                method(self, *args)

        return heedful

    manager.create_log_folder = create_log_folder_if_budget_is_left
    manager._load_pretrained_agent = load_and_continue
    manager.learn = until_terminated(manager.learn)
    manager.hyperparameters_optimization = until_terminated(manager.hyperparameters_optimization)
    manager.create_callbacks = callbacks_with_statistics
    manager._maybe_normalize = normalize_as_checkpoint


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


def sample_vpg_params(trial: "optuna.Trial", n_envs: int, n_timesteps: int | None = None) -> dict[str, Any]:
    """
    Draw hyperparameters of VPG. Estimator and baseline are drawn together, so that every draw is a valid combination.
    ``n_steps`` is drawn so that the batch in all, ``n_envs * n_steps``, is 32 to 16384 steps and less than an eighth of the
    budget; it is 1 where even that is more.

    :param trial: the trial to draw for
    :param n_envs: number of environments that the trial trains in
    :param n_timesteps: the budget of the trial, all environments together; None if it is not known
    :return: the drawn values under the names of Optuna's study, to be converted by :func:`convert_vpg_params`
    """
    largest_batch = LARGEST_BATCH
    if n_timesteps is not None:
        # Less than a whole part of the budget: where it ends, the last update is still to come
        largest_batch = min((n_timesteps - 1) // UPDATES_OF_A_TRIAL, LARGEST_BATCH)
    # Powers of two: the last that is not too large, the first that is not too small
    highest = max(largest_batch // n_envs, 1).bit_length() - 1
    lowest = min(((SMALLEST_BATCH - 1) // n_envs).bit_length(), highest)
    params: dict[str, Any] = {
        "formulation": trial.suggest_categorical("formulation", list(FORMULATIONS)),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "n_steps_pow": trial.suggest_int("n_steps_pow", lowest, highest),
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
    trial.set_user_attr("batch_size", n_envs * 2 ** params["n_steps_pow"])
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
