"""The report of a study: its numbers, its missing parts, and the HTML file in a browser."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.studies import SETTINGS, add_final_runs, add_search, add_statistics
from matplotlib.colors import to_rgb
from PIL import Image

from sb3_vpg.study.gradient_report import COSINES
from sb3_vpg.study.rendering import Chart, Section, Table, draw_lines, write_html, write_markdown
from sb3_vpg.study.report import write_report
from sb3_vpg.study.results import Measures, Results, keep_settings
from sb3_vpg.study.study import Run, Selection, make_study

STUDY = make_study({**SETTINGS, "seeds": 5})


def whole_study(folder: Path) -> Results:
    results = Results(folder)
    for setting, best in (("reward_to_go", 0.01), ("gae", 0.001)):
        add_search(results, "CartPole-v1", setting, {rate: [400 if rate == best else 20.5] for rate in (0.001, 0.01)})
    add_final_runs(results, "CartPole-v1", ("vpg", "reward_to_go"), [0, 100, 200, 500], learning_rate=0.01)
    add_final_runs(results, "Acrobot-v1", ("vpg", "reward_to_go"), [-500, -300, -200, -100])
    add_final_runs(results, "CartPole-v1", ("vpg", "gae"), [400, 450, 450, 500, 500], learning_rate=0.001)
    add_final_runs(results, "Acrobot-v1", ("vpg", "gae"), [-100, -90, -90, -80])
    add_final_runs(results, "CartPole-v1", ("a2c", ""), [1000, 1000])
    results.add(Run("final", "Acrobot-v1", "vpg", "diverges", 0), Measures(), [], "ValueError: <critic> diverged")
    cosines = {"reward_to_go": [[0.25, 0.5, 0.5]], "gae": [[0.75, 0.25, 0.5]]}
    variances = {"reward_to_go": [[1, 2, 4]], "gae": [[2, 1, 1]]}
    metrics = {"variance": variances, "snr": cosines, **dict.fromkeys(COSINES, cosines)}
    add_statistics(results, "CartPole-v1", "gae", metrics, learning_rate=0.001)
    return results


def written(results: Results, folder: Path) -> str:
    keep_settings(folder, SETTINGS, {})
    assert write_report(STUDY, results, folder) == folder / "report.html"
    return (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    written(whole_study(folder), folder)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "report.md").read_text()


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


def section(text: str, heading: str) -> str:
    return re.split(r"^## ", text, flags=re.MULTILINE)[1:][headings(text).index(heading)]


def cells(text: str, *first: str) -> list[str]:
    """Of the first row that begins with these cells, the others."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {' | '.join(first)} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][len(first) :]


def test_scores_by_environment_and_normalized(text: str):
    cartpole, acrobot, normalized, seeds = cells(section(text, "Scores"), "reward_to_go")
    assert re.fullmatch(r"150 \[\d+, \d+\]", cartpole)
    assert re.fullmatch(r"-250 \[-\d+, -\d+\]", acrobot)
    assert seeds == "4"
    # 0, .2, .4, 1 and of -500 to -80 0, .48, .71, .95: without two at each end .2, .4, .48, .71
    assert normalized.startswith("0.45 [")
    # One of the five seeds is not there in the other environment
    assert cells(section(text, "Scores"), "gae")[2:] == [cells(section(text, "Scores"), "gae")[2], "5"]
    assert cells(section(text, "Scores"), "gae")[2].endswith("(n = 4)")
    assert cells(section(text, "Scores"), "a2c") == ["1000", "-", "-", "2"]
    assert "CartPole-v1 0 to 500, Acrobot-v1 -500 to -80" in section(text, "Scores")


def test_all_measures_of_the_runs(text: str):
    header = cells(section(text, "Runs"), "environment")
    row = dict(zip(header[1:], cells(section(text, "Runs"), "CartPole-v1", "gae")))
    assert row["deterministic return"].startswith("467 [")
    assert row["stochastic return"].startswith("466 [")
    assert row["training return"].startswith("465 [")
    expected = {"length": "50", "steps": "1,000", "seconds": "10.0", "processor seconds": "9.0", "learning rate": "0.001"}
    assert {name: row[name] for name in expected} == expected


