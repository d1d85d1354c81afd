"""
Saving, validating and resuming models.

- Writing is atomic: the previous file stays until the new one is complete. (SB3 opens the file before it serializes the
  model, so an error in between destroys the last good model.)
- A file is validated before it is unpickled.
- Random states and the optimizer's state are saved: resuming reproduces the uninterrupted run.
"""

import copy
import io
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_vpg.common.checks import check_known
from sb3_vpg.common.random_states import get_random_states

State = dict[str, Any]
SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")

#: Members that a model's archive must have: keywords and counters, weights, state of the optimizer
MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")


class ResumableAlgorithm(OnPolicyAlgorithm):
    """An on-policy algorithm whose saved models resume exactly. The subclass restores the random states in ``learn``."""

    #: A keyword by which a saved model of this algorithm is recognized: other algorithms do not have it
    identifying_keyword: ClassVar[str]

    #: Whether the next call of ``learn`` continues with the saved random states
    _resumes: bool = False
    _random_states: State = {}

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object, the model parameters and the states of the random number generators in a
        zip-file. An existing file of that name is replaced only when the new one is complete. If the state of an
        environment's generator cannot be stored, a warning names the environment and the state is left out. Before the
        training, and after an interrupted rollout, those of a ``SubprocVecEnv`` are left out, too: the next rollout begins
        with a reset.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        if not self._resumes:
            # After an interruption, the next answer of a worker process is one to another call, or never comes
            is_silent = self._last_obs is None and self.env is not None and isinstance(self.env.unwrapped, SubprocVecEnv)
            self._random_states = get_random_states(None if is_silent else self.env)
        if isinstance(path, (str, Path)):
            with atomic_write(model_path(path)) as file:
                super().save(file, exclude, include)
        else:
            super().save(path, exclude, include)

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: state dictionaries as in SB3. Each parameter group of the optimizer also has the "names" of its parameters,
            by which :meth:`set_parameters` assigns the state.
        """
        return {**super().get_parameters(), "policy.optimizer": named_optimizer_state(self.policy)}

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see :meth:`get_parameters`. They may come from another
        algorithm with the same policy, such as A2C or PPO. The state of the optimizer is loaded if it belongs to the same
        kind of optimizer. Otherwise the optimizer is not changed, and a warning gives the reason.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a dictionary that maps
            "policy" and "policy.optimizer" to state dictionaries
        :param exact_match: If True, both entries and all of their parameters are required; if False, only the given ones
            are set
        :param device: Device on which the code should run
        """
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
        parameters = dict(load_path_or_dict)
        state = parameters.get("policy.optimizer", {})
        # PyTorch raises an error for any other dictionary
        if state.keys() >= {"state", "param_groups"}:
            try:
                parameters["policy.optimizer"] = fit_optimizer_state(state, self.policy)
            except ValueError as reason:
                parameters["policy.optimizer"] = self.policy.optimizer.state_dict()
                if state["state"]:
                    warnings.warn(f"The state of the optimizer is not loaded: {reason}", stacklevel=2)
        super().set_parameters(parameters, exact_match, device)

    @classmethod
    def load(cls: type[SelfResumable], path: str | Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> SelfResumable:
        """
        Load the model from a zip-file. Parameters and return value are those of SB3's ``load``: keywords of the constructor
        replace those that are saved.

        The first ``learn(reset_num_timesteps=False)`` continues with the saved random states. Those of the environments are
        restored if the number of environments is the same. A ``seed``, given here or to ``set_random_seed``, takes precedence
        over the saved states.

        Loading unpickles, and a pickle can execute arbitrary code: load only files that you trust. To load nothing but
        weights, construct the model yourself and call ``set_parameters``.

        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if a keyword is not known, or the file is damaged, or not a model of this algorithm. Nothing has
            been unpickled then.
        """
        saved = check_model_file(path, keyword=cls.identifying_keyword)
        for keyword in kwargs:
            check_known("keyword", keyword, {*saved, *signature(super().load).parameters, *signature(cls).parameters})
        model = super().load(path, *args, **kwargs)
        # Files of early versions have no random states
        model._resumes = bool(model._random_states) and kwargs.get("seed") is None
        return model


@contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BufferedWriter]:
    """
    Write a file, or replace an existing one, atomically: ::

        with atomic_write("model.zip") as file:
            file.write(content)

    The block writes to a temporary file in the same folder, which is created if necessary. At the end of the block the
    temporary file is renamed to ``path`` in one step. If the block raises, the temporary file is removed and ``path`` is
    unchanged.

    :param path: the file to write, or a link to it
    :return: the temporary file, in binary mode
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # Written to disk before the rename: otherwise a power failure could leave an empty file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def model_path(path: str | Path) -> Path:
    """:return: the file to which SB3 saves: with ".zip" if there is no suffix, with "_2" if there is a folder of that name"""
    path = Path(path)
    path = Path(f"{path}.zip") if path.suffix == "" else path
    return Path(f"{path}_2") if path.is_dir() else path


def check_model_file(path: str | Path | io.BufferedIOBase, keyword: str) -> set[str]:
    """
    Validate a model's file without unpickling anything.

    :param path: the file, as in SB3's ``load``
    :param keyword: a keyword that models of this algorithm have and models of other algorithms do not
    :return: names of the saved attributes
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file is damaged, or not a model of this algorithm
    """
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{path} is damaged: {damaged!r} in it has a wrong checksum")
            missing = sorted(set(MEMBERS) - set(archive.namelist()))
            if missing:
                raise ValueError(f"{path} is not a saved model, or is incomplete: it has no {', '.join(map(repr, missing))}")
            saved = set(json.loads(archive.read("data")))
            if keyword not in saved:
                raise ValueError(
                    f"{path} was saved by another algorithm: it has no {keyword!r}. Load it with that algorithm, and copy its "
                    "weights with set_parameters(other.get_parameters())"
                )
            return saved
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        # The last sentence is the message of SB3
        raise ValueError(f"{path} is not a zip file, or is incomplete. Error: the file {path} wasn't a zip-file") from error
    finally:
        if isinstance(path, (str, Path)):
            file.close()
        else:
            file.seek(start)


def named_optimizer_state(policy: ActorCriticPolicy) -> State:
    """:return: the state of the policy's optimizer; each group also has the "names" of its parameters in the policy"""
    names = {id(parameter): name for name, parameter in _named_parameters(policy)}
    state = policy.optimizer.state_dict()
    for group, in_state in zip(policy.optimizer.param_groups, state["param_groups"]):
        in_state["names"] = [names.get(id(parameter)) for parameter in group["params"]]
    return state


