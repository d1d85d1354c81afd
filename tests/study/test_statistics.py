"""Statistics of a study: numbers that can be checked by hand, and rliable's."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers.studies import add_final_runs, add_search, add_statistics
from rliable import library, metrics

from sb3_vpg.study import statistics
from sb3_vpg.study.gradient_report import MOMENTS, gradient_statistics, of_settings, policies, variance_ratios
from sb3_vpg.study.results import Measures, Point, Results
from sb3_vpg.study.statistics import Findings
from sb3_vpg.study.study import Run, Search, make_study

# "Acrobot-v1" first: the order of the report is the study's
STUDY = make_study(
    {
        "environments": {"Acrobot-v1": {"score_range": [0, 100]}, "CartPole-v1": {}},
        "algorithms": ["vpg", "ppo"],
        "settings": {"plain": {}, "clever": {}},
        "search": {"learning_rates": [0.01, 0.1]},
        "statistics": {"policies": ["plain"]},
    }
)


def findings_of(results: Results) -> Findings:
    return Findings(STUDY, results.frame("runs"), results.frame("points"))


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    estimate = statistics.estimate(pd.Series([8.0, 0, 2, 100, 4, 0, 6, 100]))
    assert estimate.mean == 5
    assert 0 <= estimate.low < 5 < estimate.high <= 100
    assert statistics.estimate(pd.Series([3.0] * 8)) == (3, 3, 3, 8)
    assert statistics.estimate(pd.Series([7.0])) == (7, 7, 7, 1)


def rliables(function, *scores):
    """Estimate and interval of rliable, which uses NumPy's global generator."""
    np.random.seed(0)  # noqa: NPY002
    arrays = scores[0] if len(scores) == 1 else list(scores)
    point, interval = library.get_interval_estimates({"": arrays}, lambda *x: np.array([function(*x)]), reps=500)
    return [point[""][0], *interval[""][:, 0]]


def test_intervals_are_those_of_rliable_up_to_the_random_numbers():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(8, 3))
    assert statistics.aggregates({"": x})[""][:3] == pytest.approx(rliables(metrics.aggregate_iqm, x), abs=0.08)
    assert statistics.probability_of_improvement(y, x)[:3] == pytest.approx(
        rliables(metrics.probability_of_improvement, x, y), abs=0.08
    )
    thresholds, profiles = statistics.performance_profiles({"": x})
    expected = rliables(lambda scores: np.mean(scores > thresholds[50]), x)
    assert profiles[""][:, 50] == pytest.approx(expected, abs=0.05)


def test_difference_of_interquartile_means():
    few, many = pd.Series([1.0, 1, 2, 2]), pd.Series([5.0, 5, 6, 6])
    found = statistics.difference(few, many)
    assert found.mean == 4
    assert 3 <= found.low <= 4 <= found.high <= 5
    same = statistics.difference(few, few)
    assert same.low < same.mean == 0 < same.high
    assert statistics.difference(few, pd.Series([1.0])) is None


def test_probability_of_improvement_counts_pairs_of_runs_and_halves_of_ties():
    before, after = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [3.0, 0.0]])
    # First environment: 2 > 1, 2 < 3, 3 > 1, 3 = 3; second environment: ties only
    found = statistics.probability_of_improvement(before, after)
    assert found.mean == (2.5 / 4 + 0.5) / 2
    assert found.low < found.mean < found.high
    assert found.n_seeds == 2


def test_performance_profile_is_the_fraction_of_runs_above():
    thresholds, profiles = statistics.performance_profiles({"a": np.array([[0.0, 0.5], [0.5, 1.0]])})
    assert (thresholds[0], thresholds[-1], len(thresholds)) == (0.0, 1.0, 101)
    assert profiles["a"][0][[0, 49, 51, 99, 100]].tolist() == [0.75, 0.75, 0.25, 0.25, 0.0]
    assert (profiles["a"][1] <= profiles["a"][0]).all()
    assert (profiles["a"][0] <= profiles["a"][2]).all()


def test_aggregate_is_over_normalized_scores_of_all_environments(tmp_path):
    results = Results(tmp_path)
    add_final_runs(results, "Acrobot-v1", ("vpg", "plain"), [20, 40, 60, 100])
    add_final_runs(results, "CartPole-v1", ("vpg", "plain"), [0, 2, 4, 10])
    add_final_runs(results, "CartPole-v1", ("vpg", "clever"), [5, 5])
    findings = findings_of(results)
    # Of CartPole-v1, the lowest and the highest score of all
    assert findings.score_range("CartPole-v1") == (0, 10)
    # 0, .2, .4, 1 and .2, .4, .6, 1: without two at each end .2, .4, .4, .6
    aggregates = statistics.aggregates(findings.normalized())
    assert aggregates["plain"].mean == pytest.approx(0.4)
    # Not in all environments
    assert list(aggregates) == ["plain"]
    assert findings.environments == ["Acrobot-v1", "CartPole-v1"]
    assert findings.contestants == ["plain", "clever"]


