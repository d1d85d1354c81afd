"""
VPG in RL Baselines3 Zoo: the algorithms, hyperparameter files, native vectorization, and the search space for Optuna.

VPG is added to rl_zoo3's modules by :func:`patch`. The start-up hook calls it when these modules are imported;
:func:`register` (used by ``python -m sb3_vpg``) calls it explicitly.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_vpg.vpg import VPG
from sb3_vpg.zoo.hyperparameter_files import ALGORITHMS, HYPERPARAMS

__all__ = ["HYPERPARAMS", "patch", "register"]


def register() -> None:
    """
    Add VPG to RL Baselines3 Zoo. A second call, or a call in addition to the start-up hook, has no effect.

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
    from sb3_vpg.maskable import MaskableVPG
    from sb3_vpg.recurrent import RecurrentVPG
    from sb3_vpg.zoo import hub
    from sb3_vpg.zoo.masks import ZooMaskablePPO, attach_masks, register_invalid_action_envs

    if "vpg" in utils.ALGOS:
        # A call in addition to the start-up hook
        return
    utils.ALGOS.update(vpg=VPG, vpg_lstm=RecurrentVPG, vpg_mask=MaskableVPG, ppo_mask=ZooMaskablePPO)
    register_invalid_action_envs()
    create_test_env = utils.create_test_env

    @functools.wraps(create_test_env)
    def create_test_env_with_masks(*args: Any, **kwargs: Any) -> VecEnv:
        return attach_masks(create_test_env(*args, **kwargs))

    # The commands import it from the package or from the module
    for importable in (utils, sys.modules["rl_zoo3"]):
        importable.create_test_env = create_test_env_with_masks  # type: ignore[attr-defined]
    # At this point the Hub's packages are imported, and the zoo's modules that use them are not
    hub.patch()


def _add_search_space(hyperparams_opt: ModuleType) -> None:
    from sb3_vpg.zoo.search_space import convert_vpg_params, sample_recurrent_vpg_params, sample_vpg_params

    convert = functools.partial(convert_vpg_params, convert_onpolicy_params=hyperparams_opt.convert_onpolicy_params)

    def sampler(sample: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def sample_and_convert(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
            return convert(sample(trial, n_envs, trial.user_attrs.get("n_timesteps")))

        return sample_and_convert

    for table in (hyperparams_opt.HYPERPARAMS_CONVERTER, hyperparams_opt.HYPERPARAMS_SAMPLER):
        table["ppo_mask"] = table["ppo"]
    for algo in ALGORITHMS:
        sample = sample_recurrent_vpg_params if algo == "vpg_lstm" else sample_vpg_params
        hyperparams_opt.HYPERPARAMS_CONVERTER[algo] = convert
        hyperparams_opt.HYPERPARAMS_SAMPLER[algo] = sampler(sample)


def _replace_manager(exp_manager: Any) -> None:
    from sb3_vpg.zoo.manager import VPGExperimentManager

    exp_manager.ExperimentManager = VPGExperimentManager


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _add_algorithm,
    "rl_zoo3.hyperparams_opt": _add_search_space,
    "rl_zoo3.exp_manager": _replace_manager,
}