def test_pairs_have_differences_probabilities_and_the_question(text: str):
    pairs = section(text, "Pairs")
    question, counts, probability, cartpole, acrobot = cells(pairs, "reward_to_go -> gae")
    # (466.7 - 150) / 500 and (-90 + 250) / 420
    assert cartpole.startswith("+0.63 [-")
    # The interval excludes 0, but there are four seeds
    assert acrobot.startswith("+0.38 [+")
    assert counts == "0 / 0"
    # Of 4 x 4 runs 12 and one tie, and 15 and one tie
    assert probability.startswith(f"{(12.5 / 16 + 15.5 / 16) / 2:.2f} [")
    assert question == "Does the critic help?"
    assert cells(pairs, "gae -> a2c") == ["", "0 / 0", "-", cells(pairs, "gae -> a2c")[3], "-"]
    assert cells(pairs[pairs.index("Variance") :], "reward_to_go -> gae") == ["2 / 0.5 / 0.25"]
    assert cells(pairs[pairs.index("Pairwise") :], "reward_to_go -> gae") == ["+0.50 / -0.25 / +0.00"]


def test_differences_with_enough_seeds_are_marked(tmp_path: Path):
    results = Results(tmp_path)
    add_final_runs(results, "CartPole-v1", ("vpg", "reward_to_go"), [100, 110, 120, 130, 140])
    add_final_runs(results, "CartPole-v1", ("vpg", "gae"), [200, 210, 220, 230, 240])
    add_final_runs(results, "CartPole-v1", ("a2c", ""), [20, 210, 220, 230, 440])
    text = written(results, tmp_path)
    assert cells(section(text, "Pairs"), "reward_to_go -> gae")[1] == "1 / 0"
    assert cells(section(text, "Pairs"), "reward_to_go -> gae")[3].startswith("**+0.20 [+")
    assert cells(section(text, "Pairs"), "gae -> a2c")[1] == "0 / 0"
    assert "Intervals over few seeds are too narrow" in text


def test_the_speed_of_learning(text: str):
    speeds = section(text, "Speed of learning")
    # Each curve is at half of the score after 500 timesteps, and at the score after 1000. 450 has the normalized score 0.9
    mean, learned, timesteps, seconds = cells(speeds, "CartPole-v1", "gae")
    assert mean.startswith(f"{0.75 * 1400 / 3:.0f} [")
    assert (learned, timesteps, seconds) == ("4 of 5", "1,000", "10.0")
    assert cells(speeds, "CartPole-v1", "reward_to_go")[1:] == ["1 of 4", "1,000", "10.0"]
    # 500 is reached in the middle
    assert cells(speeds, "CartPole-v1", "a2c")[1:] == ["2 of 2", "500", "4.0"]
    assert cells(speeds, "Acrobot-v1", "reward_to_go")[1:] == ["2 of 4", "500", "4.0"]


def test_a_study_with_other_seeds_is_not_complete(tmp_path: Path):
    results = Results(tmp_path)
    for setting in ("reward_to_go", "gae", "diverges"):
        add_final_runs(results, "CartPole-v1", ("vpg", setting), [1, 2, 3, 4])
    assert "28 of 40 runs have no score" in written(results, tmp_path)


def test_the_search_shows_what_is_selected_and_that_it_is_at_the_edge(text: str):
    search = section(text, "Learning rates")
    assert cells(search, "reward_to_go") == ["20", "**400***"]
    assert cells(search, "gae") == ["**400***", "20"]


def test_gradient_statistics(text: str):
    variance, snr, pairwise, _, seeds = cells(section(text, "Gradient statistics"), "gae")
    assert variance == "2 / 0.5 / 0.25"
    assert snr == "0.75 / 0.25 / 0.5"
    assert pairwise == "0.750 / 0.250 / 0.500"
    assert seeds == "1"
    # Two settings have no ranks to correlate
    assert cells(section(text, "Do better gradients mean better returns?"), "CartPole-v1, gae") == ["-", "-", "2"]