def test_equal_scores_of_all_have_a_range(tmp_path):
    results = Results(tmp_path)
    add_final_runs(results, "CartPole-v1", ("ppo", ""), [500, 500])
    findings = findings_of(results)
    assert findings.score_range("CartPole-v1") == (499, 500)
    assert findings.normalized()["ppo"].tolist() == [[1], [1]]


def test_learning_curves_by_steps_and_by_seconds(tmp_path):
    results = Results(tmp_path)
    add_final_runs(results, "CartPole-v1", ("ppo", ""), [10, 20])
    findings = findings_of(results)
    x, y = findings.curves("CartPole-v1", "timesteps", n_points=3)["ppo"]
    assert x.tolist() == [500, 750, 1000]
    assert y[0].tolist() == [7.5, 11.25, 15]
    assert y[3:].tolist() == [[5, 7.5, 10], [10, 15, 20]]
    x, y = findings.curves("CartPole-v1", "seconds", n_points=3)["ppo"]
    assert x.tolist() == [4, 7, 10]
    assert y[0].tolist() == [7.5, 11.25, 15]
    assert y[1].tolist() == [5, 7.5, 10]


def test_a_curve_begins_when_all_runs_have_points_and_ends_with_the_median_run(tmp_path):
    results = Results(tmp_path)
    for seed, (first, last) in enumerate([(1.0, 3.0), (2.0, 5.0), (1.0, 9.0)]):
        points = [Point(100, first, "return", "", 0.0), Point(200, last, "return", "", 1.0)]
        results.add(Run("final", "CartPole-v1", "ppo", "", seed), Measures(200, last, last, 1.0, 1.0, 1.0, 1.0), points)
    x, y = findings_of(results).curves("CartPole-v1", "seconds", n_points=4)["ppo"]
    assert x.tolist() == [2, 3, 4, 5]
    # At 3 seconds 1, 1/3, 1/4; after its end, a run keeps its return
    assert y[0][1] == pytest.approx((1 + 1 / 3 + 1 / 4) / 3)


def test_the_search_selects_the_best_mean_and_failed_rates_last(tmp_path):
    results = Results(tmp_path)
    add_search(results, "CartPole-v1", "plain", {0.01: [1, 5], 0.1: [2, 3]})
    add_search(results, "CartPole-v1", "clever", {0.1: [1]})
    results.add(Run("search", "CartPole-v1", "vpg", "clever", 1001, 0.01), Measures(), [], "it diverged")
    results.add(Run("search", "CartPole-v1", "vpg", "clever", 1000, 0.01), Measures(10, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0), [])
    assert statistics.chosen_learning_rates(STUDY, results.frame("runs")) == {
        ("CartPole-v1", "vpg", "plain"): 0.01,
        ("CartPole-v1", "vpg", "clever"): 0.1,
    }


def test_runs_count_with_the_rate_that_is_selected_now(tmp_path):
    results = Results(tmp_path)
    # 0.5 is no longer a rate of the study
    add_search(results, "CartPole-v1", "plain", {0.01: [1], 0.1: [2], 0.5: [3]})
    for rate in (0.01, 0.1):
        variances = {"plain": [[rate, rate, rate]]}
        add_statistics(results, "CartPole-v1", "plain", {"variance": variances}, learning_rate=rate)
    add_final_runs(results, "CartPole-v1", ("vpg", "plain"), [7, 7], learning_rate=0.01)
    add_final_runs(results, "CartPole-v1", ("vpg", "plain"), [9], learning_rate=0.1)
    add_final_runs(results, "CartPole-v1", ("ppo", ""), [3])
    findings = findings_of(results)
    assert {name: list(scores) for name, scores in findings.values("CartPole-v1", "deterministic_return").items()} == {
        "plain": [9],
        "ppo": [3],
    }
    assert (findings.points.metric == "return").sum() == 4
    values = gradient_statistics(findings, "CartPole-v1", "plain")
    assert of_settings(values, "variance", ["plain"]).plain["start"].tolist() == [0.1]


def test_runs_of_left_out_rates_and_seeds_do_not_count(tmp_path):
    results = Results(tmp_path)
    add_search(results, "CartPole-v1", "plain", {0.01: [1], 0.1: [2]})
    add_final_runs(results, "CartPole-v1", ("vpg", "plain"), [9, 8, 7], learning_rate=0.1)
    add_final_runs(results, "CartPole-v1", ("vpg", "clever"), [5, 6, 7])
    study = replace(STUDY, search=Search(), first_seed=1, seeds=2)
    findings = Findings(study, results.frame("runs"), results.frame("points"))
    assert findings.final.deterministic_return.tolist() == [6, 7]
    assert not (findings.runs.phase == "search").any()


