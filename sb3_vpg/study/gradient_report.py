"""The sections of a report on gradient statistics."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from sb3_vpg.study.rendering import Chart, Section, Table
from sb3_vpg.study.statistics import Findings, estimate

MOMENTS = ("start", "middle", "end")
COSINES = {"pairwise_cosine": "pairwise cosine", "cosine_with_reference": "cosine with the reference"}
EMPTY_CELL = "-"
#: Below this part of the largest variance, in single precision, gradients consist of rounding errors
ROUNDING = 1e-12


def policies(findings: Findings) -> Iterator[tuple[str, str]]:
    """:return: environments and policies with gradient statistics"""
    rows = findings.points[findings.points.phase == "statistics"]
    present, measured = set(zip(rows.environment, rows.contestant)), findings.study.measured
    for environment, policy in itertools.product(findings.study.environments, findings.study.statistics.policies):
        if (environment, measured.get(policy)) in present:
            yield environment, policy


def gradient_statistics(findings: Findings, environment: str, policy: str) -> pd.DataFrame:
    """
    :return: the statistics (columns) of each measured setting, moment (first, middle or last measurement of a run) and
        seed. If a setting's gradients consist of rounding errors, as those of a time baseline if all episodes have the same
        return, then its variance is 0 and its other statistics are missing.
    """
    rows = findings.points[(findings.points.phase == "statistics") & (findings.points.measured != "")]
    rows = rows[(rows.environment == environment) & (rows.contestant == findings.study.measured[policy])]
    times = rows.groupby("seed").timesteps
    is_start, is_end = rows.timesteps == times.transform("min"), rows.timesteps == times.transform("max")
    moments = np.select([is_start, is_end], [MOMENTS[0], MOMENTS[2]], MOMENTS[1])
    index = ["measured", "moment", "seed"]
    values = rows.assign(moment=moments).pivot(index=index, columns="metric", values="value")
    rounding = values.variance <= ROUNDING * values.groupby(["moment", "seed"]).variance.transform("max")
    return values.mask(rounding).assign(variance=values.variance.mask(rounding, 0.0))


def of_settings(values: pd.DataFrame, metric: str, settings: Iterable[str]) -> pd.DataFrame:
    """:return: a statistic at each moment and seed (rows) of these settings (columns); NaN where it is missing"""
    return values[metric].unstack("measured").reindex(columns=list(settings))


def variance_ratios(values: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """:return: for each pair of settings the second's variance divided by the first's; NaN where the first is 0"""
    variances = of_settings(values, "variance", dict.fromkeys(itertools.chain.from_iterable(pairs)))
    return pd.DataFrame({(a, b): variances[b] / variances[a].where(variances[a] > 0) for a, b in pairs}, variances.index)


def medians(values: pd.DataFrame, shape: str) -> list[str]:
    """:return: for each column the medians at all moments as text, with this format; zero without a minus sign"""
    texts = values.groupby("moment").median().reindex(MOMENTS).map(lambda x: EMPTY_CELL if pd.isna(x) else format(x, shape))
    return [re.sub(r"-(?=[0.]+( |$))", "+" if "+" in shape else "", " / ".join(texts[name])) for name in texts]


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
        columns = {
            f"variance / variance of {measured[0]}": medians(
                variance_ratios(values, [(measured[0], name) for name in measured]), ".3g"
            ),
            "SNR": medians(of_settings(values, "snr", measured), ".3g"),
            **{label: medians(of_settings(values, metric, measured), ".3f") for metric, label in COSINES.items()},
            "seeds": [str(values.loc[name].index.unique("seed").size) for name in measured],
        }
        parts += [
            f"**{environment}**, policies of {policy}. Numbers: start / middle / end.",
            Table(["setting", *columns], list(zip(measured, *columns.values()))),
            *(cosine_chart(values, measured, environment, policy, metric) for metric in COSINES),
        ]
    return Section("Gradient statistics", parts)


def cosine_chart(values: pd.DataFrame, measured: list[str], environment: str, policy: str, metric: str) -> Chart:
    """:return: chart of a cosine, by setting that is measured and moment"""
    groups = values.groupby(["measured", "moment"])
    ends = groups.agg({metric: "median", f"{metric}_low": "min", f"{metric}_high": "max"}).dropna()
    intervals: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, moment in itertools.product(measured, MOMENTS):
        if (name, moment) in ends.index:
            point, low, high = ends.loc[(name, moment)]
            intervals.setdefault(name, {})[moment] = (point, min(point, low), max(point, high))
    title = f"{environment}, policies of {policy}: {COSINES[metric]}"
    return Chart(f"{metric}_{environment}_{policy}", title, COSINES[metric], intervals=intervals)


def steps_of_gradients(findings: Findings, pairs: list[tuple[str, str]]) -> Iterator[str | Table]:
    """:return: for each pair, changes of variance and pairwise cosine"""
    pairs = list(dict.fromkeys(pairs))
    names, ratios, differences = [f"{before} -> {after}" for before, after in pairs], {}, {}
    for environment, policy in policies(findings):
        values = gradient_statistics(findings, environment, policy)
        cosines = of_settings(values, "pairwise_cosine", findings.study.settings)
        changes = pd.DataFrame({(a, b): cosines[b] - cosines[a] for a, b in pairs}, cosines.index)
        ratios[f"{environment}, {policy}"] = medians(variance_ratios(values, pairs), ".2g")
        differences[f"{environment}, {policy}"] = medians(changes, "+.2f")
    yield (
        "Variance of the gradient of one update: ratio at start / middle / end, for each environment and policy, median over "
        "seeds. It is not informative for steps that change the scale of the weights of grad log pi (normalization, gamma^t, "
        "sum over trajectories): compare the cosines there."
    )
    yield Table(["pair", *ratios], list(zip(names, *ratios.values())))
    yield "Pairwise cosine: difference at start / middle / end, median over seeds."
    yield Table(["pair", *differences], list(zip(names, *differences.values())))


def rank_section(findings: Findings) -> Section:
    """
    Section with the rank correlation of gradient cosines and scores: do settings whose gradients agree more, with each other
    or with the reference, learn better?
    """
    rows = []
    for environment, policy in policies(findings):
        scores = findings.values(environment, findings.study.score)
        means = {setting: estimate(scores[name]).mean for setting, name in findings.study.measured.items() if name in scores}
        middle = gradient_statistics(findings, environment, policy).query("moment == 'middle'")
        both = middle.groupby("measured")[[*COSINES]].median().assign(score=pd.Series(means, dtype=float)).dropna()
        # NaN if there are fewer than three settings, or all have the same value
        correlations = both.corr("spearman", min_periods=3).score
        cells = [EMPTY_CELL if pd.isna(correlations[metric]) else f"{correlations[metric] + 0.0:.2f}" for metric in COSINES]
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
