"""
RL Baselines3 Zoo must know VPG after ``pip install``. Its commands run as users run them: from a folder that is not the
checkout, with the package imported from an installed wheel.
"""

import importlib.util
import json
import re
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import pytest
import yaml
from installed import CHECKOUT, HOOK_OFF, Environment, output_of, wait_until
from stable_baselines3.common.env_util import make_vec_env

from sb3_vpg import VPG, zoo
from sb3_vpg.estimators import BASELINES, ESTIMATORS
from sb3_vpg.zoo.runs import ContinuedVPG, StopAtBudget, check_budget
from sb3_vpg.zoo.search_space import FORMULATIONS

CARTPOLE_ENTRY = yaml.safe_load((CHECKOUT / "hyperparams" / "vpg.yml").read_text())["CartPole-v1"]
TRAIN_CARTPOLE = ("train", "--algo", "vpg", "--env", "CartPole-v1", "--seed", "1")


def zoo_command(command: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"rl_zoo3.{command}", *arguments)


def saved_config(installed: Environment, logs: str) -> dict[str, Any]:
    """What the zoo says it trained with, as it reads it itself, in the first run under the log folder."""
    file = installed.cwd / logs / "vpg" / "CartPole-v1_1" / "CartPole-v1" / "config.yml"
    return dict(yaml.load(file.read_text(), Loader=yaml.UnsafeLoader))


# ---------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(installed: Environment) -> str:
    """Output of training on CartPole-v1 with the default hyperparameters, logs in the folder "trained"."""
    return output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-n", "500", "-f", "trained")))


