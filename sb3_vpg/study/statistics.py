"""
Statistics of a study's results: interquartile means over seeds with stratified bootstrap intervals, as recommended by Agarwal
et al. (2021, https://arxiv.org/abs/2108.13264), computed with their library rliable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rliable import library, metrics
from scipy.stats import trim_mean

from sb3_vpg.study.study import COLUMNS, PHASES

MOMENTS = ["start", "middle", "end"]
COSINES = {"pairwise_cosine": "pairwise cosine", "cosine_with_reference": "cosine with the reference"}

# Default number of bootstrap resamples
REPETITIONS = 2000

EMPTY_CELL = "-"
NO_VALUES = pd.Series(dtype=np.float64)


class Estimate(NamedTuple):
    """An interquartile mean, the ends of its 95 % interval, and the number of seeds."""

    mean: float
    low: float
    high: float
    n_seeds: int


@dataclass(frozen=True)
class Findings:
    """
    The validated results, as the sections of a report read them.

    :param rows: the tidy table, without rows that have no value
    :param score_ranges: for each environment, the returns with the normalized scores 0 and 1, in the order of the report
    :param formulations: names of the formulations, in the order of the report
    :param first: the formulation with which the others are compared
    :param repetitions: number of bootstrap resamples
    """

    rows: pd.DataFrame
    score_ranges: Mapping[str, tuple[float, float]]
    formulations: Sequence[str]
    first: str
    repetitions: int

    def values(self, phase: str, metric: str, environment: str, *further: str) -> dict[Any, pd.Series]:
        """
        :param phase: phase of the runs
        :param metric: name of the metric
        :param environment: id of the environment
        :param further: columns to group by, in addition to the formulation
        :return: values of the metric by seed, for each formulation or each tuple of formulation and further columns
        """
        rows = self.rows.query("phase == @phase and metric == @metric and environment == @environment")
        groups = rows.groupby(["formulation", *further] if further else "formulation")
        return {key: group.set_index("seed")["value"].sort_index() for key, group in groups}

    def normalized(self) -> dict[str, np.ndarray]:
        """
        :return: normalized scores of each formulation that has runs in all environments, shape (seeds, environments), for the
            seeds that all environments have
        """
        values = {environment: self.values("final", "final_return", environment) for environment in self.score_ranges}
        scores = {}
        for formulation in self.formulations:
            columns = {
                environment: (values[environment].get(formulation, NO_VALUES) - low) / (high - low)
                for environment, (low, high) in self.score_ranges.items()
            }
            complete = pd.DataFrame(columns).dropna().to_numpy()
            if len(complete):
                scores[formulation] = complete
        return scores


def validate_results(
    results: pd.DataFrame, score_ranges: Mapping[str, tuple[float, float]], first: str | None
) -> pd.DataFrame:
    """
    :return: the rows that have a value
    :raises ValueError: see ``write_report``
    """
    if set(results.columns) != set(COLUMNS):
        wrong = sorted(set(results.columns).symmetric_difference(COLUMNS))
        raise ValueError(f"the results have the columns {list(results.columns)}, not {COLUMNS}: {wrong}")
    for column, known in [("phase", PHASES), ("environment", list(score_ranges))]:
        unknown = sorted(set(results[column]) - set(known))
        if unknown:
            raise ValueError(f"the results have {column} {unknown}; known: {known}")
    if first is not None and first not in set(results["formulation"]):
        raise ValueError(f"first={first!r} is not a formulation of the results: {list(results['formulation'].unique())}")
    for environment, (low, high) in score_ranges.items():
        if not low < high:
            raise ValueError(f"the score range of {environment} must be increasing, not {low, high}")
    keys = [column for column in COLUMNS if column != "value"]
    duplicates = results[results.duplicated(keys)]
    if len(duplicates):
        raise ValueError(f"the results have a duplicate row: {duplicates.iloc[0][keys].to_dict()}")
    rows = results.dropna(subset="value")
    final = rows.query("phase == 'final'")
    if not (final["metric"] == "final_return").any():
        raise ValueError("the results have no final rows: phase 'final' with metric 'final_return' and a value")
    for (environment, formulation), rates in final.groupby(["environment", "formulation"])["learning_rate"]:
        if rates.nunique() > 1:
            raise ValueError(f"final runs of {formulation} in {environment} have several learning rates: {rates.unique()}")
    return rows


# Estimates


@contextmanager
def seeded() -> Iterator[None]:
    """
    Context with a fixed seed of NumPy's global generator, which rliable uses even if ``random_state`` is given. The state of
    the generator is restored at the end.
    """
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def bootstrap(scores: np.ndarray, function: Callable[[np.ndarray], np.ndarray], repetitions: int) -> np.ndarray:
    """
    Stratified bootstrap: the columns of the scores are resampled independently.

    :param scores: shape (seeds, columns)
    :param function: maps such an array to one of shape (n,)
    :param repetitions: number of resamples
    :return: the function of the scores, and the lower and upper ends of its 95 % percentile intervals, shape (3, n)
    """
    with seeded():
        points, intervals = library.get_interval_estimates({"": scores}, function, reps=repetitions)
    return np.vstack([points[""], intervals[""]])


def interquartile_means(columns: Mapping[Any, np.ndarray], repetitions: int) -> dict[Any, Estimate]:
    """
    :param columns: arrays with one value per seed; the number of seeds may differ
    :param repetitions: number of bootstrap resamples
    :return: interquartile mean and interval of each array
    """
    estimates = {}
    for n_seeds in {len(column) for column in columns.values()}:
        keys = [key for key, column in columns.items() if len(column) == n_seeds]
        scores = np.stack([columns[key] for key in keys], axis=1)
        points_and_ends = bootstrap(scores, lambda sample: trim_mean(sample, 0.25, axis=0), repetitions)
        for key, (mean, low, high) in zip(keys, points_and_ends.T):
            estimates[key] = Estimate(mean, low, high, n_seeds)
    return estimates


def final_returns(findings: Findings, environment: str) -> dict[Any, Estimate]:
    """:return: estimate of the final return of each formulation that has final runs in the environment"""
    values = findings.values("final", "final_return", environment)
    return interquartile_means({key: series.to_numpy() for key, series in values.items()}, findings.repetitions)


def aggregates(findings: Findings) -> dict[str, Estimate]:
    """
    :return: interquartile mean of the normalized scores over seeds and environments, for each formulation with final runs in
        all environments
    """
    estimates = {}
    for formulation, scores in findings.normalized().items():
        point_and_ends = bootstrap(scores, lambda sample: np.array([metrics.aggregate_iqm(sample)]), findings.repetitions)
        mean, low, high = point_and_ends[:, 0]
        estimates[formulation] = Estimate(mean, low, high, len(scores))
    return estimates


def learning_rates(findings: Findings, environment: str) -> dict[str, float]:
    """:return: learning rate of the final runs of each formulation"""
    rows = findings.rows.query("phase == 'final' and environment == @environment")
    return dict(rows.groupby("formulation")["learning_rate"].first())


def gradient_statistics(findings: Findings, environment: str, metric: str) -> dict[tuple[str, str], pd.Series]:
    """
    :return: values by seed for each pair of formulation and moment. The moment is the nearest of start, middle and end of
        training.
    """
    budget = findings.rows.query("environment == @environment")["timesteps"].max()
    values = findings.values("statistics", metric, environment, "timesteps")
    moments: dict[tuple[str, str], pd.Series] = {}
    for (formulation, timesteps), series in values.items():
        key = (formulation, MOMENTS[round(2 * timesteps / budget)])
        moments[key] = pd.concat([moments[key], series]) if key in moments else series
    return moments


def variance_ratios(findings: Findings, environment: str) -> tuple[str, dict[tuple[str, str], pd.Series]]:
    """
    :return: the formulation whose variance is the denominator, and the ratios at the same policies by seed, without those that
        are not positive and finite
    """
    variances = gradient_statistics(findings, environment, "variance")
    measured = {formulation for formulation, _ in variances}
    candidates = [findings.first, *findings.formulations]
    relative_to = next((formulation for formulation in candidates if formulation in measured), findings.first)
    ratios = {}
    for (formulation, moment), variance in variances.items():
        ratios[formulation, moment] = ratio_by_seed(variance, variances.get((relative_to, moment), NO_VALUES))
    return relative_to, ratios


def ratio_by_seed(values: pd.Series, of: pd.Series) -> pd.Series:
    """:return: ratios by seed, without those that are not positive and finite"""
    ratio = (values / of).dropna()
    return ratio[(ratio > 0) & np.isfinite(ratio)]
