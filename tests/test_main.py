"""Arguments of ``python -m sb3_vpg``."""

import pytest

from sb3_vpg.__main__ import translate_vec_env

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