def test_train_uses_the_hyperparameters_of_the_package(installed: Environment, trained: str):
    assert f"Loading hyperparameters from: {installed.site_packages / 'sb3_vpg' / 'hyperparams' / 'vpg.yml'}" in trained
    assert saved_config(installed, "trained") == CARTPOLE_ENTRY
    assert (installed.cwd / "trained/vpg/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_schedules_in_a_hyperparameter_file_become_schedules(installed: Environment):
    entry = {"n_timesteps": 500, "policy": "MlpPolicy", "n_envs": 8, "n_steps": 32}
    rates = {"learning_rate": "lin_0.005", "critic_learning_rate": "lin_0.01"}
    (installed.cwd / "schedules.yml").write_text(yaml.safe_dump({"CartPole-v1": entry | rates}))
    output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-f", "schedules", "-conf", "schedules.yml")))
    script = """
import json, sys
from sb3_vpg import VPG
model = VPG.load(sys.argv[1])
schedules = (model.lr_schedule, model.critic_lr_schedule)
rates = [[schedule(progress_remaining) for progress_remaining in (1, 0.5, 0)] for schedule in schedules]
print(json.dumps([rates, model.num_timesteps, {group["role"]: group["lr"] for group in model.policy.optimizer.param_groups}]))
"""
    process = installed.run("-c", script, "schedules/vpg/CartPole-v1_1/CartPole-v1.zip")
    output_of(process)
    rates, num_timesteps, last_rates = json.loads(process.stdout)
    assert rates == [[0.005, 0.0025, 0.0], [0.01, 0.005, 0.0]]
    # 8 * 32 = 256 steps per update: the last update is the one after which the 500 steps asked for are over
    assert num_timesteps == 512
    assert last_rates["critic"] == 2 * last_rates["actor"]


def test_enjoy_plays_the_trained_agent(installed: Environment, trained: str):
    output = output_of(installed.run(*zoo_command("enjoy", "--algo", "vpg", "--no-render", "-f", "trained", "-n", "1000")))
    assert "Loading trained/vpg/CartPole-v1_1/CartPole-v1.zip" in output
    assert re.search(r"Mean reward: \d+", output)


@pytest.fixture(scope="module")
def trained_for_1000_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned for 1000 steps, in rollouts of 50."""
    file = tmp_path_factory.mktemp("trained") / "model.zip"
    policy_kwargs = {"net_arch": [16]}
    VPG("MlpPolicy", "CartPole-v1", n_steps=50, policy_kwargs=policy_kwargs, seed=1).learn(1000).save(file)
    return file


@pytest.mark.parametrize(("n", "steps_more"), [(1001, 50), (1050, 50), (1051, 100), (1500, 500), (2000, 1000)])
def test_n_is_the_budget_of_the_loaded_model_and_the_run_together(trained_for_1000_steps: Path, n: int, steps_more: int):
    check_budget(trained_for_1000_steps, n)
    model = ContinuedVPG.load(trained_for_1000_steps, env=gym.make("CartPole-v1")).learn(n)
    assert model.num_timesteps == 1000 + steps_more


@pytest.mark.parametrize("n", [1, 999, 1000])
def test_a_budget_that_is_used_up_is_refused(trained_for_1000_steps: Path, n: int):
    message = f"trained for 1000 steps. .* is {n}: no steps are left. To train it for {n} more steps, use -n {1000 + n}$"
    with pytest.raises(ValueError, match=message):
        check_budget(trained_for_1000_steps, n)


def test_where_the_budget_is_used_up_nothing_is_left_to_train(trained_for_1000_steps: Path):
    model = ContinuedVPG.load(trained_for_1000_steps, env=gym.make("CartPole-v1")).learn(900)
    assert (model.num_timesteps, model._n_updates) == (1000, 20)


def test_training_goes_on_until_the_budget_of_both_runs_is_used_up(installed: Environment, trained: str):
    agent = "trained/vpg/CartPole-v1_1/CartPole-v1.zip"
    command = zoo_command(*TRAIN_CARTPOLE, "-f", "continued", "-i", agent)
    process = installed.run(*command, "-n", "500")
    assert process.returncode == 1
    # More than the 500 that it was told to: a rollout of whole episodes ends with them
    done = int(re.search(f"ValueError: {agent} has been trained for (\\d+) steps", process.stderr)[1])
    assert done > 500
    assert not (installed.cwd / "continued").exists()

    output = output_of(installed.run(*command, "-n", str(done + 1)))
    assert f"Continuing after {done} of {done + 1} timesteps" in output
    assert (installed.cwd / "continued/vpg/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.slow
def test_a_checkpoint_at_the_end_of_the_run_is_what_a_restarted_job_saves(installed: Environment, trained: str):
    agent = "trained/vpg/CartPole-v1_1/CartPole-v1.zip"
    command = zoo_command(*TRAIN_CARTPOLE, "-n", "500", "-f", "restarted", "-i", agent)
    # torchrun's name for the number of times that it has started a job again
    output_of(installed.run(*command, env={"TORCHELASTIC_RESTART_COUNT": "1"}))
    same = """
import sys
from sb3_vpg import VPG
first, second = map(VPG.load, sys.argv[1:])
print(first.num_timesteps == second.num_timesteps, first._n_updates == second._n_updates)
"""
    assert output_of(installed.run("-c", same, agent, "restarted/vpg/CartPole-v1_1/CartPole-v1.zip")) == "True True\n"


COUNTERS_OF = """
import json, pickle, sys
from sb3_vpg import VPG
model = VPG.load(sys.argv[1])
with open(sys.argv[2], "rb") as file:
    statistics = pickle.load(file)
rates = {group["role"]: group["lr"] for group in model.policy.optimizer.param_groups}
print(json.dumps([model.num_timesteps, model._n_updates, statistics.obs_rms.count, rates]))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_is_saved_and_goes_on(installed: Environment, signal_number: signal.Signals):
    logs = f"interrupted_{signal_number.name}"
    folder = installed.cwd / logs / "vpg" / "Pendulum-v1_1"
    pendulum = ("train", "--algo", "vpg", "--env", "Pendulum-v1", "--eval-freq", "-1", "-f", logs)
    process = installed.start(*zoo_command(*pendulum, "-n", "1000000"))
    # A line for what it is, one for the columns, one for an episode
    monitor = folder / "0.monitor.csv"
    wait_until(lambda: monitor.is_file() and len(monitor.read_text().splitlines()) >= 3, process)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output

    def counters(run: int) -> tuple[int, int, float, dict[str, float]]:
        folder = installed.cwd / logs / "vpg" / f"Pendulum-v1_{run}"
        files = (folder / "Pendulum-v1.zip", folder / "Pendulum-v1" / "vecnormalize.pkl")
        done = installed.run("-c", COUNTERS_OF, *files)
        output_of(done)
        return tuple(json.loads(done.stdout))

    timesteps, n_updates, n_observations, rates = counters(1)
    assert timesteps >= 800
    # So that the run that goes on ends with an update at its very end, where the schedule is at 0
    total = timesteps + 640
    output_of(installed.run(*zoo_command(*pendulum, "-n", str(total), "-i", str(folder / "Pendulum-v1.zip"))))
    timesteps_then, n_updates_then, n_observations_then, rates_then = counters(2)
    assert timesteps_then == total
    # Four environments x 16 steps for each update
    assert n_updates_then == n_updates + 10
    assert n_observations_then > n_observations
    assert 0.0 == rates_then["actor"] < rates["actor"] == pytest.approx(0.002, rel=0.1)


@pytest.mark.parametrize("command", ["train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub"])
def test_every_command_offers_vpg(installed: Environment, command: str):
    (choices,) = set(re.findall(r"--algo \{(.*?)\}", output_of(installed.run(*zoo_command(command, "--help")))))
    assert {"vpg", "ppo", "a2c"} <= set(choices.split(","))


def test_the_console_command_knows_vpg(installed: Environment):
    # What the script rl_zoo3 calls
    script = "import sys; from rl_zoo3.cli import main; sys.argv[0] = 'rl_zoo3'; sys.exit(main())"
    output_of(installed.run("-c", script, *TRAIN_CARTPOLE, "-n", "300", "-f", "console"))
    assert saved_config(installed, "console") == CARTPOLE_ENTRY


def test_params_override_single_hyperparameters(installed: Environment):
    given = ("-params", "learning_rate:0.01", "n_steps:64", "estimator:'reward_to_go'", "baseline:'leave_one_out'")
    output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-n", "300", "-f", "params", *given)))
    expected = {"learning_rate": 0.01, "n_steps": 64, "estimator": "reward_to_go", "baseline": "leave_one_out"}
    assert saved_config(installed, "params") == {**CARTPOLE_ENTRY, **expected}


def test_conf_replaces_the_hyperparameters_of_the_package(installed: Environment):
    entry = {"n_timesteps": 300, "policy": "MlpPolicy", "n_steps": 16, "gae_lambda": 0.5, "critic_learning_rate": 0.002}
    (installed.cwd / "own.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    output = output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-f", "conf", "-conf", "own.yml", "-params", "n_steps:32")))
    assert "Loading hyperparameters from: own.yml" in output
    assert saved_config(installed, "conf") == {**entry, "n_steps": 32}


