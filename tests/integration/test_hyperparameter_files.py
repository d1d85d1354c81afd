"""Hyperparameter files: numbers are numbers, keys are known, and the zoo makes a model of each entry."""

import inspect
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from helpers.installed import CHECKOUT, HYPERPARAMS, Environment, output_of
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

from sb3_vpg import VPG, MaskableVPG, RecurrentVPG
from sb3_vpg.zoo.masks import ZooMaskablePPO

ALGORITHMS = {"vpg": VPG, "vpg_lstm": RecurrentVPG, "vpg_mask": MaskableVPG, "ppo": PPO, "trpo": TRPO, "a2c": A2C}
ALGORITHMS["ppo_mask"] = ZooMaskablePPO
# What the zoo takes out of an entry before the algorithm gets it
ZOO_KEYS = {
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper"),
    *("env_kwargs", "monitor_kwargs", "callback", "vec_env_class", "vec_env_kwargs"),
}
# What the zoo gives to the algorithm itself
NOT_IN_ENTRIES = {"env", "seed", "verbose", "device", "tensorboard_log", "_init_setup_model"}


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error: PyYAML would take the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice in {keys}"
        return super().construct_mapping(node, deep)


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Studies have a form of their own
STUDIES = [name for name in HYPERPARAMS if name.startswith("hyperparams/studies/")]
ZOO_FILES = [name for name in HYPERPARAMS if name not in STUDIES]


@pytest.fixture(scope="module", params=ZOO_FILES)
def file(request: pytest.FixtureRequest) -> str:
    return request.param


def algorithm_of(file: str) -> str:
    """Files with other names than an algorithm's are for VPG."""
    name = Path(file).name
    return name if name in ALGORITHMS else "vpg"


def entries_of(file: str) -> dict[str, dict[str, Any]]:
    return yaml.load(HYPERPARAMS[file].read_text(), Loader=StrictLoader)


@pytest.mark.parametrize("file", HYPERPARAMS)
def test_numbers_in_hyperparameter_files_are_numbers(file: str):
    # PyYAML reads 1e-3 and 1e6 as strings
    for path, value in leaves(entries_of(file), file):
        if isinstance(value, str):
            assert not is_number(value), f"{path}: {value!r} is a string; write it with a decimal point or with !!float"
            if value.startswith("lin_"):
                assert is_number(value.removeprefix("lin_")), f"{path}: {value!r} is not a linear schedule"


def test_keys_in_hyperparameter_files_are_known(file: str):
    known = (set(inspect.signature(ALGORITHMS[algorithm_of(file)]).parameters) | ZOO_KEYS) - NOT_IN_ENTRIES
    for env_id, entry in entries_of(file).items():
        assert set(entry) <= known, env_id
        assert {"policy", "n_timesteps"} <= set(entry), env_id


# What a study adds to an entry
ENGINE_KEYS = {"vec_env_class", "vec_env_kwargs"}


@pytest.mark.parametrize("algo", ["a2c", "ppo", "trpo"])
def test_entries_of_references_are_those_of_the_zoo(algo: str):
    """Of an older version of the environment, or of Ant where the zoo has none."""
    zoo = yaml.safe_load((resources.files("rl_zoo3") / "hyperparams" / f"{algo}.yml").read_text())
    own = {name: entry for name, entry in entries_of(f"hyperparams/{algo}").items() if name.endswith("-v5")}
    assert len(own) >= 10

    def comparable(entry: dict[str, Any]) -> dict[str, str]:
        # Texts have other spaces in the zoo
        return {key: re.sub(r"\s", "", str(value)) for key, value in {"n_envs": 1, **entry}.items()}

    for name, entry in own.items():
        candidates = [name.replace("-v5", version) for version in ("-v4", "-v3", "-v2")] + ["Ant-v4"]
        source = zoo[next(candidate for candidate in candidates if candidate in zoo)]
        assert comparable(entry) == comparable(source), name


