"""What is built from the checkout must be whole and nothing else, and the hyperparameter files must be usable."""

import inspect
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.installed import CHECKOUT, Environment, build_wheel, call, output_of
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

from sb3_vpg import VPG

ALGORITHMS = {"vpg": VPG, "ppo": PPO, "trpo": TRPO, "a2c": A2C}
HYPERPARAMS = {
    path.relative_to(CHECKOUT).with_suffix("").as_posix(): path for path in sorted((CHECKOUT / "hyperparams").rglob("*.yml"))
}
# What the zoo takes out of an entry before the algorithm gets it
ZOO_KEYS = {
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper"),
    *("env_kwargs", "monitor_kwargs", "callback"),
}
# What the zoo gives to the algorithm itself
NOT_IN_ENTRIES = {"env", "seed", "verbose", "device", "tensorboard_log", "_init_setup_model"}


# ---------------------------------------------------------------------------------------------------------------
# Wheel and source distribution
# ---------------------------------------------------------------------------------------------------------------


def version_in_pyproject() -> str:
    return re.search(r'^version = "(.+)"$', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_the_wheel_holds_the_package_and_the_hook_and_nothing_else(wheel: Path):
    package = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "sb3_vpg").rglob("*.py")}
    package = package - {"sb3_vpg/zoo/start_up_hook.py"} | {"sb3_vpg/py.typed"}
    hyperparams = {f"sb3_vpg/{name}.yml" for name in HYPERPARAMS}
    assert "sb3_vpg/hyperparams/vpg.yml" in hyperparams
    # At the top level, and only there
    hook = {"sb3_vpg_zoo_hook.py", "sb3_vpg_zoo_hook.pth"}
    info = f"sb3_vpg-{version_in_pyproject()}.dist-info"
    metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names_in(wheel) == sorted(package | hyperparams | hook | metadata)


def test_the_hook_in_the_wheel_is_one_line_that_imports_it(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("sb3_vpg_zoo_hook.pth") == b"import sb3_vpg_zoo_hook\n"
        assert archive.read("sb3_vpg_zoo_hook.py") == (CHECKOUT / "sb3_vpg" / "zoo" / "start_up_hook.py").read_bytes()


def test_a_wheel_built_from_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path):
    build = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    output_of(call(*build, CHECKOUT, cwd=tmp_path))
    name = f"sb3_vpg-{version_in_pyproject()}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    files = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*")}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_packaging.py"} <= files
    assert "rl-trained-agents/vpg/CartPole-v1_1/CartPole-v1.zip" in files
    again = build_wheel(tmp_path / name, tmp_path)
    assert names_in(again) == names_in(wheel)
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        for file in names_in(wheel):
            assert one.read(file) == other.read(file), file


def test_the_version_is_said_once(wheel: Path, installed: Environment):
    version = version_in_pyproject()
    (metadata,) = (name for name in names_in(wheel) if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        assert HeaderParser().parsestr(archive.read(metadata).decode())["Version"] == version
    assert output_of(installed.run("-c", "import sb3_vpg; print(sb3_vpg.__version__)")).strip() == version
    changelog = (CHECKOUT / "CHANGELOG.md").read_text()
    assert ("## Unreleased" if ".dev" in version else f"## {version}") in changelog


# ---------------------------------------------------------------------------------------------------------------
# Hyperparameter files
# ---------------------------------------------------------------------------------------------------------------


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


# A study of formulations has a form of its own: tests/test_ablation.py
ZOO_FILES = [name for name in HYPERPARAMS if not name.startswith("hyperparams/ablation/")]


@pytest.fixture(scope="module", params=ZOO_FILES)
def file(request: pytest.FixtureRequest) -> str:
    return request.param


def algorithm_of(file: str) -> str:
    """Files in folders are for VPG."""
    return file.removeprefix("hyperparams/") if file.count("/") == 1 else "vpg"


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
    except gym.error.Error:  # needs a package that is not here
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
    process = installed.run("-c", CONSTRUCT, algorithm, HYPERPARAMS[file], *sorted(env_ids))
    output_of(process)
    constructed = json.loads(process.stdout.splitlines()[-1])
    assert set(constructed) >= {env_id for env_id in env_ids if env_id.startswith(ALWAYS_THERE)}
    assert set(constructed.values()) == {ALGORITHMS[algorithm].__name__}
