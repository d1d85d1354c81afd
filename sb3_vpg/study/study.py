"""The settings of a study, read from YAML, and its runs."""

import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml

from sb3_vpg.common.checks import check_choice, check_known, check_number
from sb3_vpg.envs import VEC_ENVS, register_environments
from sb3_vpg.zoo.hyperparameter_files import ALGORITHMS as OWN_ALGORITHMS

#: "search" for the learning rate, "final" runs with the selected learning rate, gradient "statistics"
PHASES = ("search", "final", "statistics")
#: Runs of the search have the seeds from this number on
FIRST_SEARCH_SEED = 1000
#: Returns by which a study can be judged
SCORES = ("deterministic_return", "stochastic_return", "training_return")
#: Keys of an environment that are not keywords
ENVIRONMENT_KEYS = ("n_timesteps", "score_range", "vec_env")
#: Keywords that change the task, and so hold for all algorithms
TASK_KEYS = ("env_kwargs", "env_wrapper")
#: Numbers such as 1e-3, which are texts in YAML
EXPONENTIAL = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")

Cell = tuple[str, str, str]


def _check_type(key: str, value: Any, kind: Any, parts: Any = None) -> None:
    """
    :param kind: ``Sequence`` (but no text), ``Mapping`` or ``str``
    :param parts: the same for the parts of the value
    :raises ValueError: if the value or one of its parts is not of its kind
    """
    if not isinstance(value, kind) or (kind is not str and isinstance(value, str)):
        form = {Sequence: "a list", Mapping: "keys and values", str: "a name"}[kind]
        raise ValueError(f"{key}={value!r} is not allowed; it must be {form}")
    if parts is not None:
        named = [(f"{key}: {name}", part) for name, part in value.items()] if kind is Mapping else [(key, x) for x in value]
        for name, part in named:
            _check_type(name, part, parts)


class Run(NamedTuple):
    """
    One training run.

    :param phase: one of :data:`PHASES`
    :param environment: id of the environment
    :param algorithm: name of the algorithm in the zoo
    :param setting: name of the setting; empty for the algorithm as it is
    :param seed: random seed
    :param learning_rate: learning rate of the search; None for that of the setting or the entry
    """

    phase: str
    environment: str
    algorithm: str
    setting: str
    seed: int
    learning_rate: float | None = None

    @property
    def cell(self) -> Cell:
        """Environment, algorithm and setting."""
        return self.environment, self.algorithm, self.setting


@dataclass(frozen=True)
class Search:
    """
    The search for a learning rate, for each setting and environment.

    :param learning_rates: the candidates; empty for no search
    :param seeds: number of runs with each candidate
    """

    learning_rates: Sequence[float] = ()
    seeds: int = 2

    def __post_init__(self) -> None:
        _check_type("search: learning_rates", self.learning_rates, Sequence)
        for rate in self.learning_rates:
            check_number("search: learning_rates", rate, low=0, low_included=False)
        check_number("search: seeds", self.seeds, low=1, integer=True)


@dataclass(frozen=True)
class Statistics:
    """
    Gradient statistics of all settings with ``n_episodes``, at policies of some of the settings.

    :param policies: settings that train the policies; empty for no statistics
    :param reference: setting with whose gradient directions are compared; empty for each setting's own gradient
    :param n_episodes: number of episodes at each policy, at least two batches of each setting. Typical: 128 to 4096.
    :param seeds: number of runs of each policy
    """

    policies: Sequence[str] = ()
    reference: str = ""
    n_episodes: int = 512
    seeds: int = 3

    def __post_init__(self) -> None:
        _check_type("statistics: policies", self.policies, Sequence)
        check_number("statistics: n_episodes", self.n_episodes, low=2, integer=True)
        check_number("statistics: seeds", self.seeds, low=0, integer=True)