@pytest.mark.parametrize(("study", "n_comments"), [("zoo", 7), ("continuous_control", 7), ("minigrid", 5)])
def test_reported_runs_had_the_entries_and_the_returns_that_the_comments_give(study: str, n_comments: int):
    folder = CHECKOUT / "benchmarks" / "results" / study
    runs = pd.read_csv(folder / "runs.csv").sort_values("seed")
    settings = yaml.safe_load((folder / "study.yml").read_text())
    hyperparameters, score = settings["hyperparameters"], settings["study"]["score"]
    with_returns = 0
    for algorithm, of_algorithm in runs.groupby("algorithm"):
        file = f"hyperparams/{algorithm}"
        entries, text = entries_of(file), HYPERPARAMS[file].read_text()
        for env_id, of_env in of_algorithm.groupby("environment"):
            if env_id not in entries:
                # One of the zoo's own
                continue
            cell = f"{env_id}, {algorithm}"
            used = {key: value for key, value in hyperparameters[cell].items() if key not in ENGINE_KEYS}
            assert used == entries[env_id], cell

            comment = re.search(rf"10 seeds from 100 on: ((?:-?[\d.]+ ){{9}}-?[\d.]+)\).*\n(?:#.*\n)*{env_id}:", text)
            if comment is not None:
                returns = comment[1].split()
                digits = len(returns[0].partition(".")[2])
                assert returns == [f"{value:.{digits}f}" for value in of_env[score]], cell
                with_returns += 1
    assert with_returns >= n_comments


def test_the_study_of_the_default_entry_is_of_this_entry():
    study = entries_of("hyperparams/studies/default_entry")
    used = study["common"] | study["settings"]["default"] | {"n_timesteps": study["steps"]}
    assert used == entries_of("hyperparams/vpg")["default"]


CONSTRUCT = """
import argparse, json, sys
import gymnasium as gym
from rl_zoo3.exp_manager import ExperimentManager

algorithm, config, *env_ids = sys.argv[1:]
gym.register("NotListed-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=500)
constructed = {}
for env_id in env_ids:
    try:
        gym.make(env_id).close()
    except gym.error.DependencyNotInstalled:
        continue
    settings = dict(eval_freq=-1, config=config, device="cpu", verbose=0)
    model, _ = ExperimentManager(argparse.Namespace(), algorithm, env_id, "construct", **settings).setup_experiment()
    constructed[env_id] = type(model).__name__
    model.env.close()
print(json.dumps(constructed))
"""
# Environments that come with gymnasium or with the package: these must be there
ALWAYS_THERE = ("NotListed", "CartPole", "Acrobot", "MountainCar", "Pendulum")


def test_entries_in_hyperparameter_files_construct_a_model(installed: Environment, file: str):
    entries, algorithm = entries_of(file), algorithm_of(file)
    # NotListed-v0 gets the default entry
    env_ids = {env_id.replace("default", "NotListed-v0") for env_id in entries if env_id != "atari"}
    process = installed.run_warm("-c", CONSTRUCT, algorithm, HYPERPARAMS[file], *sorted(env_ids))
    output_of(process)
    constructed = json.loads(process.stdout.splitlines()[-1])
    assert set(constructed) >= {env_id for env_id in env_ids if env_id.startswith(ALWAYS_THERE)}
    assert set(constructed.values()) == {ALGORITHMS[algorithm].__name__}


MAKE_STUDIES = """
import sys
from pathlib import Path
from sb3_vpg.zoo import register

# The environments of the zoo
register()
from sb3_vpg.study.study import make_study, read_settings

for path in sys.argv[1:]:
    study = make_study(read_settings(Path(path)))
    print(len(list(study.final_runs(study.environments, study.contestants, {}))))
"""


def test_studies_of_the_package_are_valid(installed: Environment):
    process = installed.run_warm("-c", MAKE_STUDIES, *(str(HYPERPARAMS[name]) for name in STUDIES))
    output_of(process)
    assert len([n_runs for n_runs in process.stdout.split() if int(n_runs) > 0]) == len(STUDIES) > 0
