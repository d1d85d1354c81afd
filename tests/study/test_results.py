"""The files of a study: complete after a kill at any byte, of one study only, and never lost."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sb3_vpg.study.results import COLUMNS, N_POINTS, Measures, Point, Results, keep_settings, learning_curve
from sb3_vpg.study.study import Run, Study

RUNS = [Run("search", "CartPole-v1", "vpg", "a, b", 1000, 0.1), Run("final", "CartPole-v1", "ppo", "", 0)]
MEASURES = Measures(512, 1.5, 1 / 3, 500.0, 499.5, None, 500.0)
POINTS = [Point(256, 0.75, "return", "", 20.0), Point(512, 1.50049, "return", "", 0.1 + 0.2)]
SETTINGS = {
    "algorithms": ("vpg",),
    "environments": {"CartPole-v1": {"gamma": 0.9}},
    "settings": {"gae": {"gae_lambda": 0.9}},
    "entries": {"vpg": "mine.yml"},
    "seeds": 3,
    "search": {"seeds": 2, "learning_rates": [0.1]},
}
STUDY = Study()


def filled(folder: Path) -> Results:
    results = Results(folder)
    for run in RUNS:
        results.add(run, MEASURES, POINTS)
    return results


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.csv")}


def test_a_learning_curve_is_the_mean_of_the_episodes_of_each_part_of_the_budget():
    part = 1000 // N_POINTS
    episodes = [
        (part, 0.5, 1.0),
        (part + 1, 1.0, 2.0),
        (2 * part, 1.5, 4.0),
        (901, 8.0, 10.0),
        (1000, 9.0, 20.0),
        (1001, 9.5, 99.0),
    ]
    points, of_last_tenth = learning_curve(episodes, budget=1000)
    assert points == [
        *(Point(part, 0.5, "return", "", 1.0), Point(2 * part, 1.5, "return", "", 3.0)),
        *(Point(920, 8.0, "return", "", 10.0), Point(1000, 9.0, "return", "", 20.0)),
    ]
    assert of_last_tenth == 15
    assert learning_curve([(900, 1.0, 1.0)], budget=1000)[1] is None
    assert learning_curve([], budget=1000) == ([], None)


def test_numbers_come_back_as_they_were_written_and_seconds_to_the_millisecond(tmp_path: Path):
    results = filled(tmp_path)
    runs, points = results.frame("runs"), results.frame("points")
    assert tuple(runs.columns) == COLUMNS["runs"]
    assert tuple(points.columns) == COLUMNS["points"]
    assert runs.setting.tolist() == ["a, b", ""]
    assert runs.processor_seconds[0] == 1 / 3
    assert points["value"].tolist() == [20.0, 0.1 + 0.2] * 2
    assert points.seconds.tolist() == [0.75, 1.5] * 2
    assert runs.training_return.isna().all()
    assert runs.learning_rate.isna().tolist() == [False, True]
    assert runs.error.tolist() == ["", ""]


def test_what_has_ended_is_known_when_the_files_are_opened_again(tmp_path: Path):
    filled(tmp_path)
    before = contents(tmp_path)
    again = Results(tmp_path)
    assert all(run in again for run in RUNS)
    assert RUNS[1]._replace(seed=1) not in again
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["runs", "points"])
def test_cut_anywhere_only_whole_runs_are_left(tmp_path: Path, name: str):
    filled(tmp_path)
    path, whole = tmp_path / f"{name}.csv", contents(tmp_path)
    for end in range(len(",".join(COLUMNS[name])) + 1, len(whole[f"{name}.csv"]), 7):
        for file, text in whole.items():
            (tmp_path / file).write_text(text)
        path.write_text(whole[f"{name}.csv"][:end])
        results = Results(tmp_path)
        runs, points = results.frame("runs"), results.frame("points")
        assert len(points) <= len(POINTS) * len(runs) if name == "runs" else len(runs) == len(RUNS)
        if name == "runs":
            for run in RUNS:
                if run not in results:
                    results.add(run, MEASURES, POINTS)
            assert contents(tmp_path) == whole


def test_points_of_a_run_that_has_not_ended_are_removed(tmp_path: Path):
    results = filled(tmp_path)
    before = contents(tmp_path)
    with results.paths["points"].open("a") as file:
        file.write("final,CartPole-v1,ppo,,7,,256,0.75,return,,20.0\nfinal,CartP")
    with_a_part = contents(tmp_path)
    assert RUNS[1] in Results(tmp_path, write=False)
    assert contents(tmp_path) == with_a_part
    Results(tmp_path)
    assert contents(tmp_path) == before


def test_failed_runs_have_ended_until_they_are_forgotten(tmp_path: Path):
    results = Results(tmp_path)
    results.add(RUNS[0], MEASURES, POINTS)
    results.add(RUNS[1], Measures(), [], 'ValueError: a, "b"')
    assert results.frame("runs").error.tolist() == ["", 'ValueError: a, "b"']
    assert RUNS[1] in Results(tmp_path)
    # A dry run only says what would be executed
    results = Results(tmp_path, write=False)
    results.forget_failed(STUDY, [RUNS[1].cell])
    assert RUNS[1] not in results
    assert len(results.frame("runs")) == 2
    results = Results(tmp_path)
    # Those of other cells are kept, and those of seeds that the study has left out
    results.forget_failed(STUDY, [RUNS[0].cell])
    results.forget_failed(replace(STUDY, first_seed=1), [RUNS[1].cell])
    assert RUNS[1] in results
    results.forget_failed(STUDY, [RUNS[1].cell])
    assert RUNS[1] not in results
    assert RUNS[0] in results
    assert len(results.frame("runs")) == 1


@contextmanager
def small_files() -> Iterator[None]:
    """Context in which no file can become larger than 400 bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: Path):
    results = Results(tmp_path)
    results.add(RUNS[0], MEASURES, POINTS)

    def add_until_full() -> None:
        with small_files():
            for seed in range(10):
                results.add(RUNS[1]._replace(seed=seed), MEASURES, POINTS)

    with pytest.raises(OSError, match=r"\w+\.csv cannot be written: .*large. The runs that have ended before are kept"):
        add_until_full()
    again = Results(tmp_path)
    assert RUNS[0] in again
    assert len(again.frame("points")) == len(POINTS) * len(again.frame("runs"))


