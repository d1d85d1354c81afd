"""
Saved models: an old file stays until the new one is whole, a file is validated before it is loaded, and a saved model resumes
with the random numbers and the optimizer's state that an uninterrupted training would have had.

SB3 opens a file for writing before it knows what to write: an error at that point destroys the last good model.
"""

import copy
import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file, open_path

from sb3_vpg.common.random_states import get_random_states

State = dict[str, Any]
SelfResumable = TypeVar("SelfResumable", bound="ResumableAlgorithm")

#: What a model's archive must have: keywords and counters, weights, state of the optimizer
MEMBERS = ("data", "policy.pth", "policy.optimizer.pth")


class ResumableAlgorithm(OnPolicyAlgorithm):
    """An on-policy algorithm whose saved models resume exactly. The subclass restores the random states in ``learn``."""

    #: A keyword that only models of this algorithm have
    own_keyword: ClassVar[str]

    #: Whether the next training continues with the random numbers of a saved one
    _resumes: bool = False
    _random_states: State = {}

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file, with the states of the random number
        generators. A file of that name stays as it is until the new one is whole, whatever happens in between. A generator of
        an environment whose state cannot be stored is left out, with a warning that names it.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        self._random_states = get_random_states(self.env)
        if isinstance(path, (str, Path)):
            with atomic_write(model_path(path)) as file:
                super().save(file, exclude, include)
        else:
            super().save(path, exclude, include)

    def get_parameters(self) -> dict[str, dict]:
        """
        :return: as SB3's; each parameter group of the optimizer has the "names" of its parameters, too, so that
            :meth:`set_parameters` can assign them
        """
        return {**super().get_parameters(), "policy.optimizer": named_optimizer_state(self.policy)}

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary, see :meth:`get_parameters`, of this or another algorithm
        with the same policy, such as A2C or PPO. The state of the optimizer is taken over where it fits, that is, where it is
        of the same kind; a warning says so where it is not, and the optimizer is left as it is.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a dictionary that maps
            "policy" and "policy.optimizer" to state dictionaries
        :param exact_match: If True, both and each of their parameters must be given; else those that are given are set
        :param device: Device on which the code should run
        """
        if not isinstance(load_path_or_dict, dict):
            load_path_or_dict = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
        parameters = dict(load_path_or_dict)
        state = parameters.get("policy.optimizer", {})
        # Others are refused by PyTorch
        if state.keys() >= {"state", "param_groups"}:
            try:
                parameters["policy.optimizer"] = fit_optimizer_state(state, self.policy)
            except ValueError as reason:
                parameters["policy.optimizer"] = self.policy.optimizer.state_dict()
                if state["state"]:
                    warnings.warn(f"The state of the optimizer is not taken over: {reason}", stacklevel=2)
        super().set_parameters(parameters, exact_match, device)

    @classmethod
    def load(cls: type[SelfResumable], path: str | Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> SelfResumable:
        """
        Load the model from a zip-file. Parameters and return value are those of SB3's ``load``. The first
        ``learn(reset_num_timesteps=False)`` goes on with the random numbers that would have come next, in the environments,
        too, if their number is the same; not if a ``seed`` is given here, or by ``set_random_seed``.

        Loading unpickles, and a pickle can execute anything: load only files you trust. ``set_parameters`` of a model that you
        have constructed yourself takes weights alone; see the README.

        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is damaged, or not a model of this algorithm; nothing was unpickled then
        """
        check_model_file(path, keyword=cls.own_keyword)
        model = super().load(path, *args, **kwargs)
        # A file of before random states were saved has none
        model._resumes = bool(model._random_states) and kwargs.get("seed") is None
        return model


@contextmanager
def atomic_write(path: str | Path) -> Iterator[io.BufferedWriter]:
    """
    For writing a file in place of another one, if any, all at once: ::

        with atomic_write("model.zip") as file:
            file.write(content)

    What is written goes to a temporary file in the same folder, which is made if need be. When the block has ended, it takes
    the name ``path`` in one step. If the block raises, it is removed, and ``path`` is what it was.

    :param path: the file to be written, or a link to it
    :return: the file to write to, in binary mode
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # On the disk before the name is: else a power failure could leave an empty file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def model_path(path: str | Path) -> Path:
    """:return: where SB3 saves a model: with ".zip" if there is no suffix, and beside a folder of that name"""
    path = Path(path)
    path = Path(f"{path}.zip") if path.suffix == "" else path
    return Path(f"{path}_2") if path.is_dir() else path