def test_failed_runs_are_rows_with_their_errors(text: str):
    failed = cells(section(text, "Failed runs"), "Acrobot-v1")
    assert failed == ["diverges", "final", "0", "ValueError: <critic> diverged"]


def test_numbers_are_right_aligned_and_texts_are_not(text: str):
    header, kinds = section(text, "Pairs").split("\n\n")[2].splitlines()[:2]
    assert dict(zip(header.strip("| ").split(" | "), kinds.strip("| ").split(" | "))) == {
        **{"pair": "---", "question": "---", "better / worse": "---:", "probability of improvement": "---:"},
        **{"CartPole-v1": "---:", "Acrobot-v1": "---:"},
    }
    cells = [["a", "- / 1", "2 [1, 3]", "-", "**1**", "1"], ["5", "2 / 1", "", "+3", "-4", "x"]]
    assert Table([*"abcdef"], cells).are_numbers() == [False, *[True] * 4, False]
    assert Table([*"ab"], []).are_numbers() == [False, True]


def test_texts_of_a_user_do_not_break_tables_and_lines_keep_their_colors(tmp_path: Path):
    x = np.linspace(0, 5, 50)
    lines = {f"line {i}": (x, np.stack([10 * i + x, 10 * i + x - 2, 10 * i + x + 2])) for i in range(6)}
    parts = [Table(["a|b"], [["|A|"]]), Chart("lines", "Six lines", "x", lines)]
    write_markdown("Report", [Section("All", parts)], tmp_path / "report.md")
    assert "| a\\|b |\n| --- |\n| \\|A\\| |" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "lines.png") as image:
        colors = np.array([color for _, color in image.convert("RGB").getcolors()])
    for i in range(6):
        expected = 255 * np.array(to_rgb(f"C{i}"))
        assert np.abs(colors - expected).max(axis=1).min() < 12


def test_runs_are_thin_lines_if_there_is_one_contestant(tmp_path: Path):
    results = whole_study(tmp_path)
    keep_settings(tmp_path, SETTINGS, {})
    for contestants, n_lines in ((["reward_to_go"], [3 + 4]), (["reward_to_go", "gae"], [3, 3])):
        page = write_report(STUDY, results, tmp_path, Selection(["CartPole-v1"], contestants)).read_text()
        charts = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
        (curves,) = (chart for chart in charts if chart["title"] == "CartPole-v1: return by timesteps")
        assert [len(line["y"]) for line in curves["lines"]] == n_lines
        assert [row[-1] for row in curves["lines"][0]["y"][3:]] in ([], [0, 100, 200, 500])
    x = np.arange(3.0)
    figure = draw_lines(Chart("one", "One line", "x", {"line": (x, np.arange(15.0).reshape(5, 3))}))
    thin, other, line = figure.axes[0].lines
    assert [one.get_ydata().tolist() for one in (thin, other, line)] == [[9, 10, 11], [12, 13, 14], [0, 1, 2]]


def test_every_picture_is_shown_opens_and_is_small(folder: Path, text: str):
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == sorted(path.name for path in folder.glob("*.png"))
    assert {"aggregate.png", "differences.png", "performance_profiles.png", "learning_curves_CartPole-v1_seconds.png"} < set(
        pictures
    )
    for name in pictures:
        with Image.open(folder / name) as image:
            assert len(image.convert("RGB").getcolors()) > 10
        assert (folder / name).stat().st_size < 150_000


def test_same_results_same_bytes(folder: Path, tmp_path: Path):
    written(whole_study(tmp_path), tmp_path)
    once, twice = (
        {path.name: path.read_bytes() for path in where.glob("report.*")}
        | {p.name: p.read_bytes() for p in where.glob("*.png")}
        for where in (folder, tmp_path)
    )
    assert once == twice


