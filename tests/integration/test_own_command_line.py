"""``python -m sb3_vpg``: the zoo's commands without the hook, and what is said where the zoo is missing."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.installed import HOOK_OFF, Environment, output_of
from helpers.zoo import CARTPOLE_ENTRY, saved_config

from sb3_vpg.__main__ import COMMANDS

# ---------------------------------------------------------------------------------------------------------------
# python -m sb3_vpg
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [HOOK_OFF, {}], ids=["without the hook", "with the hook"])
def test_own_command_line_trains_vpg_by_default(installed: Environment, env: dict[str, str]):
    logs = f"own{len(env)}"
    output = output_of(installed.run_warm("-m", "sb3_vpg", "train", "--env", "CartPole-v1", "-n", "300", "-f", logs, env=env))
    assert f"Loading hyperparameters from: {installed.site_packages / 'sb3_vpg' / 'hyperparams' / 'vpg.yml'}" in output
    assert saved_config(installed, logs) == CARTPOLE_ENTRY
    # The zoo puts a TimeLimit of its own in place of gymnasium's, here after the package has been imported
    assert "Using NativeVecEnv" in output
    assert "falls back" not in output
    output = output_of(installed.run_warm("-m", "sb3_vpg", "enjoy", "--no-render", "-f", logs, "-n", "1000", env=env))
    assert re.search(r"Mean reward: \d+", output)


def test_own_command_line_takes_other_algorithms(installed: Environment):
    output_of(installed.run_warm("-m", "sb3_vpg", "train", "--algo=a2c", "-n", "300", "-f", "own_a2c"))
    assert (installed.cwd / "own_a2c/a2c/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]], ids=" ".join)
def test_own_command_line_explains_itself(installed: Environment, arguments: list[str]):
    output = output_of(installed.run_warm("-m", "sb3_vpg", *arguments))
    assert output.startswith("usage: python -m sb3_vpg COMMAND")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w+", output, re.MULTILINE)


def test_own_command_line_refuses_an_unknown_command(installed: Environment):
    process = installed.run_warm("-m", "sb3_vpg", "trian")
    assert process.returncode == 1
    assert process.stdout == ""
    assert "error: unknown command 'trian'" in process.stderr
    assert process.stderr.startswith("usage: ")


# ---------------------------------------------------------------------------------------------------------------
# Without the zoo
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_zoo(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Environment]:
    """The wheel installed where rl_zoo3, what comes with it and what the other extras add are missing."""
    # Not matplotlib and pandas, which Stable-Baselines3 itself needed before 2.9
    missing = ("rl_zoo3", "sb3_contrib", "optuna", "huggingface_sb3", "pygame", "seaborn", "scipy", "tensorboard")
    folder = tmp_path_factory.mktemp("without_zoo")
    without = Environment.make(folder / "env", folder, wheel, without=missing)
    assert without.evaluate(f"[name for name in {missing} if importlib.util.find_spec(name)]") == "[]"
    yield without
    without.close()


def test_vpg_learns_without_the_zoo(without_zoo: Environment):
    script = """
import warnings
warnings.simplefilter("error")
from sb3_vpg import VPG
print(VPG("MlpPolicy", "CartPole-v1", n_steps=64).learn(200).num_timesteps)
"""
    assert output_of(without_zoo.run_warm("-c", script)) == "256\n"


def test_own_command_line_says_how_to_install_the_zoo(without_zoo: Environment):
    process = without_zoo.run_warm("-m", "sb3_vpg", "train")
    assert process.returncode == 1
    assert process.stderr == "This command needs RL Baselines3 Zoo: pip install 'sb3_vpg[zoo]'\n"


def test_importing_the_package_imports_no_optional_dependency(installed: Environment):
    script = """
import sys
import stable_baselines3, torch.distributed.nn.functional
before = set(sys.modules)
import sb3_vpg
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    assert output_of(installed.run("-c", script)).strip() == "['sb3_vpg']"
