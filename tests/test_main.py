"""Arguments of ``python -m sb3_vpg``."""

import importlib.util
import re
import sys

import pytest

from sb3_vpg.__main__ import COMMANDS, main, translate_vec_env

ENVPOOL = "vec_env_class:'sb3_vpg.envs.EnvPoolVecEnv'"
NATIVE = "vec_env_class:'sb3_vpg.envs.NativeVecEnv'"


def pretend_installed(monkeypatch, package: str, installed: bool) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None if name == package else find_spec(name))


@pytest.mark.parametrize(
    ("arguments", "translated"),
    [
        ("--env Ant-v5 --vec-env envpool -n 9", f"--env Ant-v5 -n 9 -params {ENVPOOL}"),
        ("--vec-env=native --env Ant-v5", f"--env Ant-v5 -params {NATIVE}"),
        ("--vec-env envpool -params n_envs:2 gamma:1 -n 9", f"-n 9 -params {ENVPOOL} n_envs:2 gamma:1"),
        ("--hyperparams n_envs:2 --vec-env envpool", f"-params {ENVPOOL} n_envs:2"),
        ("-params=n_envs:2 --vec-env envpool -P", f"-P -params {ENVPOOL} n_envs:2"),
        # The zoo uses the last ones, too
        ("--vec-env native -params n_envs:2 -params n_envs:3", f"-params {NATIVE} n_envs:3"),
        # The zoo accepts abbreviations
        ("--vec-env native --hyperparam n_envs:3", f"-params {NATIVE} n_envs:3"),
        ("--vec-env subproc -n 9", "--vec-env subproc -n 9"),
        ("-n 9", "-n 9"),
    ],
)
def test_engines_become_a_hyperparameter(monkeypatch, arguments, translated):
    pretend_installed(monkeypatch, "envpool", True)
    assert translate_vec_env(arguments.split()) == translated.split()


def test_an_engine_that_is_not_known_is_refused():
    with pytest.raises(SystemExit, match="--vec-env nativ is not allowed; allowed: dummy, subproc, envpool, native"):
        translate_vec_env(["--vec-env", "nativ"])


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("pygame", "watch", "This command draws pictures: pip install 'sb3_vpg[render]'"),
        ("scipy", "compare", "This command draws plots: pip install 'sb3_vpg[plots]'"),
        ("envpool", "train --vec-env envpool", "--vec-env envpool needs EnvPool: pip install 'sb3_vpg[envpool]'"),
    ],
)
def test_a_command_says_how_to_install_what_it_lacks(monkeypatch, package, arguments, message):
    pretend_installed(monkeypatch, package, False)
    monkeypatch.setattr(sys, "argv", ["sb3_vpg", *arguments.split()])
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["sb3_vpg", command, "--help"])
    # runpy warns of a module that is imported already
    monkeypatch.delitem(sys.modules, f"{COMMANDS[command][0]}.__main__", raising=False)
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr().out
    assert output.startswith("usage: ")
    assert re.search(rf"^examples?:\n( .*\n)*  python -m sb3_vpg {command} -", output, re.MULTILINE)
