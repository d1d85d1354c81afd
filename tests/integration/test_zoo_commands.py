"""
RL Baselines3 Zoo must know VPG after ``pip install``. Its commands run as users run them: from a folder that is not the
checkout, with the package imported from an installed wheel.
"""

import json
import re
import signal

import numpy as np
import optuna
import pytest
import yaml
from helpers.installed import HOOK_OFF, Environment, output_of, wait_until
from helpers.zoo import CARTPOLE_ENTRY, TRAIN_CARTPOLE, saved_config, zoo_command

from sb3_vpg.zoo.search_space import ESTIMATORS_WITH_BASELINES


@pytest.fixture(scope="module")
def trained(installed: Environment) -> str:
    """Output of training on CartPole-v1 with the default hyperparameters, logs in the folder "trained", by a new Python."""
    return output_of(installed.run(*zoo_command(*TRAIN_CARTPOLE, "-n", "500", "-f", "trained")))


def test_train_uses_the_hyperparameters_of_the_package(installed: Environment, trained: str):
    assert f"Loading hyperparameters from: {installed.site_packages / 'sb3_vpg' / 'hyperparams' / 'vpg.yml'}" in trained
    assert saved_config(installed, "trained") == CARTPOLE_ENTRY
    assert (installed.cwd / "trained/vpg/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_schedules_in_a_hyperparameter_file_become_schedules(installed: Environment):
    entry = {"n_timesteps": 500, "policy": "MlpPolicy", "n_envs": 8, "n_steps": 32}
    rates = {"learning_rate": "lin_0.005", "critic_learning_rate": "lin_0.01", "ent_coef": "lin_0.02"}
    (installed.cwd / "schedules.yml").write_text(yaml.safe_dump({"CartPole-v1": entry | rates}))
    output_of(installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, "-f", "schedules", "-conf", "schedules.yml")))
    script = """
import json, sys
from sb3_vpg import VPG
model = VPG.load(sys.argv[1])
schedules = (model.lr_schedule, model.critic_lr_schedule, model.ent_coef)
rates = [[schedule(progress_remaining) for progress_remaining in (1, 0.5, 0)] for schedule in schedules]
print(json.dumps([rates, model.num_timesteps, {group["role"]: group["lr"] for group in model.policy.optimizer.param_groups}]))
"""
    process = installed.run_warm("-c", script, "schedules/vpg/CartPole-v1_1/CartPole-v1.zip")
    output_of(process)
    rates, num_timesteps, last_rates = json.loads(process.stdout)
    assert rates == [[0.005, 0.0025, 0.0], [0.01, 0.005, 0.0], [0.02, 0.01, 0.0]]
    # 8 * 32 = 256 steps per update: the last update is the one after which the 500 steps asked for are over
    assert num_timesteps == 512
    assert last_rates["critic"] == 2 * last_rates["actor"]


def test_enjoy_plays_the_trained_agent(installed: Environment, trained: str):
    output = output_of(
        installed.run_warm(*zoo_command("enjoy", "--algo", "vpg", "--no-render", "-f", "trained", "-n", "1000"))
    )
    assert "Loading trained/vpg/CartPole-v1_1/CartPole-v1.zip" in output
    assert re.search(r"Mean reward: \d+", output)


