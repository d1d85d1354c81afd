"""
Statistics of a study's results, as recommended by Agarwal et al. (2021, https://arxiv.org/abs/2108.13264): interquartile means
over seeds, probabilities of improvement and performance profiles, with stratified bootstrap intervals. They are those of the
authors' library rliable, computed for all resamples at once.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import trim_mean

from sb3_vpg.study.study import Cell, Selection, Study

# Number of bootstrap resamples
REPETITIONS = 2000
#: Normalized score at which a run has learned the task
LEARNED = 0.9


class Estimate(NamedTuple):
    """A number, the ends of its 95 % interval, and the number of seeds."""

    mean: float
    low: float
    high: float
    n_seeds: int


def _searched(study: Study, runs: pd.DataFrame) -> pd.Series:
    """:return: whether a run belongs to the search, with a rate and a seed that the study names"""
    rates, seeds = study.search.learning_rates, study.seeds_of("search")
    return (runs.phase == "search") & runs.learning_rate.isin(rates) & runs.seed.isin(seeds)


def chosen_learning_rates(study: Study, runs: pd.DataFrame) -> dict[Cell, float]:
    """
    :param study: the study
    :param runs: the runs, see :data:`sb3_vpg.study.results.COLUMNS`
    :return: for each cell with a search, the learning rate with the highest mean score; the lowest one if several are equal.
        A rate with a failed run is chosen only if all have one.
    """
    search = runs[_searched(study, runs)]
    search = search.assign(score=search[study.score].fillna(-np.inf))
    cells = search.groupby(["environment", "algorithm", "setting"])
    return {cell: float(rows.groupby("learning_rate").score.mean().idxmax()) for cell, rows in cells}


class Findings:
    """
    The results as the sections of a report read them: runs and points, with the name of the contestant. Runs count only with
    seeds and learning rates that the study names, and after the search only with the rate that it selects now.

    :param study: the study
    :param runs: the file "runs", see :data:`sb3_vpg.study.results.COLUMNS`
    :param points: the file "points"
    :param selection: the part of the study that is reported; None for all of it
    """

    def __init__(self, study: Study, runs: pd.DataFrame, points: pd.DataFrame, selection: Selection | None = None):
        selection = selection or Selection(list(study.environments), list(study.contestants))
        chosen = chosen_learning_rates(study, runs)
        rates = pd.Series(
            [chosen.get(cell, np.nan) for cell in zip(runs.environment, runs.algorithm, runs.setting)], runs.index
        )
        selected = (runs.learning_rate == rates) | (rates.isna() & runs.learning_rate.isna())
        named = np.array([seed in study.seeds_of(phase) for phase, seed in zip(runs.phase, runs.seed)], dtype=bool)
        runs = runs[_searched(study, runs) | (selected & named)]
        names = {cell: name for name, cell in study.contestants.items()}
        runs, points = (
            frame.assign(contestant=[names.get(cell) for cell in zip(frame.algorithm, frame.setting)])
            for frame in (runs, points)
        )
        runs = runs[runs.environment.isin(selection.environments) & runs.contestant.isin(selection.contestants)]
        settings = {study.contestants[name][1] for name in selection.contestants}
        points = points[points.measured.isin({"", *settings})]
        self.study, self.selection = study, selection
        self.runs, self.points = runs, points.merge(runs[list(runs.columns[:6])])

    @cached_property
    def environments(self) -> list[str]:
        """Environments with final runs that have a score."""
        present = set(self.final.environment)
        return [name for name in self.study.environments if name in present]

    @cached_property
    def contestants(self) -> list[str]:
        """Contestants with final runs that have a score, the first of which is the reference."""
        present = set(self.final.contestant)
        return [name for name in self.study.contestants if name in present]

    @cached_property
    def final(self) -> pd.DataFrame:
        """Final runs that have a score."""
        return self.runs[(self.runs.phase == "final") & self.runs[self.study.score].notna()]

    def values(self, environment: str, column: str) -> dict[str, pd.Series]:
        """:return: values of a column of the final runs by seed, for each contestant"""
        rows = self.final[self.final.environment == environment].dropna(subset=column)
        groups = {name: group.set_index("seed")[column].sort_index() for name, group in rows.groupby("contestant")}
        return {name: groups[name] for name in self.contestants if name in groups}

    def score_range(self, environment: str) -> tuple[float, float]:
        """:return: the scores that are normalized to 0 and 1"""
        given = self.study.environments[environment].get("score_range")
        if given is not None:
            return tuple(given)
        scores = pd.concat(self.values(environment, self.study.score).values())
        low, high = scores.min(), scores.max()
        return (low, high) if low < high else (low - 1, high)

    def normalized(self) -> dict[str, np.ndarray]:
        """
        :return: normalized scores of each contestant that has runs in all environments, shape (seeds, environments), for the
            seeds that all environments have
        """
        columns: dict[str, dict[str, pd.Series]] = {name: {} for name in self.contestants}
        for environment in self.environments:
            low, high = self.score_range(environment)
            for name, scores in self.values(environment, self.study.score).items():
                columns[name][environment] = (scores - low) / (high - low)
        complete = {name: pd.DataFrame(of).dropna() for name, of in columns.items() if len(of) == len(self.environments)}
        return {name: frame.to_numpy() for name, frame in complete.items() if len(frame)}

    def _returns(self, environment: str) -> pd.DataFrame:
        """:return: the points of the learning curves of the final runs"""
        rows = self.points[self.points.environment == environment]
        return rows[(rows.metric == "return") & (rows.phase == "final")].dropna(subset="value")

    def curves(self, environment: str, axis: str, n_points: int = 60) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """
        :param environment: id of the environment
        :param axis: "timesteps" or "seconds"
        :param n_points: number of points of each curve
        :return: for each contestant x and y, shape (3 + seeds, points): the interquartile mean of the return, the ends of its
            interval, and the runs. Between the points of a run, returns are interpolated linearly; after its last, they stay.
        """
        lines = {}
        for name, of_contestant in self._returns(environment).groupby("contestant"):
            runs = [run.sort_values("timesteps") for _, run in of_contestant.groupby("seed")]
            first, last = max(run[axis].iloc[0] for run in runs), np.median([run[axis].iloc[-1] for run in runs])
            x = np.linspace(first, max(first, last), n_points)
            y = np.stack([np.interp(x, run[axis], run["value"]) for run in runs])
            lines[name] = (x, np.vstack([with_interval(iqm(y), iqm(resampled(y), axis=1)), y]))
        return {name: lines[name] for name in self.contestants if name in lines}

    def speeds(self, environment: str) -> dict[str, pd.DataFrame]:
        """
        :return: for each contestant and seed the mean return of the learning curve, and the timesteps and seconds until the
            curve has the normalized score :data:`LEARNED`; NaN if it never has
        """
        low, high = self.score_range(environment)
        speeds: dict[str, dict[int, list[float]]] = {}
        for (name, seed), run in self._returns(environment).groupby(["contestant", "seed"]):
            x, y = (run.sort_values("timesteps")[column].to_numpy() for column in ("timesteps", "value"))
            mean = np.interp(np.linspace(x[0], x[-1], 200), x, y).mean()
            learned = run[run["value"] >= low + LEARNED * (high - low)]
            speeds.setdefault(name, {})[seed] = [mean, learned.timesteps.min(), learned.seconds.min()]
        columns = ["mean_return", "timesteps", "seconds"]
        return {
            name: pd.DataFrame.from_dict(speeds[name], "index", columns=columns) for name in self.contestants if name in speeds
        }


def iqm(values: np.ndarray, axis: int | None = 0) -> np.ndarray:
    """:return: interquartile means; over all axes for None"""
    return trim_mean(values, 0.25, axis=axis)


def resampled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Stratified bootstrap: the columns are resampled independently.

    :param values: shape (seeds, columns)
    :param seed: seed of the random numbers
    :return: shape (repetitions, seeds, columns)
    """
    rows = np.random.default_rng(seed).integers(len(values), size=(REPETITIONS, *values.shape))
    return np.take_along_axis(values[None], rows, axis=1)