def check_model_file(path: str | Path | io.BufferedIOBase, keyword: str) -> None:
    """
    Look through a model's file without unpickling anything.

    :param path: the file, as SB3's ``load`` takes it
    :param keyword: a keyword that the algorithm's models have and those of other algorithms have not
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, or not a model of this algorithm
    """
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{path} is damaged: {damaged!r} in it does not have the checksum it was saved with")
            missing = sorted(set(MEMBERS) - set(archive.namelist()))
            if missing:
                raise ValueError(f"{path} is not a saved model, or was cut short: it has no {', '.join(map(repr, missing))}")
            if keyword not in json.loads(archive.read("data")):
                raise ValueError(
                    f"{path} was saved by another algorithm: it has no {keyword!r}. Load it with that algorithm; its weights "
                    "can be taken over by set_parameters(other.get_parameters())"
                )
    except zipfile.BadZipFile as error:
        # The last words are SB3's
        raise ValueError(
            f"{path} is not a whole zip file: it is something else, or was cut short. Error: the file {path} wasn't a zip-file"
        ) from error
    finally:
        if isinstance(path, (str, Path)):
            file.close()
        else:
            file.seek(start)


def named_optimizer_state(policy: ActorCriticPolicy) -> State:
    """:return: the state of the policy's optimizer; each group has the "names" of its parameters in the policy"""
    names = {id(parameter): name for name, parameter in _named_parameters(policy)}
    state = policy.optimizer.state_dict()
    for group, in_state in zip(policy.optimizer.param_groups, state["param_groups"]):
        in_state["names"] = [names.get(id(parameter)) for parameter in group["params"]]
    return state


def fit_optimizer_state(state: State, policy: ActorCriticPolicy) -> State:
    """
    Bring the state of another policy's optimizer into the form that the optimizer of this policy can load. What it knows of
    each parameter, such as Adam's moments, is assigned by the names of the parameters, whatever groups they are in. The
    settings of the groups, such as Adam's betas, are taken over only if the groups are the same.

    :param state: from VPG, or from an algorithm whose optimizer has all parameters in one group, as those of SB3
    :param policy: a policy whose parameters have the same names
    :return: a copy of what fits
    :raises ValueError: if nothing does, since it is of another kind of optimizer, or nobody knows which parameters are meant
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
        of_name = {name: state["state"].get(i) for group in groups for name, i in zip(group["names"], group["params"]) if name}
        of_own = {i: of_name.get(name) for group in own_groups for name, i in zip(group["names"], group["params"])}
        state = {"state": {i: known for i, known in of_own.items() if known}, "param_groups": own_groups}
    for group in state["param_groups"]:
        del group["names"]
    return state


def _add_names(groups: list[State], own_groups: list[State], names: list[str]) -> None:
    """
    Add the "names" of parameters to the groups of another optimizer.

    :param own_groups: the groups of our own one, with "names"
    :param names: of all parameters, in order
    :raises ValueError: if they cannot be told
    """

    def shape(groups: list[State]) -> list[tuple[str | None, int]]:
        return [(group.get("role"), len(group["params"])) for group in groups]

    if shape(groups) == shape(own_groups):
        # Saved by VPG without names
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
    """Whether it is a setting that belongs to the optimizer's equations, or several, rather than a switch."""
    return isinstance(value, Real | tuple | th.Tensor) and not isinstance(value, bool)