def test_a_run_without_all_of_its_points_does_not_count(tmp_path: Path):
    results = Results(tmp_path)
    points = [POINTS[0]] * 100
    # The row in runs.csv is shorter than 400 bytes
    with small_files(), pytest.raises(OSError, match=r"points\.csv cannot be written"):
        results.add(RUNS[0], MEASURES, points)
    again = Results(tmp_path)
    assert RUNS[0] not in again
    assert len(again.frame("points")) == 0


@pytest.mark.parametrize("name", ["two\nlines", "a\u2028b", "a\x0bb", 'with "quotes", and a comma'])
def test_any_name_of_a_setting_comes_back(tmp_path: Path, name: str):
    run = RUNS[0]._replace(setting=name)
    Results(tmp_path).add(run, MEASURES, POINTS)
    again = Results(tmp_path)
    assert run in again
    assert again.frame("runs").setting.tolist() == [name]
    assert again.frame("points").setting.tolist() == [name] * len(POINTS)


def test_older_results_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_text("environment,formulation,phase,seed,learning_rate,timesteps,metric,value\n")
    with pytest.raises(ValueError, match=r"results\.csv has results of an older format: choose another"):
        Results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize("name", ["runs", "points"])
def test_a_file_of_something_else_is_not_taken_for_results(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=rf"{name}\.csv has another format"):
        Results(tmp_path)
    assert path.read_text() == "a,b\n1,2\n"


