"""``python -m sb3_vpg ablation``: what it runs, what it writes, and that it goes on where it was."""

import re
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from helpers.installed import Environment, output_of, wait_until
from helpers.studies import SETTINGS, written

from sb3_vpg.study.__main__ import keep_settings
from sb3_vpg.study.results import Results
from sb3_vpg.study.study import COLUMNS, FIRST_SEARCH_SEED, LAST_METRIC, Run

# Two formulations, one of them also where gradients are measured
ARGUMENTS = ("--formulation", "reward_to_go", "gae_8_steps", "--seeds", "2", "--search-seeds", "1", "--statistics-seeds", "1")


def command(config: Path, folder: Path, processes: int = 1) -> list[str]:
    program = ["-m", "sb3_vpg", "ablation"]
    return [*program, "--config", str(config), "--folder", str(folder), "--processes", str(processes), *ARGUMENTS]


@pytest.fixture(scope="module")
def finished(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study that has run, with the settings beside it."""
    folder = tmp_path_factory.mktemp("study")
    output = output_of(installed.run_warm(*command(written(SETTINGS, folder), folder / "out", processes=2)))
    assert f"Report: {folder / 'out' / 'report.md'}" in output
    return folder


@pytest.fixture
def study_folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def runs_in(results: pd.DataFrame) -> set[Run]:
    return {Run(*run) for run in results[list(Run._fields)].itertuples(index=False)}


def test_an_installed_package_has_the_ladder_and_names_what_it_does_not_know(installed: Environment):
    process = installed.run_warm("-m", "sb3_vpg", "ablation", "--env", "CartPole-v7")
    assert process.returncode == 1
    assert "error: --env='CartPole-v7' is not allowed; choose one of 'CartPole-v1', 'Acrobot-v1'" in process.stderr


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_report_speaks_of_what_was_run(finished: Path):
    report = (finished / "out" / "report.md").read_text()
    for name in ("reward_to_go", "gae_8_steps"):
        assert re.search(rf"^\| {name} \|", report, re.MULTILINE)
    pictures = re.findall(r"\]\((.+\.png)\)", report)
    assert "learning_curves_CartPole-v1.png" in pictures
    assert all((finished / "out" / picture).stat().st_size > 0 for picture in pictures)


@pytest.mark.slow
def test_it_goes_on_where_it_was(installed: Environment, study_folder: Path):
    results, config = study_folder / "out" / "results.csv", study_folder / "settings.yml"
    before = pd.read_csv(results)
    # Killed while the last run was being written: within a line
    text = results.read_text()
    results.write_text(text[: len(text) // 2])
    kept = runs_in(pd.read_csv(results).query("metric == @LAST_METRIC"))
    assert 0 < len(kept) < len(runs_in(before))
    output_of(installed.run_warm(*command(config, study_folder / "out")))
    after = pd.read_csv(results)

    def comparable(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame[frame.metric != LAST_METRIC]
        return frame.sort_values([*COLUMNS[:-1]]).reset_index(drop=True)

    # The runs that were lost give the same numbers again
    pd.testing.assert_frame_equal(comparable(after), comparable(before))


@pytest.mark.slow
def test_nothing_is_left_to_do_when_all_is_done(study_folder: Path):
    path = study_folder / "out" / "results.csv"
    text = path.read_text()
    results = Results(path)
    assert path.read_text() == text
    assert all(run in results for run in runs_in(pd.read_csv(path)))


@pytest.mark.slow
def test_other_settings_do_not_go_into_the_same_folder(study_folder: Path):
    config = written({**SETTINGS, "learning_rates": [0.1]}, study_folder)
    with pytest.raises(ValueError, match="choose another --folder"):
        keep_settings(config, study_folder / "out" / "study.yml")


@pytest.mark.slow
def test_interrupted_it_keeps_what_has_ended(installed: Environment, tmp_path: Path):
    config, folder = written(SETTINGS, tmp_path), tmp_path / "out"
    process = installed.start(*command(config, folder))
    results = folder / "results.csv"
    wait_until(lambda: results.is_file() and LAST_METRIC in results.read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Interrupted" in output
    assert "Traceback" not in output
    assert len(Results(results)._finished) >= 1
    assert not (folder / "report.md").exists()