def test_a_part_of_a_study(tmp_path: Path):
    results = whole_study(tmp_path)
    keep_settings(tmp_path, SETTINGS, {})
    write_report(STUDY, results, tmp_path, Selection(["CartPole-v1"], ["gae", "a2c"]))
    text = (tmp_path / "report.md").read_text()
    for left_out in ("reward_to_go", "Acrobot-v1", "diverges"):
        assert left_out not in text[: text.index("## Study")]
    assert "Failed runs" not in headings(text)
    # Of a2c, three
    assert "The study is not complete: 3 of 10 runs have no score." in text
    # The mean of 450, 450 and 500
    assert cells(section(text, "Scores"), "gae")[0].startswith("467 [")
    assert "gae -> a2c" in section(text, "Pairs")
    # Without a whole pair of the study, all are compared with the first one
    write_report(STUDY, results, tmp_path, Selection(["CartPole-v1"], ["reward_to_go", "a2c"]))
    assert "reward_to_go -> a2c" in section((tmp_path / "report.md").read_text(), "Pairs")


def test_many_contestants_have_a_panel_each(tmp_path: Path):
    settings = {"settings": {f"{i}": {} for i in range(8)}, "algorithms": ["vpg"]}
    results = Results(tmp_path)
    for name in settings["settings"]:
        add_final_runs(results, "CartPole-v1", ("vpg", name), [1, 2])
    keep_settings(tmp_path, settings, {})
    write_report(make_study(settings), results, tmp_path)
    with Image.open(tmp_path / "learning_curves_CartPole-v1_timesteps.png") as image:
        assert image.width == 1000