def test_training_goes_on_until_the_budget_of_both_runs_is_used_up(installed: Environment, trained: str):
    agent = "trained/vpg/CartPole-v1_1/CartPole-v1.zip"
    command = zoo_command(*TRAIN_CARTPOLE, "-f", "continued", "-i", agent)
    process = installed.run_warm(*command, "-n", "500")
    assert process.returncode == 1
    # More than the 500 that it was told to: a rollout of whole episodes ends with them
    done = int(re.search(f"ValueError: {agent} has been trained for (\\d+) steps", process.stderr)[1])
    assert done > 500
    assert not (installed.cwd / "continued").exists()

    output = output_of(installed.run_warm(*command, "-n", str(done + 1)))
    assert f"Continuing after {done} of {done + 1} timesteps" in output
    assert (installed.cwd / "continued/vpg/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_a_seed_precedes_the_random_states_of_the_run_that_goes_on(installed: Environment, trained: str):
    train = ("train", "--algo", "vpg", "--env", "CartPole-v1", "--eval-freq", "-1", "-n", "30000", "-f", "seeds")
    for run, seed in enumerate(((), (), ("--seed=7",)), start=1):
        agent = "trained/vpg/CartPole-v1_1/CartPole-v1.zip"
        output_of(installed.run_warm(*zoo_command(*train, "-i", agent, *seed)))
        assert (installed.cwd / f"seeds/vpg/CartPole-v1_{run}/CartPole-v1.zip").is_file()
    compare = """
from sb3_vpg import VPG
weights = [VPG.load(f"seeds/vpg/CartPole-v1_{run}/CartPole-v1.zip").policy.action_net.weight for run in (1, 2, 3)]
print((weights[0] == weights[1]).all().item(), (weights[0] == weights[2]).all().item())
"""
    assert output_of(installed.run_warm("-c", compare)) == "True False\n"


def test_a_checkpoint_at_the_end_of_the_run_is_what_a_restarted_job_saves(installed: Environment, trained: str):
    agent = "trained/vpg/CartPole-v1_1/CartPole-v1.zip"
    command = zoo_command(*TRAIN_CARTPOLE, "-n", "500", "-f", "restarted", "-i", agent)
    # torchrun's name for the number of times that it has started a job again
    output_of(installed.run_warm(*command, env={"TORCHELASTIC_RESTART_COUNT": "1"}))
    same = """
import sys
from sb3_vpg import VPG
first, second = map(VPG.load, sys.argv[1:])
print(first.num_timesteps == second.num_timesteps, first._n_updates == second._n_updates)
"""
    assert output_of(installed.run_warm("-c", same, agent, "restarted/vpg/CartPole-v1_1/CartPole-v1.zip")) == "True True\n"


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
        done = installed.run_warm("-c", COUNTERS_OF, *files)
        output_of(done)
        return tuple(json.loads(done.stdout))

    timesteps, n_updates, n_observations, rates = counters(1)
    # The episode is written within the 200th step of sixteen environments, which counts only when it has ended
    assert timesteps >= 199 * 16
    # So that the run that goes on ends with an update at its very end, where the schedule is at 0
    total = timesteps + 2560
    output_of(installed.run_warm(*zoo_command(*pendulum, "-n", str(total), "-i", str(folder / "Pendulum-v1.zip"))))
    timesteps_then, n_updates_then, n_observations_then, rates_then = counters(2)
    assert timesteps_then == total
    # Sixteen environments x 16 steps for each update
    assert n_updates_then == n_updates + 10
    assert n_observations_then > n_observations
    assert 0.0 == rates_then["actor"] < rates["actor"] == pytest.approx(0.003, rel=0.1)


@pytest.mark.parametrize("command", ["train", "enjoy", "record_video", "record_training", "push_to_hub", "load_from_hub"])
def test_every_command_offers_vpg(installed: Environment, command: str):
    (choices,) = set(re.findall(r"--algo \{(.*?)\}", output_of(installed.run_warm(*zoo_command(command, "--help")))))
    assert {"vpg", "ppo", "a2c"} <= set(choices.split(","))


def test_the_console_command_knows_vpg(installed: Environment):
    # What the script rl_zoo3 calls
    script = "import sys; from rl_zoo3.cli import main; sys.argv[0] = 'rl_zoo3'; sys.exit(main())"
    output_of(installed.run_warm("-c", script, *TRAIN_CARTPOLE, "-n", "300", "-f", "console"))
    assert saved_config(installed, "console") == CARTPOLE_ENTRY


def test_params_override_single_hyperparameters(installed: Environment):
    given = ("-params", "learning_rate:0.01", "n_steps:64", "estimator:'reward_to_go'", "baseline:'leave_one_out'")
    output_of(installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, "-n", "300", "-f", "params", *given)))
    expected = {"learning_rate": 0.01, "n_steps": 64, "estimator": "reward_to_go", "baseline": "leave_one_out"}
    assert saved_config(installed, "params") == {**CARTPOLE_ENTRY, **expected}


def test_conf_replaces_the_hyperparameters_of_the_package(installed: Environment):
    entry = {"n_timesteps": 300, "policy": "MlpPolicy", "n_steps": 16, "gae_lambda": 0.5, "critic_learning_rate": 0.002}
    (installed.cwd / "own.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    output = output_of(
        installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, "-f", "conf", "-conf", "own.yml", "-params", "n_steps:32"))
    )
    assert "Loading hyperparameters from: own.yml" in output
    assert saved_config(installed, "conf") == {**entry, "n_steps": 32}


def test_other_algorithms_keep_the_hyperparameters_of_the_zoo(installed: Environment):
    output = output_of(
        installed.run_warm(*zoo_command("train", "--algo", "ppo", "-n", "300", "-f", "ppo", "--eval-freq", "-1"))
    )
    assert re.search(r"Loading hyperparameters from: \S*rl_zoo3/hyperparams/ppo.yml\n", output.replace("\\", "/"))
    assert (installed.cwd / "ppo/ppo/CartPole-v1_1/CartPole-v1.zip").is_file()


