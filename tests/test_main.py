"""Arguments of ``python -m sb3_vpg``."""

import importlib.util
import re
import sys

import pytest

from sb3_vpg.__main__ import COMMANDS, main, translate_vec_env

ENVPOOL = "vec_env_class:'sb3_vpg.envs.EnvPoolVecEnv'"
NATIVE = "vec_env_class:'sb3_vpg.envs.NativeVecEnv'"


@pytest.mark.parametrize(
    ("arguments", "translated"),
    [
        ("--env Ant-v5 --vec-env envpool -n 9", f"--env Ant-v5 -n 9 -params {ENVPOOL}"),
        ("--vec-env=native --env Ant-v5", f"--env Ant-v5 -params {NATIVE}"),
        ("--vec-env envpool -params n_envs:2 -n 9", f"-params {ENVPOOL} n_envs:2 -n 9"),
        ("--hyperparams n_envs:2 --vec-env envpool", f"--hyperparams {ENVPOOL} n_envs:2"),
        ("--vec-env subproc -n 9", "--vec-env subproc -n 9"),
        ("-n 9", "-n 9"),
    ],
)
def test_engines_become_a_hyperparameter(arguments, translated):
    assert translate_vec_env(arguments.split()) == translated.split()


def test_watch_says_how_to_install_pygame(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pygame" else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["sb3_vpg", "watch"])
    with pytest.raises(SystemExit, match=r"^This command draws pictures: pip install 'sb3_vpg\[render\]'$"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["sb3_vpg", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr().out
    assert output.startswith("usage: ")
    assert re.search(rf"^examples?:\n( .*\n)*  python -m sb3_vpg {command} -", output, re.MULTILINE)