def test_with_two_algorithms_of_this_package_gradients_have_the_names_of_settings(tmp_path: Path):
    names = ["a", "b", "c"]
    settings = {"algorithms": ["vpg", "vpg_lstm"], "settings": {name: {} for name in names}, "pairs": [["vpg a", "vpg b"]]}
    results = Results(tmp_path)
    for name in names:
        add_final_runs(results, "CartPole-v1", ("vpg", name), [1, 2])
    add_final_runs(results, "CartPole-v1", ("vpg_lstm", "a"), [1, 2])
    numbers = {name: [[i, i, i]] for i, name in enumerate(names, 1)}
    add_statistics(results, "CartPole-v1", "a", dict.fromkeys(("variance", "snr", *COSINES), numbers))
    keep_settings(tmp_path, settings, {})
    study = make_study({**settings, "statistics": {"policies": ["a"]}})
    write_report(study, results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    pairs = section(text, "Pairs")
    assert cells(pairs[pairs.index("Variance") :], "a -> b") == ["2 / 2 / 2"]
    assert cells(section(text, "Do better gradients mean better returns?"), "CartPole-v1, a")[-1] == "3"


def test_runs_whose_return_is_not_finite_have_no_score_and_do_not_break_the_page(tmp_path: Path):
    results = Results(tmp_path)
    add_final_runs(results, "CartPole-v1", ("a2c", ""), [100, 100, math.nan, math.inf])
    keep_settings(tmp_path, SETTINGS, {})
    page = write_report(STUDY, results, tmp_path).read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(re.search(r'id="data">(.*?)</script>', page)[1], parse_constant=refuse)
    text = (tmp_path / "report.md").read_text()
    assert "2 runs ended without a deterministic return: no episode ended in time, or it is not finite." in text
    assert cells(section(text, "Scores"), "a2c")[0] == "100"


def test_a_study_that_has_just_begun(tmp_path: Path):
    results = Results(tmp_path)
    begun = written(results, tmp_path)
    assert headings(begun) == ["How to read it", "Study"]
    assert "The study is not complete: 40 of 40 runs have no score." in begun
    add_final_runs(results, "CartPole-v1", ("a2c", ""), [1])
    one = written(results, tmp_path)
    expected = ["How to read it", "Scores", "Learning curves", "Speed of learning", "Performance profiles", "Runs", "Study"]
    assert headings(one) == expected
    # 1 of 0 to 500
    assert cells(section(one, "Scores"), "a2c") == ["1", "0.00", "1"]


# ---------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(folder: Path):
    """The report in Chromium, without network; ``page.messages`` has what it complains about and what it asks for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chromium.new_context(offline=True, viewport={"width": 1200, "height": 900})
        page = context.new_page()
        page.messages = []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.messages.append(request.url))
        page.goto((folder / "report.html").as_uri())
        yield page
        chromium.close()


def test_the_page_needs_one_file_and_has_no_errors(page, folder: Path):
    assert page.messages == [(folder / "report.html").as_uri()]
    assert page.locator("figure svg").count() == page.locator("figure").count() > 5


def test_tables_are_sorted_by_numbers_and_what_is_none_is_last(page):
    table = page.locator("table").first

    def column(i: int) -> list[str]:
        return [text.split(" [")[0] for text in table.locator(f"tbody td:nth-child({i})").all_inner_texts()]

    table.locator("th button").nth(1).click()
    assert column(2) == ["1000", "467", "150"]
    table.locator("th button").nth(1).click()
    assert column(2) == ["150", "467", "1000"]
    table.locator("th button").nth(2).click()
    assert column(3) == ["-90", "-250", "-"]
    table.locator("th button").nth(0).click()
    assert column(1) == ["reward_to_go", "gae", "a2c"]
    assert table.locator("th[aria-sort]").all_inner_texts() == ["contestant"]


def test_a_curve_tells_its_numbers_where_one_points_and_can_be_hidden(page):
    figure = page.locator("figure", has_text="CartPole-v1: return by timesteps")
    figure.scroll_into_view_if_needed()
    figure.locator("svg").hover()
    tip = figure.locator(".tip")
    assert re.fullmatch(r"timesteps 7\d\d(\.\d)?", tip.locator("b").inner_text())
    numbers = [re.fullmatch(r"(.*): (.*) \[(.*), (.*)\]", line).groups() for line in tip.locator("div").all_inner_texts()]
    assert [name for name, *_ in numbers] == ["a2c", "gae", "reward_to_go"]
    assert all(float(low) <= float(mean) <= float(high) for _, mean, low, high in numbers)
    figure.locator(".legend button", has_text="a2c").click()
    figure.locator("svg").hover(position={"x": 200, "y": 100})
    assert [line.split(":")[0] for line in tip.locator("div").all_inner_texts()] == ["gae", "reward_to_go"]
    page.mouse.move(0, 0)
    assert tip.is_hidden()


def test_thin_lines_belong_to_their_line(page, tmp_path: Path):
    chart = Chart("thin", "Thin lines", "x", {"line": (np.arange(3.0), np.arange(15.0).reshape(5, 3))})
    write_html("Thin", [Section("Curves", [chart])], tmp_path / "thin.html")
    other = page.context.new_page()
    other.goto((tmp_path / "thin.html").as_uri())
    assert other.locator("svg g path[fill=none]").count() == 3
    other.locator(".legend button").click()
    assert not other.locator("svg g path").first.is_visible()
    other.close()


def test_the_legend_shows_which_of_many_lines_is_which(page, tmp_path: Path):
    x, y = np.arange(3.0), np.ones((3, 3))
    chart = Chart("many", "Many lines", "x", {f"line {i}": (x, y + i) for i in range(12)})
    write_html("Many", [Section("Curves", [chart]), Section("More", [])], tmp_path / "many.html")
    other = page.context.new_page()
    other.goto((tmp_path / "many.html").as_uri())
    assert other.locator("nav a").all_inner_texts() == ["Curves", "More"]
    assert other.locator("path[stroke-dasharray]").count() == other.locator(".legend .dashed").count() == 2
    other.locator(".legend button", has_text="line 11").hover()
    assert other.locator("svg g[opacity='1']").count() == 1
    assert other.locator("svg g[opacity='0.1']").count() == 11
    other.mouse.move(0, 0)
    assert other.locator("svg g[opacity]").count() == 0
    other.close()


def test_text_from_runs_is_text(page):
    assert "ValueError: <critic> diverged" in page.locator("table").last.inner_text()