def test_other_algorithms_keep_the_hyperparameters_of_the_zoo(installed: Environment):
    output = output_of(installed.run(*zoo_command("train", "--algo", "ppo", "-n", "300", "-f", "ppo", "--eval-freq", "-1")))
    assert re.search(r"Loading hyperparameters from: \S*rl_zoo3/hyperparams/ppo.yml\n", output.replace("\\", "/"))
    assert (installed.cwd / "ppo/ppo/CartPole-v1_1/CartPole-v1.zip").is_file()


NATIVE = "Using NativeVecEnv"


@pytest.mark.parametrize(
    ("algo", "env_id", "arguments", "native"),
    [
        ("vpg", "CartPoleSwingUp-v1", (), True),
        ("vpg", "CartPole-v1", ("--vec-env", "dummy"), False),
        ("vpg", "CartPole-v1", ("--vec-env", "subproc"), False),
        ("vpg", "CartPoleSwingUp-v0", ("--vec-env", "dummy"), False),
        ("vpg", "Pendulum-v1", (), False),
        ("ppo", "CartPoleSwingUp-v0", (), True),
        ("a2c", "CartPoleSwingUp-v1", (), True),
        ("ppo", "CartPole-v1", (), False),
    ],
)
def test_environments_are_stepped_in_one_array_where_that_is_ours_to_say(
    installed: Environment, algo: str, env_id: str, arguments: tuple[str, ...], native: bool
):
    logs = "_".join(("native", algo, env_id, *arguments))
    command = zoo_command("train", "--algo", algo, "--env", env_id, "-n", "300", "-f", logs, "--eval-freq", "-1", *arguments)
    output = output_of(installed.run(*command))
    assert (NATIVE in output) == native
    own_file = f"sb3_vpg/hyperparams/{algo}.yml" in output.replace("\\", "/")
    assert own_file == (algo == "vpg" or "SwingUp" in env_id)
    assert (installed.cwd / logs / algo / f"{env_id}_1" / f"{env_id}.zip").is_file()


def test_training_in_one_array_writes_the_files_that_the_zoo_plots(installed: Environment, trained: str):
    assert NATIVE in trained
    monitors = sorted((installed.cwd / "trained/vpg/CartPole-v1_1").glob("*.monitor.csv"))
    assert len(monitors) == CARTPOLE_ENTRY["n_envs"]
    assert all(file.read_text().splitlines()[1] == "r,l,t" for file in monitors)


