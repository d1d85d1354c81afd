"""The ablation runner: what it runs, what it writes, and that it goes on where it was."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.installed import CHECKOUT, Environment, call, heed_interruptions, output_of

from sb3_vpg.estimators import Formulation
from sb3_vpg.study.__main__ import keep_settings
from sb3_vpg.study.results import Results
from sb3_vpg.study.study import COLUMNS, FIRST_SEARCH_SEED, LAST_METRIC, Run, load_study
from sb3_vpg.study.training import N_BINS, make_env, make_model, measured_formulations, train

LADDER = CHECKOUT / "hyperparams" / "ablation" / "ladder.yml"
SETTINGS = {
    "learning_rates": [0.001, 0.01],
    "common": {"policy": "MlpPolicy", "n_episodes": 1, "gamma": 0.9, "policy_kwargs": {"net_arch": [8]}},
    "environments": {
        "CartPole-v1": {"n_timesteps": 3000, "n_envs": 2, "reward_scale": 0.1, "score_range": [20, 500], "gae_lambda": 0.5}
    },
    "formulations": {
        "reward_to_go": {"estimator": "reward_to_go", "normalize_advantage": False},
        "gae": {"estimator": "gae"},
        "gae_8_steps": {"estimator": "gae", "n_episodes": None, "n_steps": 8},
    },
    "steps": [["reward_to_go", "gae"], ["gae", "gae_8_steps"]],
    "statistics": {"policy_of": "gae", "reference": "reward_to_go", "n_episodes": 8},
}
# Two formulations, one of them also where gradients are measured
ARGUMENTS = ("--formulation", "reward_to_go", "gae_8_steps", "--seeds", "2", "--search-seeds", "1", "--statistics-seeds", "1")


def written(settings: dict, folder: Path) -> Path:
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def command(config: Path, folder: Path, *arguments: str) -> list[str]:
    processes = ("--processes", "2")
    program = (sys.executable, "-m", "sb3_vpg", "ablation")
    return [*program, "--config", str(config), "--folder", str(folder), *processes, *arguments]


def ablation(config: Path, folder: Path, *arguments: str) -> str:
    return output_of(call(*command(config, folder, *arguments), cwd=folder.parent))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study that has run, with the settings beside it."""
    folder = tmp_path_factory.mktemp("study")
    output = ablation(written(SETTINGS, folder), folder / "out", *ARGUMENTS)
    assert f"Report: {folder / 'out' / 'report.md'}" in output
    return folder


@pytest.fixture
def study_folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def runs_in(results: pd.DataFrame) -> set[Run]:
    return {Run(*run) for run in results[list(Run._fields)].itertuples(index=False)}


# ---------------------------------------------------------------------------------------------------------------
# A study from the command line
# ---------------------------------------------------------------------------------------------------------------


def test_an_installed_package_has_the_ladder_and_names_what_it_does_not_know(installed: Environment):
    process = installed.run("-m", "sb3_vpg", "ablation", "--env", "CartPole-v7")
    assert process.returncode == 1
    assert "error: --env='CartPole-v7' is not allowed; choose one of 'CartPole-v1', 'Acrobot-v1'" in process.stderr


def test_search_then_final_runs_then_statistics(finished: Path):
    results = pd.read_csv(finished / "out" / "results.csv")
    assert tuple(results.columns) == COLUMNS
    by_phase = {phase: runs_in(rows) for phase, rows in results.groupby("phase")}
    # gae, too, which gives the policies whose gradients are measured
    assert by_phase["search"] == {
        Run("CartPole-v1", name, "search", FIRST_SEARCH_SEED, rate)
        for name in ("reward_to_go", "gae_8_steps", "gae")
        for rate in (0.001, 0.01)
    }
    returns = results.query("phase == 'search' and metric == 'final_return'").set_index(["formulation", "learning_rate"]).value
    best = {name: returns[name].idxmax() for name in ("reward_to_go", "gae_8_steps", "gae")}
    assert by_phase["final"] == {
        Run("CartPole-v1", name, "final", seed, best[name]) for name in ("reward_to_go", "gae_8_steps") for seed in (0, 1)
    }
    # Formulations of whole episodes, at three moments, on the policies of one run
    statistics = results.query("phase == 'statistics' and metric == 'pairwise_cosine'")
    assert set(zip(statistics.formulation, statistics.timesteps)) == {
        (name, timesteps) for name in ("reward_to_go", "gae") for timesteps in (0, 1500, 3000)
    }
    assert set(statistics.learning_rate) == {best["gae"]}