def fit_optimizer_state(state: State, policy: ActorCriticPolicy) -> State:
    """
    Convert the state of another policy's optimizer into one that the optimizer of this policy can load. The state of each
    parameter, such as Adam's moments, is assigned by the name of the parameter, independent of its group. The settings of the
    groups, such as Adam's betas, are copied only if the groups are the same.

    :param state: state of VPG's optimizer, or of one with all parameters in one group, as in SB3's algorithms
    :param policy: a policy whose parameters have the same names
    :return: the converted copy
    :raises ValueError: if the state is that of another kind of optimizer, or its parameters cannot be identified
    """
    state, own = copy.deepcopy(state), named_optimizer_state(policy)
    groups, own_groups = state["param_groups"], own["param_groups"]
    missing = [key for key, value in policy.optimizer.defaults.items() if _is_number(value) and key not in groups[0]]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}, so it is not one of {type(policy.optimizer).__name__}")
    if not all("names" in group for group in groups):
        _add_names(groups, own_groups, [name for name, _ in _named_parameters(policy)])

    def structure(groups: list[State]) -> list[tuple[str | None, list[str]]]:
        return [(group.get("role"), group["names"]) for group in groups]

    if structure(groups) != structure(own_groups):
        by_name = {name: state["state"].get(i) for group in groups for name, i in zip(group["names"], group["params"]) if name}
        by_index = {i: by_name.get(name) for group in own_groups for name, i in zip(group["names"], group["params"])}
        state = {"state": {i: known for i, known in by_index.items() if known}, "param_groups": own_groups}
    n_dims = {i: p.dim() for i, p in enumerate(p for group in policy.optimizer.param_groups for p in group["params"])}
    needed = {n: _state_keys(policy.optimizer, n) for n in {*n_dims.values()}}
    if any(needed[n_dims[i]] - known.keys() for i, known in state["state"].items()):
        keys = sorted(set().union(*needed.values()))
        raise ValueError(f"it is not that of this {type(policy.optimizer).__name__}, which needs {', '.join(keys)}")
    for group in state["param_groups"]:
        del group["names"]
    return state


def _state_keys(optimizer: th.optim.Optimizer, n_dims: int) -> set[str]:
    """:return: what the optimizer keeps for a parameter with this number of dimensions, such as Adam's moments"""
    parameter = th.nn.Parameter(th.zeros([1] * n_dims))
    parameter.grad = th.zeros_like(parameter)
    try:
        trial = type(optimizer)([parameter], **optimizer.defaults)
        trial.step()
    except Exception:
        # An optimizer with another constructor, or for other parameters
        return set()
    return set(trial.state[parameter])


def _add_names(groups: list[State], own_groups: list[State], names: list[str]) -> None:
    """
    Add the "names" of parameters to the groups of another optimizer.

    :param groups: groups without "names"
    :param own_groups: groups of this policy's optimizer, with "names"
    :param names: names of all parameters, in order
    :raises ValueError: if the groups do not identify the parameters
    """

    def shape(groups: list[State]) -> list[tuple[str | None, int]]:
        return [(group.get("role"), len(group["params"])) for group in groups]

    if shape(groups) == shape(own_groups):
        # Saved by an early version of VPG, without names
        for group, own_group in zip(groups, own_groups):
            group["names"] = own_group["names"]
    elif len(groups) == 1 and len(groups[0]["params"]) == len(names):
        groups[0]["names"] = names
    else:
        raise ValueError("it has other groups of parameters")


def _named_parameters(policy: ActorCriticPolicy) -> Iterator[tuple[str, th.nn.Parameter]]:
    # torch.compile() adds a prefix to the names
    return getattr(policy, "_orig_mod", policy).named_parameters()


def _is_number(value: object) -> bool:
    """Whether the setting is a number, or several, in the optimizer's equations. Switches such as "fused" are not."""
    return isinstance(value, Real | tuple | th.Tensor) and not isinstance(value, bool)