def test_the_zoo_trains_shows_and_continues_recurrent_models(installed: Environment):
    arguments = ("--algo", "vpg_lstm", "--env", "CartPoleNoVel-v1", "-f", "lstm")
    train = (*arguments, "--eval-freq", "256", "--eval-episodes", "1", "-params", "n_envs:2", "n_steps:32")
    output = output_of(installed.run_warm(*zoo_command("train", *train, "-n", "300")))
    assert "sb3_vpg/hyperparams/vpg_lstm.yml" in output.replace("\\", "/")
    assert "Eval num_timesteps=256" in output
    output = output_of(installed.run_warm(*zoo_command("enjoy", *arguments, "--no-render", "-n", "200")))
    assert re.search(r"Mean reward: \d+", output)
    agent = "lstm/vpg_lstm/CartPoleNoVel-v1_1/CartPoleNoVel-v1.zip"
    output = output_of(installed.run_warm(*zoo_command("train", *train, "-n", "500", "-i", agent)))
    assert "Continuing after 320 of 500 timesteps" in output


# Imported through --gym-packages
BROKEN = """
import gymnasium as gym
import numpy as np

class Broken(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)
    n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        self.n_steps += 1
        return np.zeros(2, dtype=np.float32), float("nan" if self.n_steps > 70 else 1), True, False, {}

gym.register("Broken-v0", Broken)
"""


def test_a_run_that_fails_is_saved(installed: Environment):
    (installed.cwd / "broken.py").write_text(BROKEN)
    arguments = ("--algo", "vpg", "--env", "Broken-v0", "--gym-packages", "broken", "-f", "broken", "-n", "1000")
    process = installed.run_warm(*zoo_command("train", *arguments, "-params", "n_envs:1", "n_steps:32", "n_episodes:None"))
    assert process.returncode == 1
    assert "Non-finite reward in environment 0 at step 6 of the rollout (which ended at timestep 96)" in process.stderr
    script = "import sys; from sb3_vpg import VPG; print(VPG.load(sys.argv[1])._n_updates)"
    assert output_of(installed.run_warm("-c", script, "broken/vpg/Broken-v0_1/Broken-v0.zip")) == "2\n"


# The processes of SubprocVecEnv may have ended when the zoo closes it, as after Ctrl-C in a terminal
CLOSED = """
# The zoo itself first, which registers VPG
import rl_zoo3.exp_manager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from sb3_vpg import VPG
from sb3_vpg.zoo.manager import VPGExperimentManager

class Closed(DummyVecEnv):
    def close(self):
        raise self.error_of_close

class Failing(BaseCallback):
    def _on_step(self):
        raise self.error

for error, error_of_close in (
    (KeyboardInterrupt(), BrokenPipeError()), (KeyboardInterrupt(), KeyboardInterrupt()), (RuntimeError(), BrokenPipeError())
):
    Closed.error_of_close = error_of_close
    manager = VPGExperimentManager(None, "vpg", "CartPole-v1", ".", n_timesteps=64)
    manager.n_timesteps, manager.callbacks = 64, [Failing()]
    manager.callbacks[0].error = error
    model = VPG("MlpPolicy", make_vec_env("CartPole-v1", vec_env_cls=Closed))
    try:
        manager.learn(model)
        print("saved")
    except BrokenPipeError as error:
        print(type(error.__context__).__name__)
"""


def test_processes_that_have_ended_with_the_run_cost_nothing(installed: Environment):
    assert output_of(installed.run_warm("-c", CLOSED)) == "saved\nsaved\nRuntimeError\n"


# Imported through --gym-packages. An action that is not allowed ends the command with an error
MASKED = """
import gymnasium as gym
import numpy as np

class Countdown(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(50)

    def action_masks(self):
        return np.arange(50) == self.allowed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.allowed = 20
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        assert action == self.allowed, "not allowed"
        self.allowed -= 1
        return np.zeros(2, dtype=np.float32), 1.0, self.allowed == 0, False, {}

gym.register("Countdown-v0", Countdown)
"""


def test_masks_reach_every_command_of_the_zoo(installed: Environment):
    (installed.cwd / "countdown.py").write_text(MASKED)
    arguments = ("--algo", "vpg_mask", "--env", "Countdown-v0", "--gym-packages", "countdown", "-f", "masked")
    train = (*arguments, "--eval-freq", "256", "--eval-episodes", "2", "-params", "normalize:True")
    output = output_of(installed.run_warm("-m", "sb3_vpg", "train", *train, "-n", "300"))
    assert "sb3_vpg/hyperparams/vpg_mask.yml" in output.replace("\\", "/")
    assert "Eval num_timesteps=256, episode_reward=20.00" in output
    for way in (zoo_command("enjoy"), ("-m", "sb3_vpg", "enjoy")):
        environment = HOOK_OFF if "sb3_vpg" in way else {}
        output = output_of(installed.run_warm(*way, *arguments, "--no-render", "-n", "100", env=environment))
        assert "Mean reward: 20.00" in output
    agent = "masked/vpg_mask/Countdown-v0_1/Countdown-v0.zip"
    output = output_of(installed.run_warm(*zoo_command("train", *train, "-n", "800", "-i", agent)))
    assert "Continuing after 512 of 800 timesteps" in output