def test_the_report_speaks_of_what_was_run(finished: Path):
    report = (finished / "out" / "report.md").read_text()
    for name in ("reward_to_go", "gae_8_steps"):
        assert re.search(rf"^\| {name} \|", report, re.MULTILINE)
    pictures = re.findall(r"\]\((.+\.png)\)", report)
    assert "learning_curves_CartPole-v1.png" in pictures
    assert all((finished / "out" / picture).stat().st_size > 0 for picture in pictures)


def test_it_goes_on_where_it_was(study_folder: Path):
    results, config = study_folder / "out" / "results.csv", study_folder / "settings.yml"
    before = pd.read_csv(results)
    # Killed while the last run was being written: within a line
    text = results.read_text()
    results.write_text(text[: len(text) // 2])
    kept = runs_in(pd.read_csv(results).query("metric == @LAST_METRIC"))
    assert 0 < len(kept) < len(runs_in(before))
    ablation(config, study_folder / "out", *ARGUMENTS)
    after = pd.read_csv(results)

    def comparable(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame[frame.metric != LAST_METRIC]
        return frame.sort_values([*COLUMNS[:-1]]).reset_index(drop=True)

    # The runs that were lost give the same numbers again
    pd.testing.assert_frame_equal(comparable(after), comparable(before))


def test_nothing_is_left_to_do_when_all_is_done(study_folder: Path):
    path = study_folder / "out" / "results.csv"
    text = path.read_text()
    results = Results(path)
    assert path.read_text() == text
    assert all(run in results for run in runs_in(pd.read_csv(path)))


def test_other_settings_do_not_go_into_the_same_folder(study_folder: Path):
    config = written({**SETTINGS, "learning_rates": [0.1]}, study_folder)
    with pytest.raises(ValueError, match="choose another --folder"):
        keep_settings(config, study_folder / "out" / "study.yml")


def test_interrupted_it_keeps_what_has_ended(tmp_path: Path):
    config, folder = written(SETTINGS, tmp_path), tmp_path / "out"
    process = subprocess.Popen(
        command(config, folder, *ARGUMENTS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interruptions,
    )
    results = folder / "results.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (results.is_file() and LAST_METRIC in results.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Interrupted" in output
    assert "Traceback" not in errors
    assert len(Results(results)._done) >= 1
    assert not (folder / "report.md").exists()


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


def test_every_step_of_the_ladder_is_a_vpg_in_every_environment():
    study = load_study(LADDER)
    assert {"CartPole-v1", "Acrobot-v1", "CartPoleSwingUp-v0", "CartPoleSwingUp-v1", "Pendulum-v1"} == set(study.environments)
    for env_id in study.environments:
        for name in study.formulations:
            model = make_model(study, Run(env_id, name, "final", 0, 0.01))
            assert model.n_envs == study.environments[env_id].n_envs
            model.env.close()


def test_the_ladder_has_each_step_once_and_most_differ_in_one_keyword():
    study = load_study(LADDER)
    formulations = study.formulations
    assert len({yaml.safe_dump(dict(f), sort_keys=True) for f in formulations.values()}) == len(formulations)
    changed = {
        ("total_return", "total_return_discounted"): {"gamma"},
        ("total_return_discounted", "reward_to_go"): {"estimator"},
        ("reward_to_go", "batch_normalized"): {"normalize_advantage"},
        ("reward_to_go", "episode_normalized"): {"normalize_advantage"},
        ("reward_to_go", "mean_baseline"): {"baseline"},
        ("reward_to_go", "time_baseline"): {"baseline"},
        ("time_baseline", "leave_one_out"): {"baseline"},
        ("reward_to_go", "value_baseline"): {"baseline"},
        ("value_baseline", "gae_0.99"): {"estimator", "baseline", "gae_lambda"},
        ("gae_0.99", "gae_0.95"): {"gae_lambda"},
        ("gae_0.95", "gae_0.8"): {"gae_lambda"},
        ("gae_0.8", "td_residual"): {"estimator", "gae_lambda"},
        ("gae_0.95", "gae_normalized"): {"normalize_advantage"},
        ("batch_normalized", "batch_normalized_4_episodes"): {"n_episodes"},
        ("gae_normalized", "gae_normalized_4_episodes"): {"n_episodes"},
        ("gae_normalized", "gae_normalized_32_steps"): {"n_episodes", "n_steps"},
        ("batch_normalized", "gamma_t"): {"discount_state_distribution"},
        ("batch_normalized", "trajectory_sum"): {"loss_reduction"},
    }
    assert {tuple(step) for step in study.steps} == set(changed)
    assert set().union(*changed) == set(formulations)
    for (one, other), expected in changed.items():
        a, b = (study.keywords("CartPole-v1", name) for name in (one, other))
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} == expected, (one, other)


def test_what_is_measured_is_what_is_trained(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    measured = measured_formulations(study, "CartPole-v1")
    # Pieces of 8 steps are no whole episodes
    assert list(measured) == ["reward_to_go", "gae"]
    assert measured["reward_to_go"].formulation == Formulation("reward_to_go", gamma=0.9, gae_lambda=0.5)
    for name, one in measured.items():
        model = make_model(study, Run("CartPole-v1", name, "final", 0, 0.01))
        assert one.episodes_per_batch == model.n_envs * model.n_episodes
        if name == "reward_to_go":
            assert one.formulation == model.plan.formulation


def test_rewards_are_scaled_and_returns_are_not(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    env = make_env(study, "CartPole-v1", 1, seed=0)
    env.reset()
    rewards, done = [], False
    while not done:
        _, reward, (done,), infos = env.step(np.array([0]))
        rewards.append(reward[0])
    assert rewards == pytest.approx([0.1] * len(rewards))
    assert infos[0]["episode"]["r"] == len(rewards)


def test_a_learning_curve_is_the_mean_of_the_episodes_of_each_bin(tmp_path: Path):
    study = load_study(written(SETTINGS, tmp_path))
    rows = pd.DataFrame(train(study, Run("CartPole-v1", "gae", "final", 0, 0.001)), columns=list(COLUMNS))
    curve = rows[rows.metric == "return"]
    assert set(curve.timesteps) <= {3000 * (i + 1) // N_BINS for i in range(N_BINS)}
    assert len(curve) > N_BINS // 2
    assert curve.value.between(8, 500).all()
    assert rows.metric.iloc[-1] == LAST_METRIC
    # The last tenth is the last two bins
    ends = curve[curve.timesteps > 2700].value
    assert ends.min() <= rows[rows.metric == "final_return"].value.item() <= ends.max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates=0.0"),
        ({"statistics": {**SETTINGS["statistics"], "policy_of": "ppo"}}, "policy_of='ppo'"),
        ({"environments": {"NoSuch-v0": SETTINGS["environments"]["CartPole-v1"]}}, "'NoSuch-v0'"),
        ({"seeds": 3}, "expected the keys"),
        ({"steps": [["gae", "ppo"]]}, "steps='ppo'"),
        ({"steps": [["gae"]]}, "must be two formulations"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 0, "n_envs": 1, "score_range": [0, 1]}}}, "n_timesteps=0"),
        ({"environments": {"CartPole-v1": {"n_timesteps": 9, "n_envs": 1, "score_range": [1, 0]}}}, "score_range=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_named(change: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_study(written({**SETTINGS, **change}, tmp_path))


def test_a_budget_too_small_to_judge_by_is_named(tmp_path: Path):
    # Episodes of two environments end after each 400 steps: none in the last 190 of 1900
    environment = {"n_timesteps": 1900, "n_envs": 2, "score_range": [-1500, 0]}
    study = load_study(written({**SETTINGS, "environments": {"Pendulum-v1": environment}}, tmp_path))
    with pytest.raises(ValueError, match="no episode ends in the last tenth"):
        train(study, Run("Pendulum-v1", "gae", "final", 0, 0.001))


def test_a_file_of_something_else_is_not_taken_for_results(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a file of results"):
        Results(path)
    assert path.read_text() == "a,b\n1,2\n"