def test_seeds_of_search_and_statistics_that_are_left_out_do_not_count(tmp_path):
    results = Results(tmp_path)
    # The second seed would select 0.01
    add_search(results, "CartPole-v1", "plain", {0.01: [1, 9], 0.1: [2, 3]})
    variances = {"plain": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]}
    add_statistics(results, "CartPole-v1", "plain", {"variance": variances}, learning_rate=0.1)
    study = replace(STUDY, search=replace(STUDY.search, seeds=1), statistics=replace(STUDY.statistics, seeds=1))
    assert set(statistics.chosen_learning_rates(study, results.frame("runs")).values()) == {0.1}
    findings = Findings(study, results.frame("runs"), results.frame("points"))
    assert set(findings.runs[findings.runs.phase == "statistics"].seed) == {0}
    assert (findings.runs.phase == "search").sum() == 2


@pytest.mark.parametrize("times", [[(0, 5200, 9000), (0, 5100, 16000)], [(0, 4000, 5000)]], ids=str)
def test_each_run_has_a_start_a_middle_and_an_end(tmp_path, times: list[tuple[int, int, int]]):
    results = Results(tmp_path)
    for seed, of_seed in enumerate(times):
        points = [Point(timesteps, 1.0, "variance", "plain", float(i)) for i, timesteps in enumerate(of_seed, 1)]
        results.add(Run("statistics", "CartPole-v1", "vpg", "plain", seed), Measures(of_seed[-1], 1.0, 1.0), points)
    values = gradient_statistics(findings_of(results), "CartPole-v1", "plain")
    variances = of_settings(values, "variance", ["plain"]).plain
    assert [variances[moment].tolist() for moment in MOMENTS] == [[i] * len(times) for i in (1, 2, 3)]


def test_variances_are_ratios_at_the_same_policy(tmp_path):
    results = Results(tmp_path)
    variances = {"plain": [[1, 2, 0], [1, 2, 4]], "clever": [[4, 1, 1], [1, 1, 2]]}
    add_statistics(results, "CartPole-v1", "plain", {"variance": variances})
    values = gradient_statistics(findings_of(results), "CartPole-v1", "plain")
    there, back = ("plain", "clever"), ("clever", "plain")
    ratios = variance_ratios(values, [there, back])
    assert ratios[there]["start"].to_dict() == {0: 4, 1: 1}
    # Of the first seed, 1 / 0 is left out
    assert ratios[there]["end"].dropna().to_dict() == {1: 0.5}
    assert ratios[back]["end"].to_dict() == {0: 0, 1: 2}
    of_both = of_settings(values, "variance_low", ["clever", "not measured"])
    assert of_both.clever["start"].to_dict() == {0: 3.9, 1: 0.9}
    assert of_both["not measured"].isna().all()


def test_gradients_of_rounding_errors_have_no_variance_and_no_direction(tmp_path):
    results = Results(tmp_path)
    metrics = {
        "variance": {"plain": [[1, 1, 1e-20]], "clever": [[1e-7, 1e-20, 1e-20]]},
        "pairwise_cosine": {"plain": [[0.5, 0.5, 0.5]], "clever": [[0.9, 0.9, 0.9]]},
    }
    add_statistics(results, "CartPole-v1", "plain", metrics)
    values = gradient_statistics(findings_of(results), "CartPole-v1", "plain")
    ratios = variance_ratios(values, [("plain", "clever")])["plain", "clever"]
    # Small gradients are not rounding errors if those of all settings are small, as with a nearly deterministic policy
    assert [ratios[moment].tolist() for moment in MOMENTS] == [[1e-7], [0], [1]]
    cosines = of_settings(values, "pairwise_cosine", ["clever"]).clever
    assert [cosines[moment].dropna().tolist() for moment in MOMENTS] == [[0.9], [], [0.9]]


def test_gradients_are_those_of_the_algorithm_that_is_measured_now(tmp_path):
    results = Results(tmp_path)
    add_statistics(results, "CartPole-v1", "plain", {"variance": {"plain": [[1, 1, 1]]}})
    study = replace(STUDY, algorithms=["vpg_lstm", "vpg"], search=Search())
    assert list(policies(Findings(study, results.frame("runs"), results.frame("points")))) == []
    points = [Point(0, 1.0, "variance", "plain", 5.0)]
    results.add(Run("statistics", "CartPole-v1", "vpg_lstm", "plain", 0), Measures(0, 1.0, 1.0), points)
    findings = Findings(study, results.frame("runs"), results.frame("points"))
    assert list(policies(findings)) == [("CartPole-v1", "plain")]
    assert gradient_statistics(findings, "CartPole-v1", "plain").variance.tolist() == [5.0]
