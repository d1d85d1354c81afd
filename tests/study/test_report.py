"""The report of an ablation study: numbers that can be checked by hand, missing parts, bad input."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sb3_vpg.study import report
from sb3_vpg.study.report import write_report
from sb3_vpg.study.study import COLUMNS

# "Far" first: the order of the report is theirs, not that of the results
RANGES = {"Far": (0.0, 100.0), "Near": (0.0, 10.0)}
BUDGET = 1000


def final_rows(environment, formulation, returns, rate=0.01):
    """One final run for each of the returns, with a learning curve of two bins."""
    for seed, value in enumerate(returns):
        run = (environment, formulation, "final", seed, rate)
        yield (*run, BUDGET, "final_return", value)
        yield from ((*run, timesteps, "return", value * timesteps / BUDGET) for timesteps in (BUDGET // 2, BUDGET))


def search_rows(environment, formulation, returns_by_rate):
    for rate, returns in returns_by_rate.items():
        for seed, value in enumerate(returns):
            yield (environment, formulation, "search", seed, rate, BUDGET, "final_return", value)


def statistics_rows(environment, formulation, metric, start_middle_end):
    """A reference run for each number that a moment has; moments as they come out with whole episodes."""
    for timesteps, values in zip((0, 520, 1010), start_middle_end):
        for seed, value in enumerate(values):
            for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1)):
                yield (environment, formulation, "statistics", seed, 0.01, timesteps, metric + end, value + shift)


def frame(*parts):
    return pd.DataFrame([row for part in parts for row in part], columns=COLUMNS)


def whole_study():
    return frame(
        final_rows("Near", "plain", [0, 2, 4, 10]),
        final_rows("Far", "plain", [20, 40, 60, 100]),
        final_rows("Near", "clever", [5, 6, 7, 8, 9]),
        final_rows("Far", "clever", [50, 60, 70, 80], rate=0.001),
        final_rows("Near", "partial", [3, 3, np.nan]),
        search_rows("Near", "plain", {0.001: [1, 4], 0.01: [3]}),
        search_rows("Near", "clever", {0.001: [6]}),
        search_rows("Far", "clever", {0.001: [1, 2], 0.01: [30, 40]}),
        statistics_rows("Near", "plain", "variance", [[1, 1], [2, 2], [0, 4]]),
        statistics_rows("Near", "clever", "variance", [[4, 1], [1], [1, 2]]),
        *(statistics_rows("Near", "plain", metric, [[0.25, 0.75], [0.5], [0.5]]) for metric in report.COSINES),
        statistics_rows("Near", "clever", "pairwise_cosine", [[0.75], [0.25], [0.5]]),
        statistics_rows("Near", "clever", "cosine_with_reference", [[0.75], [0.875], [0.5]]),
        *(statistics_rows("Near", "partial", metric, [[0.75], [0.375], [0.5]]) for metric in report.COSINES),
    )


def written(results, folder, **kwargs):
    return write_report(results, RANGES, folder, repetitions=20, **kwargs).read_text()


def section(text, heading):
    return re.split(r"^## ", text, flags=re.MULTILINE)[1:][report_headings(text).index(heading)]


def report_headings(text):
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def cells(text, name):
    """Of the first row with this name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def in_memory(results, first=None):
    """What the sections read."""
    formulations = list(results["formulation"].unique())
    return report.Findings(report.validate_results(results, RANGES, first), RANGES, formulations, first or formulations[0], 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "made" / "if need be"
    written(whole_study(), folder)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.md").read_text()


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    columns = {"even": np.array([8.0, 0, 2, 100, 4, 0, 6, 100]), "constant": np.full(8, 3.0), "one seed": np.array([7.0])}
    estimates = report.interquartile_means(columns, repetitions=100)
    assert estimates["even"].mean == 5
    assert 0 <= estimates["even"].low < 5 < estimates["even"].high <= 100
    assert estimates["constant"] == (3, 3, 3, 8)
    assert estimates["one seed"] == (7, 7, 7, 1)


def test_final_returns_by_environment_with_learning_rate(text):
    far, near, _, seeds = cells(section(text, "Final returns"), "plain")
    # A hundredth of the range is to be seen
    assert re.fullmatch(r"50 \[\d+, \d+\] at 0.01", far)
    assert re.fullmatch(r"3\.0 \[\d+\.\d, \d+\.\d\] at 0.01", near)
    assert seeds == "4"
    assert cells(section(text, "Final returns"), "clever")[0].endswith("at 0.001 (n = 4)")


def test_aggregate_is_over_normalised_scores_of_all_environments(text):
    # 0, .2, .4, 1 and .2, .4, .6, 1: without two at each end .2, .4, .4, .6
    assert cells(section(text, "Final returns"), "plain")[2].startswith("0.40 [")
    # The fifth seed is not there in Far; the middle of .5, .6, .7, .8, twice
    of_clever = cells(section(text, "Final returns"), "clever")
    assert of_clever[2].startswith("0.65 [")
    assert of_clever[2].endswith("(n = 4)")
    assert of_clever[3] == "5"


def test_no_aggregate_without_all_environments_and_runs_without_a_value_do_not_count(text):
    far, near, aggregate, seeds = cells(section(text, "Final returns"), "partial")
    assert (far, near, aggregate, seeds) == ("-", "3.0 [3.0, 3.0] at 0.01", "-", "2")


def test_orders_are_those_of_the_ranges_and_of_the_results(text):
    assert re.findall(r"^\| +\| (.*)", section(text, "Final returns"), flags=re.MULTILINE) == [
        "Far | Near | normalized | seeds |"
    ]
    rows = re.findall(r"^\| (plain|clever|partial) ", section(text, "Final returns"), flags=re.MULTILINE)
    assert rows == ["plain", "clever", "partial"]


def test_search_shows_means_and_the_chosen_rate_bold(text):
    of_search = section(text, "Learning rates")
    # 0.01 is that of the final runs, though it is not the best here, and has one seed of two
    assert cells(of_search, "plain") == ["2.5", "**3.0** (n = 1)", "2"]
    assert cells(of_search, "clever") == ["**2**", "35", "2"]
    assert cells(of_search.split("**Near**")[1], "clever") == ["6.0", "-", "1"]


def test_variances_are_ratios_at_the_same_policy_averaged_geometrically(text):
    variance, _, cosine, _, seeds = cells(section(text, "Gradient statistics"), "clever")
    # 4 and 1; 1 / 2 of the one seed there is; 1 / 0 is left out, 2 / 4 is not
    assert variance == "2 / 0.5 (n = 1) / 0.5 (n = 1)"
    assert cosine == "0.750 (n = 1) / 0.250 (n = 1) / 0.500 (n = 1)"
    assert seeds == "2"
    assert cells(section(text, "Gradient statistics"), "plain")[2] == "0.500 / 0.500 (n = 1) / 0.500 (n = 1)"
    assert cells(section(text, "Gradient statistics"), "plain")[1] == "- / - / -"


def test_first_is_what_variances_are_relative_to():
    relative_to, ratios = report.variance_ratios(in_memory(whole_study(), first="clever"), "Near")
    assert relative_to == "clever"
    assert ratios["plain", "start"].to_dict() == {0: 0.25, 1: 1}
    assert ratios["plain", "middle"].to_dict() == {0: 2}
    # Not measured: the first that is
    assert report.variance_ratios(in_memory(whole_study(), first="partial"), "Near")[0] == "plain"


def test_a_step_is_told_by_score_variance_and_cosine():
    text = report.steps_section(in_memory(whole_study()), [("plain", "clever"), ("clever", "nowhere")])
    scores, ratios, cosines = (part for part in text.split("\n\n") if part.startswith("|"))
    # Interquartile means 3 and 7 of Near, whose scores are
    low, high = RANGES["Near"]
    assert (
        cells(scores, "plain -> clever")[list(RANGES).index("Near")].strip("*").startswith(f"{(7 - 3) / (high - low):+.2f} [")
    )
    assert cells(ratios, "plain -> clever")[list(RANGES).index("Near")] == "2 / 0.5 / 0.5"
    assert cells(cosines, "plain -> clever")[list(RANGES).index("Near")] == "+0.50 / -0.25 / +0.00"
    assert set(cells(scores, "clever -> nowhere")) == {"-"}


def test_a_difference_without_doubt_is_bold():
    few, many = np.array([1.0, 1, 2, 2]), np.array([5.0, 5, 6, 6])
    assert report.difference(few, many, 100).startswith("**+4.00 [")
    assert report.difference(many, few, 100).startswith("**-4.00 [")
    assert report.difference(few, few, 100).startswith("+0.00 [-")


def test_rank_correlation(text):
    # Cosines .5, .25 or .875, .375 and returns 3, 7, 3: ranks 3, 1, 2 or 2, 3, 1 and 1.5, 3, 1.5
    ranks = section(text, "Do better gradients mean better returns?")
    assert cells(ranks, "Near") == [f"{-np.sqrt(3) / 2:.2f}", f"{np.sqrt(3) / 2:.2f}", "3", "1", "2 to 5"]


@pytest.mark.parametrize("cosines", [(0.1, 0.2), (0.1, 0.1, 0.1)], ids=["two formulations", "no spread"])
def test_no_rank_correlation_where_it_says_nothing(cosines):
    parts = [
        part
        for i, cosine in enumerate(cosines)
        for part in (
            final_rows("Near", f"rung {i}", [i, i]),
            *(statistics_rows("Near", f"rung {i}", metric, [[], [cosine], []]) for metric in report.COSINES),
        )
    ]
    results = in_memory(frame(*parts))
    estimates = {environment: report.final_returns(results, environment) for environment in RANGES}
    assert cells(report.rank_section(results, estimates), "Near") == ["-", "-", str(len(cosines)), "1", "2"]


def test_every_picture_is_shown_opens_and_is_small(folder, text):
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert {"aggregate.png", "performance_profiles.png", "learning_curves_Far.png", "cosines_Near.png"} < set(pictures)
    for name in pictures:
        with Image.open(folder / name) as image:
            assert len(image.convert("RGB").getcolors()) > 10
        assert (folder / name).stat().st_size < 150_000


def test_same_results_same_bytes_and_numpys_generator_is_left_alone(folder, tmp_path):
    # The generator rliable draws from
    np.random.seed(1)  # noqa: NPY002
    next_number = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    written(whole_study(), tmp_path)
    assert np.random.random() == next_number  # noqa: NPY002
    once, twice = ({path.name: path.read_bytes() for path in where.iterdir()} for where in (folder, tmp_path))
    assert once == twice


def test_study_that_has_just_begun(tmp_path):
    text = written(frame(final_rows("Near", "plain", [1])), tmp_path)
    assert cells(section(text, "Final returns"), "plain") == ["-", "1.0 at 0.01", "-", "1"]
    said = {
        "Final returns": "No final runs yet: Far.",
        "Normalized scores": "No formulation has final runs in all environments yet.",
        "Performance profiles": "No formulation has final runs in all environments yet.",
        "Learning curves": "No learning curves yet: Far.",
        "Learning rates": "No search yet: Far, Near.",
        "Gradient statistics": "No gradient statistics yet: Far, Near.",
        "Step by step": "The study has no steps.",
        "Do better gradients mean better returns?": "No formulation has both gradient statistics and final runs yet.",
    }
    assert report_headings(text) == list(said)
    for heading, sentence in said.items():
        assert sentence in section(text, heading)


def test_names_of_environments_that_are_no_file_names(tmp_path):
    write_report(frame(final_rows("ALE/Pong-v5", "plain", [1, 2])), {"ALE/Pong-v5": (0, 10)}, tmp_path, repetitions=20)
    assert (tmp_path / "learning_curves_ALE_Pong-v5.png").exists()


NEAR = frame(final_rows("Near", "plain", [1, 2]))


@pytest.mark.parametrize(
    ("results", "kwargs", "named"),
    [
        (NEAR.assign(reward=0), {}, r"\['reward'\]"),
        (NEAR.drop(columns="metric"), {}, r"\['metric'\]"),
        (NEAR.assign(phase="finale"), {}, "phase.*'finale'.*search"),
        (NEAR.assign(environment="Nowhere"), {}, "environment.*'Nowhere'.*Far"),
        (NEAR.assign(phase="search"), {}, "no final rows"),
        (NEAR[NEAR["metric"] == "return"], {}, "no final rows"),
        (NEAR.assign(value=np.nan), {}, "no final rows"),
        (NEAR.iloc[:0], {}, "no final rows"),
        (pd.concat([NEAR, NEAR]), {}, "duplicate row.*'plain'"),
        (NEAR.assign(learning_rate=NEAR["seed"] + 1.0), {}, "plain in Near have several learning rates"),
        (NEAR, {"first": "nobody"}, "first='nobody'.*plain"),
        (NEAR, {"score_ranges": {"Near": (1.0, 1.0)}}, "score range of Near must be increasing"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, results, kwargs, named):
    with pytest.raises(ValueError, match=named):
        write_report(**{"results": results, "score_ranges": RANGES, "folder": tmp_path / "report", **kwargs})
    assert not (tmp_path / "report").exists()
