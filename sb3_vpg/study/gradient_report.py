"""The sections of a report on gradient statistics."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd

from sb3_vpg.study.rendering import Chart, Section, Table
from sb3_vpg.study.statistics import NO_VALUES, Findings, estimate

MOMENTS = ("start", "middle", "end")
COSINES = {"pairwise_cosine": "pairwise cosine", "cosine_with_reference": "cosine with the reference"}
EMPTY_CELL = "-"
#: Below this part of the largest variance, in single precision, gradients consist of rounding errors
ROUNDING = 1e-12


def policies(findings: Findings) -> Iterator[tuple[str, str]]:
    """:return: environments and policies with gradient statistics"""
    rows = findings.points[findings.points.phase == "statistics"]
    present = set(zip(rows.environment, rows.setting))
    for environment in findings.study.environments:
        yield from ((environment, policy) for policy in findings.study.statistics.policies if (environment, policy) in present)


def gradient_statistics(findings: Findings, environment: str, policy: str) -> pd.DataFrame:
    """
    :return: the statistics (columns) of each measured setting, moment (first, middle or last measurement of a run) and
        seed. If a setting's gradients consist of rounding errors, as those of a time baseline if all episodes have the same
        return, then its variance is 0 and its other statistics are missing.
    """
    rows = findings.points[(findings.points.phase == "statistics") & (findings.points.measured != "")]
    rows = rows[(rows.environment == environment) & (rows.setting == policy)]
    times = rows.groupby("seed").timesteps
    is_start, is_end = rows.timesteps == times.transform("min"), rows.timesteps == times.transform("max")
    moments = np.select([is_start, is_end], [MOMENTS[0], MOMENTS[2]], MOMENTS[1])
    index = ["measured", "moment", "seed"]
    values = rows.assign(moment=moments).pivot(index=index, columns="metric", values="value")
    rounding = values.variance <= ROUNDING * values.groupby(["moment", "seed"]).variance.transform("max")
    return values.mask(rounding).assign(variance=values.variance.mask(rounding, 0.0))


def of_seeds(values: pd.DataFrame, metric: str, setting: str, moment: str) -> pd.Series:
    """:return: a statistic by seed, without missing values"""
    return values[metric].get((setting, moment), NO_VALUES).dropna()


def variance_ratios(values: pd.DataFrame, before: str, after: str, moment: str) -> pd.Series:
    """:return: ratios of two settings' variances by seed, without those where the first is 0"""
    first, second = (of_seeds(values, "variance", setting, moment) for setting in (before, after))
    return (second / first[first > 0]).dropna()


def medians(at_moment: Callable[[str], pd.Series], shape: str) -> str:
    """:return: the medians at all moments as text, with this format; zero without a minus sign"""
    texts = (format(values.median(), shape) if len(values) else EMPTY_CELL for values in map(at_moment, MOMENTS))
    return " / ".join(re.sub(r"^-(?=[0.]+$)", "+" if "+" in shape else "", text) for text in texts)


def statistics_section(findings: Findings) -> Section:
    """Section with the gradient statistics at each policy: a table and a chart of both cosines."""
    parts: list[str | Table | Chart] = [
        "Gradients of the settings, measured with the same policies and episodes at the start, in the middle and at the end "
        "of training: medians over seeds. The critic is that of these runs, and is not trained if their setting has none. "
        "Variance: trace of the covariance of the gradient of one update, as a ratio. It "
        "depends on the scale of the weights of grad log pi; the other columns do not. It is 0 if the gradients are no more "
        "than rounding errors, as with a time baseline if all episodes have the same return; such gradients have no "
        "direction. SNR: signal-to-noise ratio. Pairwise cosine: between the gradients of two batches. Cosine with the "
        "reference: between the gradient of one batch and the gradient of the reference on all other data. Intervals: from "
        "the lowest to the highest end of the 95 % bootstrap intervals of the seeds."
    ]
    for environment, policy in policies(findings):
        values = gradient_statistics(findings, environment, policy)
        measured = [name for name in findings.study.settings if name in values.index.levels[0]]
        columns: dict[str, tuple[Callable[[str, str], pd.Series], str]] = {
            f"variance / variance of {measured[0]}": (partial(variance_ratios, values, measured[0]), ".3g"),
            "SNR": (partial(of_seeds, values, "snr"), ".3g"),
            **{label: (partial(of_seeds, values, metric), ".3f") for metric, label in COSINES.items()},
        }
        rows = [
            [
                name,
                *(medians(partial(column, name), shape) for column, shape in columns.values()),
                str(values.loc[name].index.unique("seed").size),
            ]
            for name in measured
        ]
        parts += [
            f"**{environment}**, policies of {policy}. Numbers: start / middle / end.",
            Table(["setting", *columns, "seeds"], rows),
            *(cosine_chart(values, measured, environment, policy, metric) for metric in COSINES),
        ]
    return Section("Gradient statistics", parts)