@pytest.mark.slow
def test_optimize_stores_trials_to_train_with(installed: Environment):
    study = ("--storage", "sqlite:///study.db", "--study-name", "vpg")
    search = ("-n", "300", "-f", "search", "-optimize", "--n-trials", "2", "--no-optim-plots")
    logs = ("--optimization-log-path", "trials")
    output = output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, *search, *logs, *study)))
    assert "Number of finished trials:  2" in output
    assert "Best trial:" in output

    trials = optuna.load_study(study_name="vpg", storage=f"sqlite:///{installed.cwd / 'study.db'}").trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2
    for number in range(2):
        # Once, after four steps of 64 environments; were the rollout of whole episodes completed, again after every four
        evaluations = np.load(installed.cwd / "trials" / f"trial_{number}" / "evaluations.npz")
        assert list(evaluations["timesteps"]) == [256]
    # The zoo takes trial 0 for none
    output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-n", "300", "-f", "found", *study, "--trial-id", "1")))
    config = saved_config(installed, "found")
    estimator, baseline = FORMULATIONS[trials[1].params["formulation"]]
    assert (config["estimator"], config["baseline"]) == (estimator, baseline)
    for name in ("learning_rate", "critic_learning_rate", "ent_coef", "normalize_advantage", "n_critic_updates"):
        assert config[name] == trials[1].params[name]
    # 64 environments: with more than one step of each, 300 steps would not be eight updates
    assert [(trial.user_attrs["n_timesteps"], trial.user_attrs["batch_size"]) for trial in trials] == [(300, 64)] * 2
    assert config["n_steps"] == 2 ** trials[1].params["n_steps_pow"] == 1


# ---------------------------------------------------------------------------------------------------------------
# The import hook
# ---------------------------------------------------------------------------------------------------------------


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
    process = installed.run(*zoo_command(*TRAIN_CARTPOLE, "-n", "300"), env=HOOK_OFF)
    assert process.returncode == 2
    assert "argument --algo: invalid choice: 'vpg'" in process.stderr


def test_two_hooks_at_once_do_no_harm(installed: Environment):
    # As with a copy from a checkout and one from a wheel
    script = """
import importlib, sb3_vpg_zoo_hook
importlib.reload(sb3_vpg_zoo_hook)
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
print(ALGOS["vpg"].__module__, hasattr(ExperimentManager.__init__.__wrapped__, "__wrapped__"))
"""
    assert output_of(installed.run("-c", script)).strip() == "sb3_vpg.vpg False"


def test_a_broken_package_leaves_the_zoo_working(installed: Environment):
    broken = installed.cwd / "broken" / "sb3_vpg"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    command = zoo_command("train", "--algo", "ppo", "-n", "300", "-f", "beside_broken", "--eval-freq", "-1")
    output = output_of(installed.run(*command, env={"PYTHONPATH": str(broken.parent)}))
    assert "UserWarning: sb3_vpg could not add VPG to rl_zoo3.utils: RuntimeError('broken on purpose')" in output
    assert (installed.cwd / "beside_broken/ppo/CartPole-v1_1/CartPole-v1.zip").is_file()


# ---------------------------------------------------------------------------------------------------------------
# python -m sb3_vpg
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [HOOK_OFF, {}], ids=["without the hook", "with the hook"])
def test_own_command_line_trains_vpg_by_default(installed: Environment, env: dict[str, str]):
    logs = f"own{len(env)}"
    output = output_of(installed.run("-m", "sb3_vpg", "train", "--env", "CartPole-v1", "-n", "300", "-f", logs, env=env))
    assert f"Loading hyperparameters from: {installed.site_packages / 'sb3_vpg' / 'hyperparams' / 'vpg.yml'}" in output
    assert saved_config(installed, logs) == CARTPOLE_ENTRY
    # The zoo puts a TimeLimit of its own in place of gymnasium's, here after the package has been imported
    assert "Using NativeVecEnv" in output
    assert "falls back" not in output
    output = output_of(installed.run("-m", "sb3_vpg", "enjoy", "--no-render", "-f", logs, "-n", "1000", env=env))
    assert re.search(r"Mean reward: \d+", output)