@dataclass(frozen=True)
class Study:
    """
    A study: algorithms x settings x environments x seeds. Hyperparameters are those of the zoo's entries. For VPG, they are
    replaced by the keywords of ``common``, then of the environment, then of the setting. The other algorithms have no
    settings: they are references. Keywords that change the task, ``env_kwargs`` and ``env_wrapper`` of ``common`` and of the
    environment, hold for all algorithms.

    :param environments: for each id its keywords of VPG, and for all algorithms ``n_timesteps``, ``vec_env`` and
        ``score_range`` (returns with the normalized scores 0 and 1; by default the lowest and highest score of the runs). A
        list of ids is allowed.
    :param algorithms: names of algorithms in the zoo
    :param settings: keywords of VPG by name of the setting; empty for VPG as it is
    :param common: keywords of VPG for all runs
    :param entries: where hyperparameters start: True for the zoo's entries; a file of VPG's entries, or files by algorithm; or
        False for no entries of VPG (the keywords named here are all there are)
    :param steps: number of timesteps of each run; None for the environment's ``n_timesteps`` or the entry's
    :param seeds: number of runs of each algorithm and setting in each environment, >= 1
    :param first_seed: seed of the first of these runs
    :param vec_env: "envpool" or "native": class of the training environments. Evaluations do not use it.
    :param score: the return by which contestants are judged: "deterministic_return" or "stochastic_return" of the final model,
        or "training_return", the mean of the training episodes in the last tenth of the budget
    :param evaluation_episodes: number of episodes of each evaluation
    :param pairs: pairs of contestants; the report compares the second with the first. A third text is the question that the
        pair answers. By default, all are compared with the first one.
    :param search: the search for learning rates
    :param statistics: the gradient statistics
    :param gym_packages: names of modules that are imported first, which register environments or estimators
    :raises ValueError: if a name is not known, or a value is not allowed
    """

    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"CartPole-v1": {}})
    algorithms: Sequence[str] = ("vpg", "a2c", "ppo")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    entries: bool | str | Mapping[str, str] = True
    steps: int | None = None
    seeds: int = 4
    first_seed: int = 0
    vec_env: str | None = None
    score: str = "deterministic_return"
    evaluation_episodes: int = 100
    pairs: Sequence[Sequence[str]] = ()
    search: Search = Search()
    statistics: Statistics = Statistics()
    gym_packages: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._check_types()
        self.import_packages()
        check_number("steps", self.steps, low=1, integer=True, none=True)
        check_number("seeds", self.seeds, low=1, integer=True)
        check_number("first_seed", self.first_seed, low=0, integer=True)
        check_number("evaluation_episodes", self.evaluation_episodes, low=1, integer=True)
        check_choice("score", self.score, SCORES)
        check_choice("vec_env", self.vec_env, (None, *VEC_ENVS))
        register_environments()
        for name, environment in self.environments.items():
            self._check_environment(name, environment)
        keywords = {*self.common, *itertools.chain.from_iterable(self.environments.values())}
        own = [*self.settings, *sorted(keywords.difference(ENVIRONMENT_KEYS, TASK_KEYS))]
        own += ["entries"] if isinstance(self.entries, str) else []
        if own and not set(self.algorithms) & set(OWN_ALGORITHMS):
            raise ValueError(
                f"{', '.join(own)}: settings and keywords are those of VPG; add one of "
                f"{', '.join(OWN_ALGORITHMS)} to the algorithms"
            )
        for name in self.settings:
            if name in self.algorithms:
                raise ValueError(f"settings: {name} is the name of an algorithm; choose another")
        for pair in self.pairs:
            are_texts = isinstance(pair, (list, tuple)) and all(isinstance(text, str) for text in pair)
            if not are_texts or len(pair) not in (2, 3):
                raise ValueError(
                    f"pairs: {pair!r} is not allowed; it must be two contestants, and optionally a question in quotation marks"
                )
            for name in pair[:2]:
                check_known("pairs", name, self.contestants)
        for name in self.statistics.policies:
            check_known("statistics: policies", name, self.settings)
        if self.statistics.reference:
            check_known("statistics: reference", self.statistics.reference, self.settings)

    def _check_types(self) -> None:
        for key, kind, parts in (
            *(("algorithms", Sequence, str), ("gym_packages", Sequence, str), ("pairs", Sequence, None)),
            *(("environments", Mapping, Mapping), ("settings", Mapping, Mapping), ("common", Mapping, None)),
        ):
            _check_type(key, getattr(self, key), kind, parts)
        for key in ("algorithms", "environments"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; name at least one")
        if isinstance(self.entries, Mapping):
            _check_type("entries", self.entries, Mapping, str)
            for name in self.entries:
                check_known("entries", name, self.algorithms)
        elif not isinstance(self.entries, str):
            check_choice("entries", self.entries, (True, False))

    def _check_environment(self, name: str, environment: Mapping[str, Any]) -> None:
        check_known("environment", name, gym.registry, " --gym-packages names the modules that register others")
        check_number(f"{name}: n_timesteps", environment.get("n_timesteps"), low=1, integer=True, none=True)
        check_choice(f"{name}: vec_env", environment.get("vec_env"), (None, *VEC_ENVS))
        score_range = environment.get("score_range", (0, 1))
        _check_type(f"{name}: score_range", score_range, Sequence)
        if len(score_range) != 2:
            raise ValueError(f"{name}: score_range={score_range} is not allowed; it must be two returns")
        low, high = score_range
        check_number(f"{name}: score_range", low)
        check_number(f"{name}: score_range", high, low=low, low_included=False)
        if self.entries is False and self.steps is None and "n_timesteps" not in environment:
            raise ValueError(f"{name}: n_timesteps is missing; it is required with entries: false")

    def import_packages(self) -> None:
        """Import the modules of ``gym_packages``; each process needs it."""
        for name in self.gym_packages:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ValueError(f"gym_packages: {name} cannot be imported: {error}") from error

    @property
    def contestants(self) -> dict[str, tuple[str, str]]:
        """Algorithm and setting of each contestant, by the name that the report uses."""
        own = [algorithm for algorithm in self.algorithms if algorithm in OWN_ALGORITHMS]
        named = {}
        for algorithm in self.algorithms:
            for setting in (self.settings or [""]) if algorithm in own else [""]:
                name = setting if len(own) == 1 and setting else f"{algorithm} {setting}".strip()
                named[name] = (algorithm, setting)
        return named

    @property
    def measured(self) -> dict[str, str]:
        """Contestant of each setting, for the algorithm whose gradients are measured."""
        own = next((algorithm for algorithm in self.algorithms if algorithm in OWN_ALGORITHMS), "")
        return {setting: name for name, (algorithm, setting) in self.contestants.items() if algorithm == own}

    def entries_of(self, algorithm: str) -> bool | str:
        """:return: the algorithm's file of entries; True for the zoo's, False for none"""
        if isinstance(self.entries, Mapping):
            return self.entries.get(algorithm, True)
        return self.entries if algorithm in OWN_ALGORITHMS else True

    def keywords(self, environment: str, algorithm: str, setting: str) -> dict[str, Any]:
        """:return: hyperparameters that replace those of the zoo's entry"""
        of_environment = self.environments[environment]
        n_timesteps = self.steps or of_environment.get("n_timesteps")
        keywords = {} if n_timesteps is None else {"n_timesteps": n_timesteps}
        vec_env = of_environment.get("vec_env", self.vec_env)
        if vec_env is not None:
            keywords["vec_env_class"] = VEC_ENVS[vec_env]
            # The runs of a study are what is parallel
            keywords["vec_env_kwargs"] = {"num_threads": 1} if vec_env == "envpool" else {}
        task = {**self.common, **of_environment}
        keywords |= {key: task[key] for key in TASK_KEYS if key in task}
        if algorithm in OWN_ALGORITHMS:
            own = {key: value for key, value in of_environment.items() if key not in ENVIRONMENT_KEYS}
            keywords = {**self.common, **own, **keywords, **self.settings.get(setting, {})}
        return keywords

    def seeds_of(self, phase: str) -> range:
        """:return: the seeds of the runs of one of :data:`PHASES`"""
        first, number = {
            "search": (FIRST_SEARCH_SEED, self.search.seeds),
            "final": (self.first_seed, self.seeds),
            "statistics": (0, self.statistics.seeds),
        }[phase]
        return range(first, first + number)

    def search_runs(self, environments: Iterable[str], contestants: Iterable[str]) -> Iterator[Run]:
        """:return: the runs of the search"""
        for environment, name in itertools.product(environments, contestants):
            algorithm, setting = self.contestants[name]
            if algorithm in OWN_ALGORITHMS:
                for rate, seed in itertools.product(dict.fromkeys(self.search.learning_rates), self.seeds_of("search")):
                    yield Run("search", environment, algorithm, setting, seed, rate)

    def final_runs(
        self, environments: Iterable[str], contestants: Iterable[str], chosen: Mapping[Cell, float]
    ) -> Iterator[Run]:
        """
        :param environments: ids of environments
        :param contestants: names of contestants
        :param chosen: learning rates that the search has selected
        :return: the final runs, seed by seed
        """
        for seed, environment, name in itertools.product(self.seeds_of("final"), environments, contestants):
            run = Run("final", environment, *self.contestants[name], seed)
            yield run._replace(learning_rate=chosen.get(run.cell))

    def statistics_runs(
        self, environments: Iterable[str], contestants: Iterable[str], chosen: Mapping[Cell, float]
    ) -> Iterator[Run]:
        """:return: the runs that measure gradients, of the first algorithm that has settings; see :meth:`final_runs`"""
        measured, among = self.measured, set(contestants)
        policies = [measured[setting] for setting in dict.fromkeys(self.statistics.policies) if measured.get(setting) in among]
        for seed, environment, name in itertools.product(self.seeds_of("statistics"), environments, policies):
            run = Run("statistics", environment, *self.contestants[name], seed)
            yield run._replace(learning_rate=chosen.get(run.cell))


class Selection(NamedTuple):
    """
    The part of a study that is run or reported.

    :param environments: ids of environments
    :param contestants: names of contestants
    """

    environments: Sequence[str]
    contestants: Sequence[str]


def read_yaml(path: Path) -> Any:
    """
    :return: the content of a YAML file
    :raises ValueError: if it cannot be read
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """
    :param path: YAML file with the parameters of :class:`Study`; those that it omits have their defaults. The file study.yml
        in the folder of a study is one, too
    :return: the settings
    :raises ValueError: if the file cannot be read or is not a mapping
    """
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected keys and values, got {settings!r}")
    return _with_numbers(settings["study"] if settings.keys() >= {"format", "study"} else settings)


def make_study(settings: Mapping[str, Any]) -> Study:
    """
    :param settings: parameters of :class:`Study`, as YAML has them
    :return: the study
    :raises ValueError: if a key is not known, or a value is not allowed
    """
    values = {**settings}
    for key, cls in (("search", Search), ("statistics", Statistics)):
        if key in values:
            values[key] = _made(cls, values[key], f"{key}: key")
    if isinstance(values.get("environments"), list):
        if any(isinstance(name, (dict, list)) for name in values["environments"]):
            raise ValueError("environments: with keywords, write `name: {keywords}` without the hyphens of a list")
        values["environments"] = dict.fromkeys(values["environments"])
    # A key without a value is None in YAML
    for key in ("settings", "common"):
        values[key] = {} if values.get(key) is None else values[key]
    for key in ("environments", "settings"):
        if isinstance(values.get(key), Mapping):
            named = values[key].items()
            values[key] = {str(name): {} if keywords is None else keywords for name, keywords in named}
    return _made(Study, values, "key")


def _made(cls: type, values: Any, what: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: expected keys and values, got {values!r}")
    for key in values:
        check_known(what, key, [field.name for field in fields(cls)])
    return cls(**values)


def varied(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """
    :param texts: keywords and their values, such as "gae_lambda=0.9,0.95,1"
    :return: a setting for each combination of values, by name
    :raises ValueError: if a text has another form
    """
    choices: dict[str, list[tuple[str, Any]]] = {}
    for text in texts:
        keyword, equals, values = text.partition("=")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise ValueError(f"--vary {text!r}: {values!r} is not a list of values: {error}") from error
        if not (keyword and equals and parsed):
            raise ValueError(f"--vary {text!r} is not allowed; it must have the form keyword=value,value")
        if keyword in choices:
            raise ValueError(f"--vary has {keyword} twice; name all of its values at once: {keyword}=value,value")
        choices[keyword] = [(keyword, value) for value in _with_numbers(parsed)]
    return {", ".join(f"{key}={value}" for key, value in one): dict(one) for one in itertools.product(*choices.values())}


def _with_numbers(value: Any) -> Any:
    """:return: the value with numbers in place of texts such as 1e-3, in lists and mappings, too"""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENTIAL.fullmatch(value) else value