def test_settings_are_kept_with_versions_and_a_study_may_grow(tmp_path: Path):
    assert keep_settings(tmp_path, SETTINGS, {"CartPole-v1, vpg": {"gamma": 0.9}}) == []
    more = {**SETTINGS, "seeds": 10, "search": {"learning_rates": [0.3, 0.1], "seeds": 5}, "algorithms": ["ppo", "vpg"]}
    more |= {key: {**SETTINGS[key], "Acrobot-v1": {"gamma": 0.9}} for key in ("environments", "settings")}
    more |= {"pairs": [["vpg", "ppo"]], "gym_packages": ["mine"], "entries": {"vpg": "mine.yml", "ppo": "mine.yml"}}
    more["environments"]["CartPole-v1"] = {"gamma": 0.9, "score_range": [0, 1]}
    before = (tmp_path / "study.yml").read_text()
    assert keep_settings(tmp_path, more, {"Acrobot-v1, vpg": {"gamma": 0.9}}, write=False) == []
    assert (tmp_path / "study.yml").read_text() == before
    assert keep_settings(tmp_path, more, {"Acrobot-v1, vpg": {"gamma": 0.9}}) == []
    kept = yaml.safe_load((tmp_path / "study.yml").read_text())
    assert kept["study"] == more
    assert list(kept["hyperparameters"]) == ["CartPole-v1, vpg", "Acrobot-v1, vpg"]
    assert set(kept["versions"]) >= {"torch", "gymnasium", "stable_baselines3"}


@pytest.mark.parametrize(
    ("settings", "hyperparameters", "named"),
    [
        ({**SETTINGS, "entries": {"vpg": "other.yml"}}, {}, "entries: vpg is 'mine.yml' there, 'other.yml' here"),
        ({**SETTINGS, "settings": {"gae": {}, "td": {}}}, {}, "settings: gae: gae_lambda is 0.9 there, None here"),
        ({**SETTINGS, "environments": {"CartPole-v1": {}}}, {}, "environments: CartPole-v1: gamma is 0.9 there, None here"),
        ({**SETTINGS, "steps": 5}, {}, "steps is None there, 5 here"),
        (SETTINGS, {"CartPole-v1, vpg": {"gamma": 0.8}}, "CartPole-v1, vpg: gamma is 0.9 there, 0.8 here"),
    ],
)
def test_a_folder_of_another_study_is_refused_by_name(tmp_path: Path, settings: dict, hyperparameters: dict, named: str):
    keep_settings(tmp_path, SETTINGS, {"CartPole-v1, vpg": {"gamma": 0.9}})
    before = (tmp_path / "study.yml").read_text()
    with pytest.raises(ValueError, match=rf"has another study \({named}\): choose another --folder"):
        keep_settings(tmp_path, settings, hyperparameters)
    assert (tmp_path / "study.yml").read_text() == before


def test_hyperparameters_may_be_classes(tmp_path: Path):
    cells = {"CartPole-v1, vpg": {"policy_kwargs": {"activation_fn": Study}}}
    assert keep_settings(tmp_path, SETTINGS, cells) == keep_settings(tmp_path, SETTINGS, cells) == []
    with pytest.raises(ValueError, match=r"activation_fn is .*Study.* there, .*Run.* here"):
        keep_settings(tmp_path, SETTINGS, {"CartPole-v1, vpg": {"policy_kwargs": {"activation_fn": Run}}})


@pytest.mark.parametrize("text", ["learning_rates: [0.1]\n", "format: 1\n", "format: 2\nstudy: {}\n", "3\n"])
def test_settings_of_another_format_are_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / "study.yml").write_text(text)
    with pytest.raises(ValueError, match=r"study\.yml has another format"):
        keep_settings(tmp_path, SETTINGS, {})


def test_damaged_settings_are_named(tmp_path: Path):
    (tmp_path / "study.yml").write_text("format: [")
    with pytest.raises(ValueError, match=r"study\.yml cannot be read"):
        keep_settings(tmp_path, SETTINGS, {})


def test_other_versions_are_reported_and_those_of_the_first_runs_are_kept(tmp_path: Path):
    keep_settings(tmp_path, SETTINGS, {})
    path = tmp_path / "study.yml"
    settings = yaml.safe_load(path.read_text())
    settings["versions"]["torch"] = "0.1"
    path.write_text(yaml.safe_dump(settings))
    assert keep_settings(tmp_path, SETTINGS, {}) == ["torch"]
    assert yaml.safe_load(path.read_text())["versions"]["torch"] == "0.1"