def test_own_command_line_takes_other_algorithms(installed: Environment):
    output_of(installed.run("-m", "sb3_vpg", "train", "--algo=a2c", "-n", "300", "-f", "own_a2c", env=HOOK_OFF))
    assert (installed.cwd / "own_a2c/a2c/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]], ids=" ".join)
def test_own_command_line_explains_itself(installed: Environment, arguments: list[str]):
    output = output_of(installed.run("-m", "sb3_vpg", *arguments))
    assert output.startswith("usage: python -m sb3_vpg COMMAND")
    for command in ("train", "enjoy", "record_video"):
        assert command in output


def test_own_command_line_refuses_an_unknown_command(installed: Environment):
    process = installed.run("-m", "sb3_vpg", "trian")
    assert process.returncode == 1
    assert process.stdout == ""
    assert "error: unknown command 'trian'" in process.stderr
    assert process.stderr.startswith("usage: ")


# ---------------------------------------------------------------------------------------------------------------
# Without the zoo
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_zoo(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The wheel installed where rl_zoo3, what comes with it and what the other extras add are missing."""
    # Not matplotlib and pandas, which Stable-Baselines3 itself needed before 2.9
    missing = ("rl_zoo3", "sb3_contrib", "optuna", "huggingface_sb3", "pygame", "seaborn", "scipy", "tensorboard")
    without = Environment(tmp_path_factory.mktemp("without_zoo"), wheel, without=missing)
    for module in missing:
        assert without.evaluate(f"importlib.util.find_spec({module!r})") == "None"
    return without


def test_vpg_learns_without_the_zoo(without_zoo: Environment):
    script = "from sb3_vpg import VPG; print(VPG('MlpPolicy', 'CartPole-v1', n_steps=64).learn(200).num_timesteps)"
    assert output_of(without_zoo.run("-W", "error", "-c", script)) == "256\n"


def test_own_command_line_says_how_to_install_the_zoo(without_zoo: Environment):
    process = without_zoo.run("-m", "sb3_vpg", "train")
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


# ---------------------------------------------------------------------------------------------------------------
# The search space
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def search_space() -> ModuleType:
    """
    The zoo's module of search spaces with VPG's added, under its name but not among the imported modules: importing rl_zoo3
    would put another TimeLimit into gymnasium, for all tests that follow.
    """
    folder = Path(importlib.util.find_spec("rl_zoo3").origin).parent
    spec = importlib.util.spec_from_file_location("rl_zoo3.hyperparams_opt", folder / "hyperparams_opt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    zoo.patch(module)
    return module


# The hyperparameter file may have set these; the zoo puts what Optuna draws on top
BASE_CONFIGS = [
    {},
    {"partial_episodes": "bootstrap"},
    {"partial_episodes": "finish"},
    {"partial_episodes": "truncate"},
    {"n_episodes": 1},
    {"n_episodes": 4, "estimator": "total_return", "baseline": "time", "normalize_advantage": "episode"},
    {"estimator": "reward_to_go", "loss_reduction": "trajectory", "discount_state_distribution": True},
]


@pytest.mark.parametrize("base", BASE_CONFIGS, ids=str)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_every_drawn_formulation_is_valid(search_space: ModuleType, formulation: str, base: dict[str, Any]):
    smallest = {
        "formulation": formulation,
        "n_steps_pow": 3,
        "one_minus_gamma": 0.1,
        "one_minus_gae_lambda": 0.2,
        "learning_rate": 0.001,
        "critic_learning_rate": 0.002,
        "n_critic_updates": 5,
        "ent_coef": 0.01,
        "max_grad_norm": 0.5,
        "net_arch": "tiny",
        "activation_fn": "tanh",
    }
    for normalize_advantage in (False, True):
        trial = optuna.trial.FixedTrial({**smallest, "normalize_advantage": normalize_advantage})
        params = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, 8, {})
        model = VPG("MlpPolicy", "CartPole-v1", **{**base, **params})
        assert (model.estimator, model.baseline) == FORMULATIONS[formulation]
        assert model.normalize_advantage is normalize_advantage
        assert (model.n_steps, model.gamma, model.gae_lambda) == (8, 0.9, 0.8)
        assert (model.n_critic_updates, model.ent_coef, model.max_grad_norm) == (5, 0.01, 0.5)
        assert (model.lr_schedule(1), model.critic_lr_schedule(1)) == (0.001, 0.002)


def test_every_valid_formulation_can_be_drawn_and_only_once():
    def is_valid(estimator: str, baseline: str | None) -> bool:
        try:
            VPG("MlpPolicy", gym.make("CartPole-v1"), estimator=estimator, baseline=baseline, n_steps=8)
        except ValueError:
            return False
        return True

    valid = {(estimator, baseline) for estimator in ESTIMATORS for baseline in BASELINES if is_valid(estimator, baseline)}
    # These contain the value function as they are: with baseline="value" they are the same again
    twice = {("td_residual", "value"), ("gae", "value")}
    assert twice < valid
    assert len(FORMULATIONS) == len(set(FORMULATIONS.values()))
    assert set(FORMULATIONS.values()) == valid - twice


def test_stored_trials_convert_to_what_was_drawn(search_space: ModuleType):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn_formulations = set()
    for _ in range(60):
        trial = study.ask()
        drawn = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, 1, {})
        assert search_space.HYPERPARAMS_CONVERTER["vpg"](trial.params) == drawn
        for name in ("gamma", "gae_lambda", "n_steps"):
            assert trial.user_attrs[name] == drawn[name]
        VPG("MlpPolicy", "CartPole-v1", **drawn)
        drawn_formulations.add((drawn["estimator"], drawn["baseline"]))
    assert drawn_formulations == set(FORMULATIONS.values())


def draw_n_steps(search_space: ModuleType, n_envs: int, n_timesteps: int | None) -> set[int]:
    """:return: what 100 trials with this budget draw"""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(100):
        trial = study.ask()
        if n_timesteps is not None:
            trial.set_user_attr("n_timesteps", n_timesteps)
        n_steps = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, n_envs, {})["n_steps"]
        assert trial.user_attrs["batch_size"] == n_envs * n_steps
        drawn.add(n_steps)
    return drawn


@pytest.mark.parametrize(
    ("n_envs", "n_timesteps", "smallest", "largest"),
    [
        # The default entry, with a budget of several sizes, and without one
        (8, 1_000_000, 4, 2048),
        (8, 50_000, 4, 512),
        (8, 1024, 4, 8),
        (8, 300, 4, 4),
        (8, 100, 1, 1),
        (8, 7, 1, 1),
        (8, None, 4, 2048),
        # One step of CartPole's 64 environments is a batch of more than 32 steps
        (64, 50_000, 1, 64),
        (64, 100, 1, 1),
        (1, 1_000_000, 32, 16384),
        (1, 300, 32, 32),
        (1, 100, 8, 8),
        # 4 * 10 is the first of at least 32, 1024 * 10 the last of at most 16384
        (10, None, 4, 1024),
    ],
)
def test_what_a_search_draws_is_the_batch_in_all_bounded_by_the_budget(
    search_space: ModuleType, n_envs: int, n_timesteps: int | None, smallest: int, largest: int
):
    powers_of_two = {2**power for power in range(smallest.bit_length() - 1, largest.bit_length())}
    assert draw_n_steps(search_space, n_envs, n_timesteps) == powers_of_two


@pytest.mark.parametrize("n_timesteps", [1000, 1024, 1100])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_the_longest_rollout_that_is_drawn_leaves_a_trial_eight_updates(
    search_space: ModuleType, n_envs: int, n_timesteps: int
):
    n_steps = max(draw_n_steps(search_space, n_envs, n_timesteps))
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    model = VPG("MlpPolicy", env, n_steps=n_steps, policy_kwargs={"net_arch": [16]}, seed=1)
    model.learn(n_timesteps, callback=StopAtBudget())
    assert model._n_updates >= 8


def test_a_stored_trial_keeps_its_n_steps_whatever_the_environments_and_the_budget(search_space: ModuleType):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for n_envs, n_timesteps in [(1, 300), (64, 50_000), (8, 10**6)]:
        trial = study.ask()
        trial.set_user_attr("n_timesteps", n_timesteps)
        drawn = search_space.HYPERPARAMS_SAMPLER["vpg"](trial, 2, n_envs, {})
        assert search_space.HYPERPARAMS_CONVERTER["vpg"](trial.params) == drawn


@pytest.mark.parametrize("n_timesteps", [96, 100])
def test_a_trial_stops_at_its_budget_within_a_rollout_of_whole_episodes(n_timesteps: int):
    env = make_vec_env("CartPole-v1", n_envs=8)
    model = VPG("MlpPolicy", env, n_steps=1, estimator="total_return", policy_kwargs={"net_arch": [16]}, seed=1)
    model.learn(n_timesteps, callback=StopAtBudget())
    # Eight environments step at a time
    assert model.num_timesteps == -(-n_timesteps // 8) * 8
