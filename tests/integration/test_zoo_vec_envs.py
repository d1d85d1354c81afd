"""In which vectorized environments the zoo trains: as users run its commands, with an installed wheel."""

import pytest
import yaml
from helpers.installed import Environment, output_of
from helpers.zoo import zoo_command

ENVPOOL = "Training in EnvPoolVecEnv, evaluation in DummyVecEnv"
SHORT = ("-n", "400", "--eval-freq", "200", "--eval-episodes", "1")


def read_config(folder):
    return dict(yaml.load((folder / "config.yml").read_text(), Loader=yaml.UnsafeLoader))


@pytest.mark.parametrize("algo", ["vpg", "a2c", "ppo", "trpo"])
def test_every_algorithm_trains_in_envpool(installed: Environment, algo: str):
    pytest.importorskip("envpool")
    logs = f"envpool_{algo}"
    chosen = ("--vec-env", "envpool", "-params", "n_envs:2", "n_steps:50")
    train = ("-m", "sb3_vpg", "train", "--algo", algo, "--env", "Acrobot-v1", *SHORT, "-f", logs, *chosen)
    output = output_of(installed.run_warm(*train))
    assert ENVPOOL in output
    assert "Eval num_timesteps=200" in output
    # The evaluation differs from training on purpose
    assert "not of the same type" not in output
    folder = installed.cwd / logs / algo / "Acrobot-v1_1"
    config = read_config(folder / "Acrobot-v1")
    assert (config["vec_env_class"], config["n_envs"]) == ("sb3_vpg.envs.EnvPoolVecEnv", 2)
    assert len(list(folder.glob("*.monitor.csv"))) == 2
    # The saved hyperparameters are no obstacle
    enjoy = zoo_command("enjoy", "--algo", algo, "--env", "Acrobot-v1", "--no-render", "-f", logs, "-n", "100")
    assert f"Loading {logs}" in output_of(installed.run_warm(*enjoy))


def test_an_entry_may_name_the_class_and_its_keyword_arguments(installed: Environment):
    pytest.importorskip("envpool")
    entry = {"n_timesteps": 400, "policy": "MlpPolicy", "n_envs": 2, "n_steps": 50, "normalize": True}
    entry |= {"vec_env_class": "sb3_vpg.envs.EnvPoolVecEnv", "vec_env_kwargs": {"num_threads": 0}}
    (installed.cwd / "envpool.yml").write_text(yaml.safe_dump({"Pendulum-v1": entry}))
    train = zoo_command("train", "--algo", "a2c", "--env", "Pendulum-v1", "-conf", "envpool.yml", "-f", "entry", *SHORT)
    process = installed.run_warm(*train)
    assert process.returncode != 0
    assert "num_threads=0 is not allowed" in process.stderr
    output = output_of(installed.run_warm(*train, "-params", "vec_env_kwargs:dict(num_threads=1)"))
    assert ENVPOOL in output
    # The command line has priority
    output = output_of(installed.run_warm(*train, "--vec-env", "dummy"))
    assert ENVPOOL not in output


def test_arguments_of_no_class_are_refused(installed: Environment):
    train = zoo_command("train", "--algo", "vpg", "--env", "CartPole-v1", "-f", "no_class", *SHORT)
    process = installed.run_warm(*train, "-params", "vec_env_kwargs:dict(num_threads=1)")
    assert "ValueError: vec_env_kwargs has no effect without vec_env_class" in process.stderr


def test_every_algorithm_trains_in_the_native_form(installed: Environment):
    train = ("-m", "sb3_vpg", "train", "--algo", "a2c", "--env", "CartPole-v1", "--vec-env=native", *SHORT, "-f", "native_a2c")
    output = output_of(installed.run_warm(*train))
    assert "Training in NativeVecEnv, evaluation in DummyVecEnv" in output
    assert "falls back" not in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sb3_vpg.envs.Engine", "vec_env_class='sb3_vpg.envs.Engine' cannot be imported"),
        ("sb3_vpg.VPG", "vec_env_class='sb3_vpg.VPG' is not allowed; allowed: the full name of a VecEnv class"),
    ],
)
def test_a_class_that_is_no_vec_env_is_refused(installed: Environment, name: str, message: str):
    train = zoo_command("train", "--algo", "a2c", "--env", "CartPole-v1", "-f", "refused", *SHORT)
    process = installed.run_warm(*train, "-params", f"vec_env_class:'{name}'")
    assert process.returncode != 0
    assert message in process.stderr
