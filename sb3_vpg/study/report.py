"""
Write the report of an ablation study: a markdown file with tables, and plots.

Returns are aggregated as recommended by Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (https://arxiv.org/abs/2108.13264), with their library rliable: interquartile means over seeds with stratified
bootstrap intervals, and performance profiles.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from rliable import library
from scipy.stats import trim_mean

from sb3_vpg.study.drawing import (
    COLOR,
    GRAY,
    MEDIUM,
    SMALL,
    add_seed_counts,
    digits_for,
    file_name,
    format_estimate,
    format_number,
    format_range,
    save_figure,
    small_multiples,
    table,
)
from sb3_vpg.study.statistics import (
    COSINES,
    EMPTY_CELL,
    MOMENTS,
    NO_VALUES,
    REPETITIONS,
    Estimate,
    Findings,
    aggregates,
    final_returns,
    gradient_statistics,
    interquartile_means,
    learning_rates,
    ratio_by_seed,
    seeded,
    validate_results,
    variance_ratios,
)


def final_section(
    findings: Findings, estimates: Mapping[str, Mapping[str, Estimate]], aggregate_scores: Mapping[str, Estimate]
) -> str:
    """
    Section with final returns by formulation and environment, and aggregate scores.

    :param findings: the results
    :param estimates: results of ``final_returns`` for each environment
    :param aggregate_scores: result of ``aggregates``
    """
    rates = {environment: learning_rates(findings, environment) for environment in findings.score_ranges}
    rows = []
    for formulation in findings.formulations:
        texts, n_seeds = [], []
        for environment, (low, high) in findings.score_ranges.items():
            estimate = estimates[environment].get(formulation)
            n_seeds.append(estimate.n_seeds if estimate else 0)
            rate = rates[environment].get(formulation)
            texts.append(f"{format_estimate(estimate, high - low)} at {rate:g}" if estimate else EMPTY_CELL)
        if max(n_seeds) == 0:
            continue
        aggregate = aggregate_scores.get(formulation)
        texts.append(format_estimate(aggregate, 1.0) if aggregate else EMPTY_CELL)
        n_seeds.append(aggregate.n_seeds if aggregate else 0)
        rows.append([formulation, *add_seed_counts(texts, n_seeds)])
    ranges = ", ".join(f"{environment} {low:g} to {high:g}" for environment, (low, high) in findings.score_ranges.items())
    text = (
        "Mean return of the training episodes in the last tenth of the budget: interquartile mean over seeds [95 % interval] "
        "with the learning rate that the search selected. Normalized: interquartile mean of the normalized scores over all "
        f"environments and seeds. These returns have the scores 0 and 1: {ranges}. "
        "Formulations without runs in all environments have no normalized score."
    )
    missing = [environment for environment in findings.score_ranges if not estimates[environment]]
    if missing:
        text += f" No final runs yet: {', '.join(missing)}."
    return f"{text}\n\n{table(['', *findings.score_ranges, 'normalized', 'seeds'], rows)}"


def aggregate_section(estimates: Mapping[str, Estimate], folder: Path) -> str:
    """
    Section with the aggregate score of each formulation, drawn as an interval.

    :param estimates: result of ``aggregates``
    :param folder: folder of the report
    """
    if not estimates:
        return "No formulation has final runs in all environments yet."
    figure = Figure(figsize=(8, 0.8 + 0.22 * len(estimates)), layout="constrained")
    axes = figure.subplots()
    # Margins between the bars and the frame
    axes.use_sticky_edges = False
    for row, estimate in enumerate(estimates.values()):
        axes.barh(row, estimate.high - estimate.low, left=estimate.low, height=0.7, color=COLOR, alpha=0.5)
        axes.vlines(estimate.mean, row - 0.35, row + 0.35, color="black", linewidth=1.5)
    axes.set_yticks(range(len(estimates)), [f"{name}, n = {e.n_seeds}" for name, e in estimates.items()], fontsize=SMALL + 1)
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=SMALL + 1)
    axes.set_xlabel("normalized score, interquartile mean and 95 % interval", fontsize=MEDIUM)
    axes.grid(axis="x", alpha=0.3)
    text = (
        "The normalized scores of the table above, with their intervals; n is the number of seeds of each environment. "
        "Intervals reflect the variation between seeds, for these environments."
    )
    return f"{text}\n\n{save_figure(figure, 'Normalized scores', folder / 'aggregate.png')}"


def profile_section(findings: Findings, folder: Path) -> str:
    """Section with performance profiles (Agarwal et al., 2021, section 4.2)."""
    scores = findings.normalized()
    if not scores:
        return "No formulation has final runs in all environments yet."
    thresholds = np.linspace(0.0, max(1.0, max(np.max(array) for array in scores.values())), 101)

    def shares_above(sample: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.mean(sample[..., None] > at, axis=(0, 1))

    lines = {}
    for formulation, array in scores.items():
        with seeded():
            points, intervals = library.create_performance_profile(
                {"": array}, thresholds, custom_profile_func=shares_above, reps=findings.repetitions
            )
        lines[formulation] = (thresholds, np.vstack([points[""], intervals[""]]), len(array))
    figure, _ = small_multiples(lines, findings.first, "Fraction of runs with a normalized score above x")
    figure.supxlabel("normalized score", fontsize=MEDIUM)
    text = (
        "Fraction of the runs, over all environments and seeds, whose normalized score is above a threshold, with 95 % bands. "
        "Higher is better. n is the number of seeds of each environment."
    )
    return f"{text}\n\n{save_figure(figure, 'Performance profiles', folder / 'performance_profiles.png')}"


def curves_section(findings: Findings, folder: Path) -> str:
    """Section with learning curves, one figure for each environment."""
    pictures, missing = [], []
    for environment in findings.score_ranges:
        values = findings.values("final", "return", environment, "timesteps")
        estimates = interquartile_means({key: series.to_numpy() for key, series in values.items()}, findings.repetitions)
        lines = {}
        for formulation in findings.formulations:
            at = sorted(timesteps for name, timesteps in values if name == formulation)
            if at:
                y = np.array([estimates[formulation, timesteps][:3] for timesteps in at]).T
                seeds = set().union(*(values[formulation, timesteps].index for timesteps in at))
                lines[formulation] = (np.array(at), y, len(seeds))
        if not lines:
            missing.append(environment)
            continue
        title = f"{environment}: return during training"
        figure, panels = small_multiples(lines, findings.first, title)
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.supxlabel("timesteps", fontsize=MEDIUM)
        pictures.append(save_figure(figure, title, folder / file_name(f"learning_curves_{environment}")))
    text = (
        "Mean return of the training episodes that ended in each bin of timesteps: interquartile mean over seeds, with 95 % "
        "bands. n is the number of seeds; bins in which few episodes end may have fewer."
    )
    if missing:
        text += f" No learning curves yet: {', '.join(missing)}."
    return "\n\n".join([text, *pictures])


def search_section(findings: Findings) -> str:
    """Section with the results of the search for learning rates."""
    parts, missing = [], []
    for environment, (low, high) in findings.score_ranges.items():
        values = findings.values("search", "final_return", environment, "learning_rate")
        if not values:
            missing.append(environment)
            continue
        chosen = learning_rates(findings, environment)
        rates = sorted({key[1] for key in values})
        rows = []
        for formulation in findings.formulations:
            columns = [values.get((formulation, rate), NO_VALUES) for rate in rates]
            n_seeds = [len(column) for column in columns]
            if max(n_seeds) == 0:
                continue
            texts = [format_number(column.mean(), digits_for(high - low)) if len(column) else EMPTY_CELL for column in columns]
            if chosen.get(formulation) in rates:
                at = rates.index(chosen[formulation])
                texts[at] = f"**{texts[at]}**" if n_seeds[at] else EMPTY_CELL
            rows.append([formulation, *add_seed_counts(texts, n_seeds)])
        parts.append(f"**{environment}**\n\n{table(['learning rate', *(f'{rate:g}' for rate in rates), 'seeds'], rows)}")
    text = "Mean over seeds of the final return, for each learning rate of the search. Bold: learning rate of the final runs."
    if missing:
        text += f" No search yet: {', '.join(missing)}."
    return "\n\n".join([text, *parts])


def statistics_section(findings: Findings, folder: Path) -> str:
    """Section with gradient statistics at the policies of reference runs, a table and a figure for each environment."""
    parts, missing = [], []
    for environment in findings.score_ranges:
        if not findings.values("statistics", "pairwise_cosine", environment):
            missing.append(environment)
            continue
        relative_to, ratios = variance_ratios(findings, environment)
        columns = [ratios, *(gradient_statistics(findings, environment, metric) for metric in ("snr", *COSINES))]
        summaries = [
            lambda values: f"{np.exp(np.log(values).mean()):.3g}",
            lambda values: f"{values.mean():.3g}",
            *[lambda values: format_number(values.mean(), 3)] * len(COSINES),
        ]
        rows = []
        for formulation in findings.formulations:
            cells = [
                (summary(values), len(values)) if len(values) else (EMPTY_CELL, 0)
                for column, summary in zip(columns, summaries)
                for values in (column.get((formulation, moment), NO_VALUES) for moment in MOMENTS)
            ]
            if any(n_seeds for _, n_seeds in cells):
                *texts, n_seeds = add_seed_counts(*zip(*cells))
                triples = [" / ".join(texts[i : i + len(MOMENTS)]) for i in range(0, len(texts), len(MOMENTS))]
                rows.append([formulation, *triples, n_seeds])
        header = ["start / middle / end", f"variance / variance of {relative_to}", "SNR", *COSINES.values(), "seeds"]
        title = f"{environment}: cosines of gradients"
        shown = save_figure(cosine_figure(findings, environment, title), title, folder / file_name(f"cosines_{environment}"))
        parts += [f"**{environment}**", table(header, rows), shown]
    text = (
        "Gradients of the formulations, measured with the same policies and episodes at the start, in the middle and at the "
        "end of reference runs. Variance: trace of the covariance of the gradient of one update, as a ratio (geometric mean "
        "over seeds). It depends on the scale of the weights of grad log pi; the other columns do not, and are means over "
        "seeds. SNR: signal-to-noise ratio. Pairwise cosine: between the gradients of two batches. Cosine with the reference: "
        "between the gradient of one batch and the gradient of the reference formulation on all data. Lines in the figures: "
        "from the lowest to the highest end of the 95 % bootstrap intervals of the seeds."
    )
    if missing:
        text += f" No gradient statistics yet: {', '.join(missing)}."
    return "\n\n".join([text, *parts])


def cosine_figure(findings: Findings, environment: str, title: str) -> Figure:
    """Figure of both cosines, by formulation and moment."""
    values = {
        metric + end: gradient_statistics(findings, environment, metric + end)
        for metric in COSINES
        for end in ("", "_low", "_high")
    }
    measured = {formulation for metric in COSINES for formulation, _ in values[metric]}
    formulations = [formulation for formulation in findings.formulations if formulation in measured]
    colors = dict(zip(MOMENTS, colormaps["viridis"]([0.0, 0.5, 0.85])))
    figure = Figure(figsize=(10, 1.1 + 0.3 * len(formulations)), layout="constrained")
    both = figure.subplots(1, len(COSINES), sharey=True)
    for axes, (metric, label) in zip(both, COSINES.items()):
        for i, (moment, color) in enumerate(colors.items()):
            for row, formulation in enumerate(formulations):
                ends = [values[metric + end].get((formulation, moment), NO_VALUES) for end in ("", "_low", "_high")]
                if len(ends[0]) == 0:
                    continue
                y, all_ends = row + 0.25 * (i - 1), pd.concat([series for series in ends if len(series)])
                axes.hlines(y, all_ends.min(), all_ends.max(), color=color, linewidth=1.2)
                axes.plot(ends[0].mean(), y, "o", color=color, markersize=3.5)
        axes.axvline(0, color=GRAY, linewidth=0.8)
        axes.set_xlabel(label, fontsize=MEDIUM)
        axes.tick_params(axis="x", labelsize=SMALL + 1)
        axes.grid(axis="x", alpha=0.3)
        for row in range(1, len(formulations), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="0.94", zorder=0)
    both[0].set_yticks(range(len(formulations)), formulations, fontsize=SMALL + 1)
    both[0].set_ylim(len(formulations) - 0.5, -0.5)
    handles = [Line2D([], [], color=color, marker="o", markersize=3.5, label=moment) for moment, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(MOMENTS), fontsize=SMALL + 1)
    figure.suptitle(title, fontsize=MEDIUM + 1)
    return figure


def steps_section(findings: Findings, steps: Sequence[Sequence[str]]) -> str:
    """
    Section with the changes of score, variance and cosine from one formulation to another.

    :param findings: the results
    :param steps: pairs of formulations
    """
    if not steps:
        return "The study has no steps."
    compared = {
        f"{before} -> {after}": [compare(findings, environment, before, after) for environment in findings.score_ranges]
        for before, after in steps
    }
    header = ["", *findings.score_ranges]
    scores, ratios, cosines = (
        table(header, [[name, *(texts[i] for texts in of_environments)] for name, of_environments in compared.items()])
        for i in range(3)
    )
    return "\n\n".join(
        [
            "Second formulation compared with the first. Normalized score: difference of the interquartile means over seeds "
            "[95 % interval], bold if the interval excludes 0.",
            scores,
            "Variance of the gradient of one update: ratio (geometric mean over seeds) at start / middle / end. It is not "
            "informative for steps that change the scale of the weights of grad log pi (normalization, gamma^t, sum over "
            "trajectories): compare the cosines there.",
            ratios,
            "Pairwise cosine: difference at start / middle / end.",
            cosines,
        ]
    )


def compare(findings: Findings, environment: str, before: str, after: str) -> tuple[str, str, str]:
    """:return: difference of normalized scores, ratio of variances and difference of cosines between two formulations"""
    low, high = findings.score_ranges[environment]
    returns = findings.values("final", "final_return", environment)
    variance = gradient_statistics(findings, environment, "variance")
    cosine = gradient_statistics(findings, environment, "pairwise_cosine")
    ratios, changes = [], []
    for moment in MOMENTS:
        ratio = ratio_by_seed(variance.get((after, moment), NO_VALUES), variance.get((before, moment), NO_VALUES))
        ratios.append(f"{np.exp(np.log(ratio).mean()):.2g}" if len(ratio) else EMPTY_CELL)
        change = (cosine.get((after, moment), NO_VALUES) - cosine.get((before, moment), NO_VALUES)).dropna()
        changes.append(f"{change.mean():+.2f}" if len(change) else EMPTY_CELL)
    first, second = (((returns.get(one, NO_VALUES) - low) / (high - low)).to_numpy() for one in (before, after))
    return difference(first, second, findings.repetitions), " / ".join(ratios), " / ".join(changes)


def difference(before: np.ndarray, after: np.ndarray, repetitions: int) -> str:
    """:return: difference of the interquartile means with its percentile bootstrap interval, bold if it excludes 0"""
    if len(before) < 2 or len(after) < 2:
        return EMPTY_CELL
    rng = np.random.default_rng(0)
    resampled = [trim_mean(rng.choice(x, (repetitions, len(x))), 0.25, axis=1) for x in (before, after)]
    low, high = np.quantile(resampled[1] - resampled[0], [0.025, 0.975])
    text = f"{trim_mean(after, 0.25) - trim_mean(before, 0.25):+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def rank_section(findings: Findings, estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """
    Section with the rank correlation of gradient cosines and final returns: do formulations whose gradients agree more, with
    each other or with the reference, learn better?

    :param findings: the results
    :param estimates: results of ``final_returns`` for each environment
    """
    rows = []
    for environment in findings.score_ranges:
        cosines = {metric: gradient_statistics(findings, environment, metric) for metric in COSINES}
        both = [name for name in estimates[environment] if all((name, "middle") in values for values in cosines.values())]
        if not both:
            continue
        ranks = pd.DataFrame(
            {
                **{metric: [values[name, "middle"].mean() for name in both] for metric, values in cosines.items()},
                "return": [estimates[environment][name].mean for name in both],
            }
        ).rank()
        # Equal values have no ranks to correlate, and for two formulations the correlation is always 1 or -1
        informative = len(both) > 2 and (ranks.nunique() > 1).all()
        correlations = [
            format_number(ranks[metric].corr(ranks["return"]), 2) if informative else EMPTY_CELL for metric in COSINES
        ]
        n_seeds = [
            [len(cosines["pairwise_cosine"][name, "middle"]) for name in both],
            [estimates[environment][name].n_seeds for name in both],
        ]
        rows.append([environment, *correlations, str(len(both)), *(format_range(counts) for counts in n_seeds)])
    if not rows:
        return "No formulation has both gradient statistics and final runs yet."
    text = (
        "Spearman's rank correlation over formulations, between each cosine in the middle of training (mean over seeds) and "
        "the final return (interquartile mean over seeds). 1: formulations whose gradients agree more, with each other or "
        "with the reference, always learn better. 0: no relation."
    )
    header = ["", *COSINES.values(), "formulations", "seeds of the cosines", "seeds of the return"]
    return f"{text}\n\n{table(header, rows)}"


def write_report(
    results: pd.DataFrame,
    score_ranges: Mapping[str, tuple[float, float]],
    folder: Path,
    steps: Sequence[Sequence[str]] = (),
    first: str | None = None,
    repetitions: int = REPETITIONS,
) -> Path:
    """
    Write the report of a study. The study may still be running: the report names the parts that are missing. The same results
    give the same files.

    :param results: Table with the columns ``COLUMNS``; formulations are reported in the order in which they appear
    :param score_ranges: For each environment, the returns with the normalized scores 0 and 1, in the order of the report
    :param folder: Folder for report.md and its figures; created if necessary
    :param steps: Pairs of formulations; the second is compared with the first
    :param first: The formulation with which the others are compared: the gray line of the plots, and the denominator of the
        variances. Default: the first one in the results
    :param repetitions: Number of bootstrap resamples
    :return: The path of report.md
    :raises ValueError: if columns are missing or unknown; if a phase, an environment or ``first`` is unknown; if a range of
        scores is not increasing; if there are duplicate rows; if there are no final runs, or final runs of a formulation have
        several learning rates
    """
    rows = validate_results(results, score_ranges, first)
    formulations = list(results["formulation"].unique())
    findings = Findings(rows, score_ranges, formulations, first or formulations[0], repetitions)
    estimates = {environment: final_returns(findings, environment) for environment in score_ranges}
    aggregate_scores = aggregates(findings)
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "Final returns": final_section(findings, estimates, aggregate_scores),
        "Normalized scores": aggregate_section(aggregate_scores, folder),
        "Performance profiles": profile_section(findings, folder),
        "Learning curves": curves_section(findings, folder),
        "Learning rates": search_section(findings),
        "Gradient statistics": statistics_section(findings, folder),
        "Step by step": steps_section(findings, steps),
        "Do better gradients mean better returns?": rank_section(findings, estimates),
    }
    introduction = (
        "Intervals are 95 % percentile intervals of the bootstrap over seeds, stratified by environment, with "
        f"{repetitions:,} repetitions ([Agarwal et al., 2021](https://arxiv.org/abs/2108.13264)). "
        "If a number has fewer seeds than its row, n is given."
    )
    parts = ["# Ablation study", introduction, *(f"## {heading}\n\n{text}" for heading, text in sections.items())]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
