"""``python -m sb3_vpg compare``: what it runs and writes, that it resumes after a kill, and what it says to bad input."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from helpers.installed import Environment, output_of, wait_until
from helpers.studies import SETTINGS, written

from sb3_vpg.study.results import COLUMNS
from sb3_vpg.study.study import FIRST_SEARCH_SEED, Run

COMPARE = ("-m", "sb3_vpg", "compare")
#: In place of the package of Weights & Biases
WANDB = """
from contextlib import contextmanager

@contextmanager
def init(name, project, group, config, sync_tensorboard, dir):
    print("wandb init", group, sync_tensorboard, config["setting"])
    yield
    print("wandb finish")
"""
#: An estimator of one's own
MINE = """
from sb3_vpg.estimators import ESTIMATORS

ESTIMATORS["mine"] = ESTIMATORS["td_residual"]
"""
#: Rewards that are a keyword, episodes of ten steps or without end, a crash; and a bound for evaluations that a test can reach
TASKS = """
import os
import gymnasium as gym
import numpy as np
from sb3_vpg.study import training

training.MAX_EPISODE_STEPS = 50

class Reward(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, reward=1.0):
        self.reward = reward

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), self.reward, False, False, {}

class Crash(Reward):
    def __init__(self):
        os._exit(7)

gym.register("Crash-v0", Crash)
gym.register("Reward-v0", Reward, max_episode_steps=10)
gym.register("Endless-v0", Reward)
"""
#: Columns that differ from run to run
TIMES = ["wall_seconds", "processor_seconds", "seconds"]


def command(config: Path, folder: Path, *more: str) -> list[str]:
    return [*COMPARE, "--config", str(config), "--folder", str(folder), "--processes", "2", *more]


@pytest.fixture(scope="module")
def finished(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study that has run, with the settings beside it, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    output = output_of(installed.run_warm(*command(written(SETTINGS, folder), folder / "out")))
    (folder / "output.txt").write_text(output)
    return folder


def rows(folder: Path, name: str) -> pd.DataFrame:
    """The rows of a file, without times, sorted."""
    frame = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
    frame = frame.drop(columns=TIMES, errors="ignore")
    return frame.sort_values(list(frame.columns), ignore_index=True)


def runs_in(folder: Path, phase: str) -> set[Run]:
    frame = pd.read_csv(folder / "runs.csv", keep_default_na=False)
    frame = frame[frame.phase == phase][list(Run._fields)]
    return {Run(*row[:-1], float(row[-1]) if row[-1] != "" else None) for row in frame.itertuples(index=False)}


def left_behind(marker: str) -> list[int]:
    """:return: the processes that have a variable SB3_VPG_STUDY with this value"""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"SB3_VPG_STUDY={marker}".encode() in variables.split(b"\0"):
            found.append(int(process.name))
    return found


def wait_for_none(marker: str) -> None:
    deadline = time.monotonic() + 30
    while left_behind(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_behind(marker) == []


def test_search_then_final_runs_then_statistics(finished: Path):
    out = finished / "out"
    for name, columns in COLUMNS.items():
        assert tuple(pd.read_csv(out / f"{name}.csv").columns) == columns
    assert runs_in(out, "search") == {
        Run("search", env_id, "vpg", setting, FIRST_SEARCH_SEED, rate)
        for env_id in SETTINGS["environments"]
        for setting in SETTINGS["settings"]
        for rate in (0.001, 0.01)
    }
    runs = pd.read_csv(out / "runs.csv", keep_default_na=False)
    search = runs[(runs.phase == "search") & (runs.setting == "gae") & (runs.environment == "CartPole-v1")]
    scores = search.assign(score=search.deterministic_return.astype(float)).set_index("learning_rate").score
    of_gae = {run.learning_rate for run in runs_in(out, "final") if run.cell == ("CartPole-v1", "vpg", "gae")}
    assert of_gae == {float(scores.idxmax())}
    assert {run.seed for run in runs_in(out, "final") if run.cell == ("Acrobot-v1", "a2c", "")} == {0, 1}
    points = rows(out, "points")
    statistics = points[(points.phase == "statistics") & (points.metric == "pairwise_cosine")]
    # Formulations of whole episodes, at three moments, at the policies of one run
    assert set(statistics.setting) == {"gae"}
    assert statistics[statistics.environment == "CartPole-v1"].groupby("measured").size().eq(3).all()
    assert set(statistics.measured) == {"reward_to_go", "gae", "diverges"}


def test_a_failing_run_is_a_row_with_its_error_and_not_the_end(finished: Path):
    runs = rows(finished / "out", "runs")
    failed = runs[runs.error != ""]
    assert set(failed.setting) == {"diverges"}
    assert len(failed) == (runs.setting == "diverges").sum() == 8
    assert failed.error.str.contains("NonFiniteError|finite").all()
    assert "Traceback" in (finished / "out" / "output.log").read_text()
    assert "FAILED: " in (finished / "output.txt").read_text()


def test_cost_lines_and_report_are_printed(finished: Path):
    output = (finished / "output.txt").read_text()
    n_runs = len(pd.read_csv(finished / "out" / "runs.csv"))
    assert re.search(rf"^{n_runs} runs in 2 processes: about \d\d:\d\d of training \(measured now", output, re.MULTILINE)
    assert re.search(r"CartPole-v1 +a2c, seed 0: \d+\.\d, 6\d\d steps, \d+\.\d s", output)
    assert f"Report: {finished / 'out' / 'report.html'}" in output
    for name in ("report.html", "report.md", "aggregate.png"):
        assert (finished / "out" / name).stat().st_size > 0
    assert not (finished / "out" / ".running").exists()


def test_killed_at_ten_random_moments_it_has_the_same_rows(installed: Environment, finished: Path, tmp_path: Path):
    config, folder, rng = finished / "settings.yml", tmp_path / "out", random.Random(0)
    for kill in range(10):
        marker = f"{tmp_path.name}-{kill}"
        process = installed.start(*command(config, folder), env={"SB3_VPG_STUDY": marker})
        n_lines = len((folder / "output.log").read_text().splitlines()) if kill else 0
        started = folder / "output.log"
        # From the start of the first run on
        wait_until(lambda: started.exists() and len(started.read_text().splitlines()) > n_lines, process)  # noqa: B023
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        wait_for_none(marker)
    output_of(installed.run_warm(*command(config, folder)))
    for name in COLUMNS:
        pd.testing.assert_frame_equal(rows(folder, name), rows(finished / "out", name))


def test_ctrl_c_keeps_what_has_ended_and_leaves_no_process(installed: Environment, tmp_path: Path):
    config, folder = written(SETTINGS, tmp_path), tmp_path / "out"
    process = installed.start(*command(config, folder), env={"SB3_VPG_STUDY": tmp_path.name})
    wait_until(lambda: (folder / "runs.csv").exists() and len((folder / "runs.csv").read_text().splitlines()) > 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Runs that have ended are kept" in output
    assert "Traceback" not in output
    wait_for_none(tmp_path.name)
    assert len(pd.read_csv(folder / "runs.csv")) >= 2
    assert not (folder / "report.md").exists()
    # The report of what there is, of the folder's own study
    output_of(installed.run_warm(*COMPARE, "--report", "-f", str(folder)))
    assert "The study is not complete" in (folder / "report.md").read_text()
    # Runs of the search tell the speed
    of_search = output_of(installed.run_warm(*command(config, folder, "--algo", "vpg", "--env", "CartPole-v1", "--dry-run")))
    assert "(speeds of the runs in the folder)" in of_search


def test_nothing_is_run_again_but_what_has_failed_if_asked_for(installed: Environment, finished: Path, tmp_path: Path):
    folder = shutil.copytree(finished / "out", tmp_path / "out")
    before = (folder / "runs.csv").read_text()
    output = output_of(installed.run_warm(*command(finished / "settings.yml", folder)))
    assert "seed" not in output
    assert (folder / "runs.csv").read_text() == before
    more = ("--retry-failed", "--env", "CartPole-v1", "--setting", "diverges")
    files = {path: path.read_bytes() for path in folder.glob("*.*")}
    output = output_of(installed.run_warm(*command(finished / "settings.yml", folder), *more, "--dry-run"))
    assert "4 runs in 2 processes" in output
    assert files == {path: path.read_bytes() for path in folder.glob("*.*")}
    output = output_of(installed.run_warm(*command(finished / "settings.yml", folder, *more)))
    assert re.search(
        r"^4 runs in 2 processes: about \d\d:\d\d of training \(speeds of the runs in the folder\)", output, re.MULTILINE
    )
    assert output.count("FAILED") == 4
    assert "8 runs in the folder have failed: output.log has their errors, --retry-failed repeats them" in output


def test_arguments_are_a_study_too_and_its_folder_is_its_own(installed: Environment, tmp_path: Path):
    folder, packages = tmp_path / "out", tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(WANDB)
    arguments = ["--vary", "gae_lambda=0.9,1", "--seeds", "1", "--steps", "300", "--vec-env", "native", "-f", str(folder)]
    output_of(installed.run_warm(*COMPARE, *arguments, "--track", env={"PYTHONPATH": str(packages)}))
    assert {run.setting for run in runs_in(folder, "final")} == {"gae_lambda=0.9", "gae_lambda=1"}
    kept = yaml.safe_load((folder / "study.yml").read_text())
    assert kept["study"]["algorithms"] == ["vpg"]
    # The entry, with the value of the setting
    hyperparameters = kept["hyperparameters"]["CartPole-v1, vpg, gae_lambda=0.9"]
    assert {"n_envs": 64, "gae_lambda": 0.9, "n_timesteps": 300}.items() <= hyperparameters.items()
    assert hyperparameters["vec_env_class"] == "sb3_vpg.envs.NativeVecEnv"
    assert len(list((folder / "tensorboard").glob("final__CartPole-v1__vpg__*__0/**/events*"))) == 2
    tracked = [line.split() for line in (folder / "output.log").read_text().splitlines() if line.startswith("wandb")]
    assert sorted(tracked) == sorted(
        words
        for value in ("0.9", "1")
        for words in (["wandb", "init", "out", "True", f"gae_lambda={value}"], ["wandb", "finish"])
    )
    # More seeds belong to the same study, other settings do not
    dry = installed.run_warm(*COMPARE, *arguments, "--seeds", "2", "--dry-run")
    assert re.search(r"^2 runs in", output_of(dry), re.MULTILINE)
    other = installed.run_warm(*COMPARE, *arguments, "--steps", "400")
    assert other.returncode == 1
    assert f"error: {folder} has another study (steps is 300 there, 400 here): choose another --folder" in other.stderr


def test_entries_may_be_those_of_a_file_and_their_callbacks_may_end_the_training(installed: Environment, tmp_path: Path):
    stop = {"stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes": {"max_episodes": 9}}
    entry = {"policy": "MlpPolicy", "n_timesteps": 10_000, "n_episodes": 1, "callback": [stop]}
    file, folder = tmp_path / "mine.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"CartPole-v1": entry}))
    arguments = ["--entries", str(file), "--seeds", "1", "-f", str(folder)]
    output_of(installed.run_warm(*COMPARE, *arguments, "--vary", "gamma=0.9"))
    (run,) = pd.read_csv(folder / "runs.csv").itertuples()
    assert run.timesteps < 1000
    points = pd.read_csv(folder / "points.csv")
    assert run.training_return == pytest.approx(points.value[points.timesteps > 0.9 * run.timesteps].mean())
    hyperparameters = yaml.safe_load((folder / "study.yml").read_text())["hyperparameters"]["CartPole-v1, vpg, gamma=0.9"]
    assert hyperparameters == {**entry, "gamma": 0.9}
    without = installed.run_warm(*COMPARE, *arguments, "--env", "Acrobot-v1")
    assert without.returncode == 1
    assert f"error: Acrobot-v1 vpg: Hyperparameters not found for vpg-Acrobot-v1 in {file}" in without.stderr
    unused = installed.run_warm(*COMPARE, *arguments, "--algo", "a2c")
    assert "error: entries: settings and keywords are those of VPG" in unused.stderr


def test_entries_may_be_those_of_a_file_for_each_algorithm(installed: Environment, tmp_path: Path):
    entry = {"policy": "MlpPolicy", "n_timesteps": 200, "n_steps": 3}
    for name in ("vpg", "a2c"):
        (tmp_path / f"{name}.yml").write_text(
            yaml.safe_dump({"CartPole-v1": entry | {"gamma": 0.9 if name == "vpg" else 0.8}})
        )
    files = [f"{name}={tmp_path / name}.yml" for name in ("vpg", "a2c")]
    arguments = ("--seeds", "1", "-f", str(tmp_path / "out"))
    output_of(installed.run_warm(*COMPARE, *arguments, "--algo", "vpg", "a2c", "ppo", "--entries", *files, "--steps", "150"))
    hyperparameters = yaml.safe_load((tmp_path / "out" / "study.yml").read_text())["hyperparameters"]
    assert hyperparameters["CartPole-v1, vpg"] == {**entry, "gamma": 0.9, "n_timesteps": 150}
    assert hyperparameters["CartPole-v1, a2c"] == {**entry, "gamma": 0.8, "n_timesteps": 150}
    assert hyperparameters["CartPole-v1, ppo"]["n_steps"] == 32


def test_evaluations_are_of_the_task_that_was_trained_and_end(installed: Environment, tmp_path: Path):
    (tmp_path / "my_tasks.py").write_text(TASKS)
    study = {
        "gym_packages": ["my_tasks"],
        "environments": {
            "Reward-v0": {"n_timesteps": 2000, "env_kwargs": {"reward": 5.0}},
            "Endless-v0": {"n_timesteps": 100},
        },
        # Callbacks of ARS see no episodes, and it trains on whole ones
        "algorithms": ["vpg", "a2c", "ars"],
        "seeds": 1,
        "evaluation_episodes": 2,
    }
    for selected in (["--algo", "vpg", "a2c"], ["--algo", "ars", "--env", "Reward-v0"]):
        arguments = command(written(study, tmp_path), tmp_path / "out", *selected)
        output_of(installed.run_warm(*arguments, env={"PYTHONPATH": str(tmp_path)}))
    runs = pd.read_csv(tmp_path / "out" / "runs.csv", keep_default_na=False).set_index(["environment", "algorithm"])
    assert runs.deterministic_return["Reward-v0"].tolist() == runs.stochastic_return["Reward-v0"].tolist() == ["50.0"] * 3
    assert runs.training_return["Reward-v0"].to_dict() == {"vpg": "50.0", "a2c": "50.0", "ars": ""}
    assert runs.error["Endless-v0", "vpg"].startswith(
        "ValueError: an evaluation episode has not ended after 50 steps: Endless-v0 has no time limit"
    )


def test_an_environment_that_crashes_is_named_before_the_first_run(installed: Environment, tmp_path: Path):
    (tmp_path / "my_tasks.py").write_text(TASKS)
    arguments = (
        "--gym-packages",
        "my_tasks",
        "--env",
        "CartPole-v1",
        "Crash-v0",
        "--algo",
        "vpg",
        "-f",
        str(tmp_path / "out"),
    )
    process = installed.run_warm(*COMPARE, *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 1
    assert process.stderr.strip().endswith("error: Crash-v0: the process ended with exit code 7")
    assert not (tmp_path / "out").exists()


def test_an_estimator_of_ones_own_joins_a_study(installed: Environment, tmp_path: Path):
    folder = tmp_path / "out"
    (tmp_path / "my_estimators.py").write_text(MINE)
    common = ["--seeds", "1", "--steps", "300", "--vec-env", "native", "-f", str(folder)]
    output_of(installed.run_warm(*COMPARE, *common, "--vary", "estimator=td_residual"))
    mine = ["--vary", "estimator=td_residual,mine", "--gym-packages", "my_estimators"]
    output = output_of(installed.run_warm(*COMPARE, *common, *mine, env={"PYTHONPATH": str(tmp_path)}))
    assert re.search(r"^1 runs in", output, re.MULTILINE)
    runs = pd.read_csv(folder / "runs.csv").set_index("setting")
    assert runs.deterministic_return["estimator=mine"] == runs.deterministic_return["estimator=td_residual"]
    assert "| estimator=mine |" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"n_episodes": 3}, "statistics: CartPole-v1: n_episodes=3 is not enough for two batches of 2 episodes"),
        ({"reference": "steps"}, "statistics: CartPole-v1: reference='steps' is not allowed; choose one of 'gae'"),
    ],
    ids=str,
)
def test_statistics_that_cannot_be_measured_are_an_error_before_the_first_run(
    installed: Environment, statistics: dict, message: str, tmp_path: Path
):
    study = {
        "environments": {"CartPole-v1": {"n_timesteps": 200}},
        "algorithms": ["vpg"],
        "entries": False,
        "settings": {"gae": {"n_envs": 2, "n_episodes": 1}, "steps": {"n_steps": 8}},
        "statistics": {"policies": ["gae"], **statistics},
    }
    process = installed.run_warm(*command(written(study, tmp_path), tmp_path / "out"))
    assert process.returncode == 1
    assert f"error: {message}" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_dry_run_tells_the_cost_and_writes_nothing(installed: Environment, exists: bool, tmp_path: Path):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    arguments = ("--env", "CartPole-v1", "--algo", "a2c", "--seeds", "3", "--steps", "200", "-f", str(folder))
    output = output_of(installed.run_warm(*COMPARE, *arguments, "--processes", "1", "--dry-run"))
    assert re.search(r"CartPole-v1 +a2c +3 runs +[\d,]+ steps/s", output)
    assert re.search(r"3 runs in 1 processes: about 00:0\d of training \(measured now, a few seconds each\)", output)
    assert list(tmp_path.glob("out/**/*")) == []
    assert folder.exists() == exists


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "CartPole-v7"], "environment='CartPole-v7' is not known; did you mean 'CartPole-v1'"),
        (["--algo", "pppo"], "algorithm='pppo' is not known; did you mean 'ppo'"),
        (["--vary", "gea_lambda=1"], "keyword='gea_lambda' is not known; did you mean 'gae_lambda'"),
        (["--vary", "gae_lambda=2"], "CartPole-v1 vpg gae_lambda=2: gae_lambda=2 is not allowed; it must be a number >= 0"),
        (["--vary", "estimator=gea"], "estimator='gea' is not allowed; choose one of 'total_return'"),
        (["--seeds", "0"], "seeds=0 is not allowed"),
        (["--gym-packages", "nothing"], "gym_packages: nothing cannot be imported: No module named 'nothing'"),
        (["--entries", "nowhere.yml"], "CartPole-v1 vpg: [Errno 2] No such file or directory: 'nowhere.yml'"),
        (["--entries", "a.yml", "b.yml"], "--entries 'a.yml' is not allowed; with several files, it must have the form"),
        (["--entries", "ppo=a.yml", "ppo=b.yml"], "--entries has ppo twice; name one file for each algorithm"),
        (["--processes", "0"], "--processes=0 is not allowed"),
        (["--config", "nowhere.yml"], "nowhere.yml cannot be read"),
        (["--report"], "there is no study in"),
        (["--track", "wandb"], "--track wandb needs a package: pip install wandb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_an_error_before_the_first_run(
    installed: Environment, arguments: list, message: str, tmp_path: Path
):
    process = installed.run_warm(*COMPARE, *arguments, "-f", str(tmp_path / "out"))
    assert process.returncode == 1
    assert "error: " in process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


def test_the_ablation_is_a_study_of_the_package(installed: Environment, tmp_path: Path):
    process = installed.run_warm("-m", "sb3_vpg", "ablation", "--env", "CartPole-v7", "-f", str(tmp_path))
    assert process.returncode == 1
    assert "error: --env='CartPole-v7' is not known; did you mean 'CartPole-v1'" in process.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(installed: Environment, tmp_path: Path):
    tmp_path.chmod(0o500)
    process = installed.run_warm(*COMPARE, "--algo", "vpg", "-f", str(tmp_path / "out"))
    assert process.returncode == 1
    assert "error: [Errno 13] Permission denied" in process.stderr