def with_interval(value: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """
    :param value: an estimate, shape (n,)
    :param resamples: the same of each bootstrap resample, shape (repetitions, n)
    :return: the estimate, and the ends of its 95 % percentile interval, shape (3, n)
    """
    return np.vstack([value, np.quantile(resamples, [0.025, 0.975], axis=0)])


def _estimate(value: np.ndarray, resamples: np.ndarray, n_seeds: int) -> Estimate:
    """:return: an estimate, with the interval of its bootstrap resamples, shape (repetitions,)"""
    mean, low, high = with_interval(value, resamples[:, None])[:, 0].tolist()
    return Estimate(mean, low, high, n_seeds)


def estimate(values: pd.Series) -> Estimate:
    """:return: interquartile mean and interval of one value for each seed"""
    x = values.to_numpy()
    return _estimate(iqm(x), iqm(resampled(x), axis=1), len(x))


def difference(before: pd.Series, after: pd.Series) -> Estimate | None:
    """:return: difference of the interquartile means, with its interval; None with fewer than two seeds"""
    if min(len(before), len(after)) < 2:
        return None
    x, y = before.to_numpy(), after.to_numpy()
    # The runs of both are independent
    resamples = iqm(resampled(y, seed=1), axis=1) - iqm(resampled(x, seed=2), axis=1)
    return _estimate(iqm(y) - iqm(x), resamples, min(len(x), len(y)))


def aggregates(normalized: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """:return: interquartile mean over environments and seeds of each contestant's normalized scores"""
    return {
        name: _estimate(iqm(scores, axis=None), iqm(resampled(scores).reshape(REPETITIONS, -1), axis=1), len(scores))
        for name, scores in normalized.items()
    }


def probability_of_improvement(before: np.ndarray, after: np.ndarray) -> Estimate:
    """
    :param before: scores of the first, shape (seeds, environments)
    :param after: scores of the second, shape (seeds, environments)
    :return: the probability that a run of the second has a higher score than a run of the first, mean over environments. Ties
        count one half.
    """

    def probability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        differences = y[..., :, None, :] - x[..., None, :, :]
        return np.mean((np.sign(differences) + 1) / 2, axis=(-3, -2, -1))

    # The runs of both are independent
    resamples = probability(resampled(before, seed=1), resampled(after, seed=2))
    return _estimate(probability(before, after), resamples, min(len(before), len(after)))


def performance_profiles(normalized: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    :return: thresholds of the normalized score, and for each contestant the fraction of runs above them with the ends of its
        interval, shape (3, thresholds)
    """
    values = np.concatenate([scores.ravel() for scores in normalized.values()])
    thresholds = np.linspace(min(0.0, values.min()), max(1.0, values.max()), 101)
    profiles = {}
    for name, scores in normalized.items():
        resamples = np.mean(resampled(scores)[..., None] > thresholds, axis=(1, 2))
        profiles[name] = with_interval(np.mean(scores[..., None] > thresholds, axis=(0, 1)), resamples)
    return thresholds, profiles
