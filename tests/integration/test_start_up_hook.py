"""Starting Python after ``pip install`` makes the zoo know VPG, and loads nothing before the zoo is imported."""

from helpers.installed import HOOK_OFF, Environment, output_of
from helpers.zoo import TRAIN_CARTPOLE, zoo_command


def test_the_hook_imports_nothing_but_os_and_sys(installed: Environment):
    script = """
import os, sys
sys.path.append(sys.argv[1])
before = set(sys.modules)
import sb3_vpg_zoo_hook
print(sorted(set(sys.modules) - before))
"""
    assert output_of(installed.run("-I", "-S", "-c", script, installed.site_packages)).strip() == "['sb3_vpg_zoo_hook']"


def test_starting_python_loads_the_hook_and_nothing_of_the_package(installed: Environment):
    assert installed.evaluate("'sb3_vpg_zoo_hook' in sys.modules") == "True"
    loaded = "[name for name in ('sb3_vpg', 'numpy', 'torch', 'gymnasium', 'rl_zoo3') if name in sys.modules]"
    assert installed.evaluate(loaded) == "[]"


def test_without_the_hook_the_zoo_does_not_know_vpg(installed: Environment):
    process = installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, "-n", "300"), env=HOOK_OFF)
    assert process.returncode == 2
    assert "argument --algo: invalid choice: 'vpg'" in process.stderr


def test_two_hooks_at_once_do_no_harm(installed: Environment):
    # As with a copy from a checkout and one from a wheel
    script = """
import importlib, sb3_vpg_zoo_hook
importlib.reload(sb3_vpg_zoo_hook)
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
print(ALGOS["vpg"].__module__, [cls.__module__ for cls in ExperimentManager.__mro__])
"""
    assert output_of(installed.run_warm("-c", script)).strip() == (
        "sb3_vpg.vpg ['sb3_vpg.zoo.manager', 'rl_zoo3.exp_manager', 'builtins']"
    )


def test_a_broken_package_leaves_the_zoo_working(installed: Environment):
    broken = installed.cwd / "broken" / "sb3_vpg"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    command = zoo_command("train", "--algo", "ppo", "-n", "300", "-f", "beside_broken", "--eval-freq", "-1")
    output = output_of(installed.run_warm(*command, env={"PYTHONPATH": str(broken.parent)}))
    assert "UserWarning: sb3_vpg could not add VPG to rl_zoo3.utils: RuntimeError('broken on purpose')" in output
    assert (installed.cwd / "beside_broken/ppo/CartPole-v1_1/CartPole-v1.zip").is_file()
