"""The sections of a report on gradient statistics."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from sb3_vpg.study.rendering import Chart, Section, Table
from sb3_vpg.study.statistics import NO_VALUES, Findings, estimate

MOMENTS = ("start", "middle", "end")
COSINES = {"pairwise_cosine": "pairwise cosine", "cosine_with_reference": "cosine with the reference"}
EMPTY_CELL = "-"
#: Values by seed, for each measured setting and moment
Values = Mapping[tuple[str, str], pd.Series]


def policies(findings: Findings) -> Iterator[tuple[str, str]]:
    """:return: environments and policies with gradient statistics"""
    rows = findings.points[findings.points.phase == "statistics"]
    present = set(zip(rows.environment, rows.setting))
    for environment in findings.study.environments:
        yield from ((environment, policy) for policy in findings.study.statistics.policies if (environment, policy) in present)


def gradient_statistics(findings: Findings, environment: str, policy: str, metric: str) -> Values:
    """:return: a statistic; the moment is the nearest of start, middle and end of training"""
    rows = findings.points[(findings.points.phase == "statistics") & (findings.points.metric == metric)]
    rows = rows[(rows.environment == environment) & (rows.setting == policy)]
    moments = [MOMENTS[round(2 * timesteps / rows.timesteps.max())] for timesteps in rows.timesteps]
    groups = rows.groupby([rows.measured, pd.Series(moments, rows.index, dtype=str)])
    return {key: group.set_index("seed")["value"].sort_index() for key, group in groups}


def ratio_by_seed(values: pd.Series, of: pd.Series) -> pd.Series:
    """:return: ratios by seed, without those that are not positive and finite"""
    ratio = (values / of).dropna()
    return ratio[(ratio > 0) & np.isfinite(ratio)]


def variance_ratios(findings: Findings, environment: str, policy: str) -> tuple[str, Values]:
    """:return: the first setting that is measured, and ratios of the variances of all settings and its own"""
    variances = gradient_statistics(findings, environment, policy, "variance")
    first = next(name for name in findings.study.settings if any(name == setting for setting, _ in variances))
    return first, {key: ratio_by_seed(values, variances.get((first, key[1]), NO_VALUES)) for key, values in variances.items()}


def geometric_mean(values: pd.Series) -> float:
    """:return: the geometric mean; NaN if there are no values"""
    return float(np.exp(np.log(values).mean()))


def statistics_section(findings: Findings) -> Section:
    """Section with the gradient statistics at each policy: a table and a chart of both cosines."""
    parts: list[str | Table | Chart] = [
        "Gradients of the settings, measured with the same policies and episodes at the start, in the middle and at the end "
        "of training. Variance: trace of the covariance of the gradient of one update, as a ratio (geometric mean over "
        "seeds). It depends on the scale of the weights of grad log pi; the other columns do not, and are means over seeds. "
        "SNR: signal-to-noise ratio. Pairwise cosine: between the gradients of two batches. Cosine with the reference: "
        "between the gradient of one batch and the gradient of the reference on all other data. Intervals: from the lowest "
        "to the highest end of the 95 % bootstrap intervals of the seeds."
    ]
    for environment, policy in policies(findings):
        relative_to, ratios = variance_ratios(findings, environment, policy)
        columns = {f"variance / variance of {relative_to}": (ratios, geometric_mean, "{:.3g}")}
        for metric, label in (("snr", "SNR"), *COSINES.items()):
            values = gradient_statistics(findings, environment, policy, metric)
            columns[label] = (values, pd.Series.mean, "{:.3g}" if metric == "snr" else "{:.3f}")
        rows = []
        for name in findings.study.settings:
            if any(key[0] == name for key in ratios):
                n_seeds = max(len(values) for key, values in ratios.items() if key[0] == name)
                cells = [
                    " / ".join(
                        shape.format(summary(values[name, moment])) if len(values.get((name, moment), ())) else EMPTY_CELL
                        for moment in MOMENTS
                    )
                    for values, summary, shape in columns.values()
                ]
                rows.append([name, *cells, str(n_seeds)])
        parts += [
            f"**{environment}**, policies of {policy}. Numbers: start / middle / end.",
            Table(["setting", *columns, "seeds"], rows),
            *(cosine_chart(findings, environment, policy, metric) for metric in COSINES),
        ]
    return Section("Gradient statistics", parts)


def cosine_chart(findings: Findings, environment: str, policy: str, metric: str) -> Chart:
    """:return: chart of a cosine, by setting and moment"""
    mean, low, high = (gradient_statistics(findings, environment, policy, metric + end) for end in ("", "_low", "_high"))
    intervals: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in findings.study.settings:
        for moment in MOMENTS:
            if (name, moment) in mean:
                ends = (value[name, moment] for value in (mean, low, high))
                of_seeds, lowest, highest = (values.dropna() for values in ends)
                if len(of_seeds):
                    point = of_seeds.mean()
                    ends_of_all = (min([point, *lowest]), max([point, *highest]))
                    intervals.setdefault(name, {})[moment] = (point, *ends_of_all)
    title = f"{environment}, policies of {policy}: {COSINES[metric]}"
    return Chart(f"{metric}_{environment}_{policy}", title, COSINES[metric], intervals=intervals)


def steps_of_gradients(findings: Findings, pairs: list[tuple[str, str]]) -> Iterator[str | Table]:
    """:return: for each pair, changes of variance and pairwise cosine"""
    header, changes = ["pair", *(f"{environment}, {policy}" for environment, policy in policies(findings))], {}
    for before, after in pairs:
        cells = []
        for environment, policy in policies(findings):
            variance = gradient_statistics(findings, environment, policy, "variance")
            cosine = gradient_statistics(findings, environment, policy, "pairwise_cosine")
            texts = []
            for moment in MOMENTS:
                first, second = (before, moment), (after, moment)
                ratio = ratio_by_seed(variance.get(second, NO_VALUES), variance.get(first, NO_VALUES))
                change = (cosine.get(second, NO_VALUES) - cosine.get(first, NO_VALUES)).dropna()
                texts.append(
                    (
                        f"{geometric_mean(ratio):.2g}" if len(ratio) else EMPTY_CELL,
                        f"{change.mean():+.2f}" if len(change) else EMPTY_CELL,
                    )
                )
            cells.append([" / ".join(column) for column in zip(*texts)])
        changes[f"{before} -> {after}"] = list(zip(*cells))
    yield (
        "Variance of the gradient of one update: ratio (geometric mean over seeds) at start / middle / end, for each "
        "environment and policy. It is not informative for steps that change the scale of the weights of grad log pi "
        "(normalization, gamma^t, sum over trajectories): compare the cosines there."
    )
    yield Table(header, [[name, *texts[0]] for name, texts in changes.items()])
    yield "Pairwise cosine: difference at start / middle / end."
    yield Table(header, [[name, *texts[1]] for name, texts in changes.items()])


def rank_section(findings: Findings) -> Section:
    """
    Section with the rank correlation of gradient cosines and scores: do settings whose gradients agree more, with each other
    or with the reference, learn better?
    """
    rows = []
    for environment, policy in policies(findings):
        scores = findings.values(environment, findings.study.score)
        cosines = {metric: gradient_statistics(findings, environment, policy, metric) for metric in COSINES}
        both = [name for name in scores if all((name, "middle") in values for values in cosines.values())]
        ranks = pd.DataFrame(
            {
                **{metric: [values[name, "middle"].mean() for name in both] for metric, values in cosines.items()},
                "score": [estimate(scores[name]).mean for name in both],
            }
        ).rank()
        # Equal values have no ranks to correlate, and for two settings the correlation is always 1 or -1
        informative = len(both) > 2 and (ranks.nunique() > 1).all()
        cells = [f"{ranks[metric].corr(ranks['score']) + 0.0:.2f}" if informative else EMPTY_CELL for metric in COSINES]
        rows.append([f"{environment}, {policy}", *cells, str(len(both))])
    text = (
        "Spearman's rank correlation over settings, between each cosine in the middle of training (mean over seeds) and the "
        "score (interquartile mean over seeds). 1: settings whose gradients agree more, with each other or with the "
        "reference, always learn better. 0: no relation."
    )
    return Section(
        "Do better gradients mean better returns?",
        [text, Table(["environment, policies of", *COSINES.values(), "settings"], rows)],
    )