@pytest.mark.parametrize(
    ("algo", "env_id", "arguments"),
    [("vpg_mask", "Countdown-v0", ("--gym-packages", "countdown")), ("vpg_lstm", "CartPoleNoVel-v1", ())],
)
def test_optimize_searches_masked_and_recurrent_models(
    installed: Environment, algo: str, env_id: str, arguments: tuple[str, ...]
):
    (installed.cwd / "countdown.py").write_text(MASKED)
    search = ("-n", "300", "-f", "search", "-optimize", "--n-trials", "2", "--no-optim-plots", "--eval-episodes", "1")
    study = ("--storage", f"sqlite:///{algo}.db", "--study-name", algo, *arguments)
    output_of(installed.run_warm(*zoo_command("train", "--algo", algo, "--env", env_id, *search, *study)))
    trials = optuna.load_study(study_name=algo, storage=f"sqlite:///{installed.cwd / algo}.db").trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2
    assert ("lstm_hidden_size" in trials[0].params) == (algo == "vpg_lstm")


NATIVE = "Using NativeVecEnv"


@pytest.mark.parametrize(
    ("algo", "env_id", "arguments", "native"),
    [
        ("vpg", "CartPoleSwingUp-v1", (), True),
        ("vpg", "CartPole-v1", ("--vec-env", "dummy"), False),
        # A process for each environment
        ("vpg", "CartPole-v1", ("--vec-env", "subproc", "-params", "n_envs:2"), False),
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
    output = output_of(installed.run_warm(*command))
    assert (NATIVE in output) == native
    own_file = f"sb3_vpg/hyperparams/{algo}.yml" in output.replace("\\", "/")
    assert own_file == (algo == "vpg" or "SwingUp" in env_id)
    assert (installed.cwd / logs / algo / f"{env_id}_1" / f"{env_id}.zip").is_file()


def test_training_in_one_array_writes_the_files_that_the_zoo_plots(installed: Environment, trained: str):
    assert NATIVE in trained
    monitors = sorted((installed.cwd / "trained/vpg/CartPole-v1_1").glob("*.monitor.csv"))
    assert len(monitors) == CARTPOLE_ENTRY["n_envs"]
    assert all(file.read_text().splitlines()[1] == "r,l,t" for file in monitors)


def test_optimize_stores_trials_to_train_with(installed: Environment):
    study = ("--storage", "sqlite:///study.db", "--study-name", "vpg")
    search = ("-n", "300", "-f", "search", "-optimize", "--n-trials", "2", "--no-optim-plots")
    logs = ("--optimization-log-path", "trials")
    output = output_of(installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, *search, *logs, *study)))
    assert "Number of finished trials:  2" in output
    assert "Best trial:" in output

    trials = optuna.load_study(study_name="vpg", storage=f"sqlite:///{installed.cwd / 'study.db'}").trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.COMPLETE] * 2
    for number in range(2):
        # Once, after four steps of 64 environments; were the rollout of whole episodes completed, again after every four
        evaluations = np.load(installed.cwd / "trials" / f"trial_{number}" / "evaluations.npz")
        assert list(evaluations["timesteps"]) == [256]
    # The zoo takes trial 0 for none
    output_of(installed.run_warm(*zoo_command(*TRAIN_CARTPOLE, "-n", "300", "-f", "found", *study, "--trial-id", "1")))
    config = saved_config(installed, "found")
    estimator, baseline = ESTIMATORS_WITH_BASELINES[trials[1].params["formulation"]]
    assert (config["estimator"], config["baseline"]) == (estimator, baseline)
    for name in ("learning_rate", "critic_learning_rate", "ent_coef", "normalize_advantage", "n_critic_updates"):
        assert config[name] == trials[1].params[name]
    # 64 environments: with more than one step of each, 300 steps would not be eight updates
    assert [(trial.user_attrs["n_timesteps"], trial.user_attrs["batch_size"]) for trial in trials] == [(300, 64)] * 2
    assert config["n_steps"] == 2 ** trials[1].params["n_steps_pow"] == 1