def cosine_chart(values: pd.DataFrame, measured: list[str], environment: str, policy: str, metric: str) -> Chart:
    """:return: chart of a cosine, by setting that is measured and moment"""
    intervals: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in measured:
        for moment in MOMENTS:
            cosines, lowest, highest = (of_seeds(values, metric + end, name, moment) for end in ("", "_low", "_high"))
            if len(cosines):
                point = cosines.median()
                intervals.setdefault(name, {})[moment] = (point, min([point, *lowest]), max([point, *highest]))
    title = f"{environment}, policies of {policy}: {COSINES[metric]}"
    return Chart(f"{metric}_{environment}_{policy}", title, COSINES[metric], intervals=intervals)


def steps_of_gradients(findings: Findings, pairs: list[tuple[str, str]]) -> Iterator[str | Table]:
    """:return: for each pair, changes of variance and pairwise cosine"""
    tables = {
        f"{environment}, {policy}": gradient_statistics(findings, environment, policy)
        for environment, policy in policies(findings)
    }

    def changes(of_pair: Callable[[pd.DataFrame, str, str, str], pd.Series], shape: str) -> Table:
        rows = [
            [f"{before} -> {after}", *(medians(partial(of_pair, values, before, after), shape) for values in tables.values())]
            for before, after in pairs
        ]
        return Table(["pair", *tables], rows)

    def cosine_change(values: pd.DataFrame, before: str, after: str, moment: str) -> pd.Series:
        first, second = (of_seeds(values, "pairwise_cosine", setting, moment) for setting in (before, after))
        return (second - first).dropna()

    yield (
        "Variance of the gradient of one update: ratio at start / middle / end, for each environment and policy, median over "
        "seeds. It is not informative for steps that change the scale of the weights of grad log pi (normalization, gamma^t, "
        "sum over trajectories): compare the cosines there."
    )
    yield changes(variance_ratios, ".2g")
    yield "Pairwise cosine: difference at start / middle / end, median over seeds."
    yield changes(cosine_change, "+.2f")


def rank_section(findings: Findings) -> Section:
    """
    Section with the rank correlation of gradient cosines and scores: do settings whose gradients agree more, with each other
    or with the reference, learn better?
    """
    rows = []
    for environment, policy in policies(findings):
        of_contestants = findings.values(environment, findings.study.score)
        scores = {setting: of_contestants[name] for setting, name in findings.study.measured.items() if name in of_contestants}
        values = gradient_statistics(findings, environment, policy)
        cosines = {metric: {name: of_seeds(values, metric, name, "middle") for name in scores} for metric in COSINES}
        both = [name for name in scores if all(len(of_metric[name]) for of_metric in cosines.values())]
        ranks = pd.DataFrame(
            {
                **{metric: [of_metric[name].median() for name in both] for metric, of_metric in cosines.items()},
                "score": [estimate(scores[name]).mean for name in both],
            }
        ).rank()
        # Equal values have no ranks to correlate, and for two settings the correlation is always 1 or -1
        informative = len(both) > 2 and (ranks.nunique() > 1).all()
        cells = [f"{ranks[metric].corr(ranks['score']) + 0.0:.2f}" if informative else EMPTY_CELL for metric in COSINES]
        rows.append([f"{environment}, {policy}", *cells, str(len(both))])
    text = (
        "Spearman's rank correlation over settings, between each cosine in the middle of training (median over seeds) and the "
        "score (interquartile mean over seeds). 1: settings whose gradients agree more, with each other or with the "
        "reference, always learn better. 0: no relation."
    )
    return Section(
        "Do better gradients mean better returns?",
        [text, Table(["environment, policies of", *COSINES.values(), "settings"], rows)],
    )
