"""Write the report of a study: report.html, report.md and its pictures."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from sb3_vpg.study.gradient_report import EMPTY_CELL, policies, rank_section, statistics_section, steps_of_gradients
from sb3_vpg.study.rendering import Chart, Section, Table, write_html, write_markdown
from sb3_vpg.study.results import Results
from sb3_vpg.study.statistics import (
    LEARNED,
    REPETITIONS,
    Estimate,
    Findings,
    aggregates,
    chosen_learning_rates,
    difference,
    estimate,
    performance_profiles,
    probability_of_improvement,
)
from sb3_vpg.study.study import Selection, Study, read_yaml

INTRODUCTION = (
    f"Numbers in brackets are 95 % percentile intervals of the bootstrap over seeds, with {REPETITIONS:,} repetitions. "
    "Returns are interquartile means over seeds: the mean without the lowest and the highest quarter "
    "([Agarwal et al., 2021](https://arxiv.org/abs/2108.13264))."
)
FEW_SEEDS = (
    " Intervals over few seeds are too narrow: if scores are normally distributed, one over 4 seeds has the true value in "
    "88 % of all cases, one over 10 seeds in 93 %."
)
#: With fewer seeds, differences are not marked
FEWEST_SEEDS = 5
SCORE_TEXTS = {
    "deterministic_return": "mean return of the final model's evaluation episodes, deterministic",
    "stochastic_return": "mean return of the final model's evaluation episodes, stochastic",
    "training_return": "mean return of the training episodes in the last tenth of the budget",
}


def format_number(value: float, digits: int) -> str:
    """:return: the number with this many digits after the point; zero without a minus sign"""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def format_estimate(estimate: Estimate | None, digits: int, most_seeds: int = 0) -> str:
    """
    :param estimate: the estimate; None if there is none
    :param digits: number of digits after the point
    :param most_seeds: the number of seeds is added if it is lower
    :return: the mean and, if there is more than one seed, the interval
    """
    if estimate is None:
        return EMPTY_CELL
    mean, low, high = (format_number(value, digits) for value in estimate[:3])
    n_seeds = f" (n = {estimate.n_seeds})" if estimate.n_seeds < most_seeds else ""
    return (f"{mean} [{low}, {high}]" if estimate.n_seeds > 1 and low != high else mean) + n_seeds


def digits_of(findings: Findings, environment: str) -> int:
    """:return: number of digits after the point that shows about a hundredth of the range of scores"""
    low, high = findings.score_range(environment)
    return max(0, 2 - math.floor(math.log10(high - low)))


def scores_section(findings: Findings, aggregate_scores: dict[str, Estimate]) -> Section:
    """Section with the scores by contestant and environment, and normalized scores over all environments."""
    rows = []
    estimates = {
        environment: {name: estimate(values) for name, values in findings.values(environment, findings.study.score).items()}
        for environment in findings.environments
    }
    for name in findings.contestants:
        n_seeds = max(of[name].n_seeds for of in estimates.values() if name in of)
        cells = [
            format_estimate(of.get(name), digits_of(findings, environment), n_seeds) for environment, of in estimates.items()
        ]
        rows.append([name, *cells, format_estimate(aggregate_scores.get(name), 2, n_seeds), str(n_seeds)])
    ranges = ", ".join("{} {:g} to {:g}".format(name, *findings.score_range(name)) for name in findings.environments)
    text = (
        f"Score: {SCORE_TEXTS[findings.study.score]}. Normalized: interquartile mean of the normalized scores over all "
        f"environments and seeds. These scores are normalized to 0 and 1: {ranges}. Intervals reflect the variation between "
        "seeds, for these environments."
    )
    parts: list[str | Table | Chart] = [text, Table(["contestant", *findings.environments, "normalized", "seeds"], rows)]
    if aggregate_scores:
        intervals = {name: {"": (one.mean, one.low, one.high)} for name, one in aggregate_scores.items()}
        parts.append(Chart("aggregate", "Normalized scores", "interquartile mean", intervals=intervals))
    return Section("Scores", parts)


def runs_section(findings: Findings) -> Section:
    """Section with all measures, for each environment and contestant."""
    rows = []
    rates = chosen_learning_rates(findings.study, findings.runs)
    for environment in findings.environments:
        digits = digits_of(findings, environment)
        for name in findings.values(environment, findings.study.score):
            runs = findings.final[(findings.final.environment == environment) & (findings.final.contestant == name)]
            means = [
                format_estimate(estimate(values) if len(values) else None, digits, len(runs))
                for values in (runs[column].dropna() for column in SCORE_TEXTS)
            ]
            times = [f"{runs[column].median():,.1f}" for column in ("wall_seconds", "processor_seconds")]
            rate = rates.get((environment, *findings.study.contestants[name]))
            shown = [] if not rates else [EMPTY_CELL if rate is None else f"{rate:g}"]
            steps, length = f"{runs.timesteps.median():,.0f}", f"{runs.episode_length.median():.0f}"
            rows.append([environment, name, *means, length, steps, *times, *shown, str(len(runs))])
    names = [name.replace("_", " ") for name in SCORE_TEXTS]
    header = ["environment", "contestant", *names, "length", "steps", "seconds", "processor seconds"]
    text = (
        "Length: median length of the deterministic episodes. Steps, wall-clock seconds and processor seconds: medians of the "
        "training alone, on one thread."
    )
    return Section("Runs", [text, Table([*header, *(["learning rate"] if rates else []), "seeds"], rows)])


def curves_section(findings: Findings) -> Section:
    """Section with learning curves by steps and by wall-clock time."""
    parts: list[str | Table | Chart] = [
        "Mean return of the training episodes, with stochastic actions: interquartile mean over seeds, with 95 % bands. "
        "Returns are interpolated between the points of a run. The curve of a contestant ends with its median run. Thin "
        "lines, where there is only one contestant, are its runs."
    ]
    for environment in findings.environments:
        for axis, label in (("timesteps", "timesteps"), ("seconds", "seconds of training")):
            curves = findings.curves(environment, axis)
            lines = {name: (x, y if len(curves) == 1 else y[:3]) for name, (x, y) in curves.items()}
            if lines:
                title = f"{environment}: return by {label}"
                parts.append(Chart(f"learning_curves_{environment}_{axis}", title, label, lines))
    return Section("Learning curves", parts)


def speed_section(findings: Findings) -> Section:
    """Section with the mean return over training, and the time until a run has learned the task."""
    rows = []
    for environment in findings.environments:
        digits = digits_of(findings, environment)
        for name, speeds in findings.speeds(environment).items():
            learned = speeds.dropna(subset="timesteps")
            medians = learned.timesteps.median(), learned.seconds.median()
            cells = [f"{x:,.{n}f}" if np.isfinite(x) else EMPTY_CELL for x, n in zip(medians, (0, 1))]
            mean = format_estimate(estimate(speeds.mean_return), digits)
            rows.append([environment, name, mean, f"{len(learned)} of {len(speeds)}", *cells])
    text = (
        "Mean return: of the learning curve, from its beginning to its end. Learned: runs whose curve reaches the normalized "
        f"score {LEARNED}, with the median of their timesteps and of their seconds of training until then."
    )
    header = ["environment", "contestant", "mean return", "learned", "timesteps", "seconds"]
    return Section("Speed of learning", [text, Table(header, rows)])


def profiles_section(normalized: dict[str, np.ndarray]) -> Section:
    """Section with performance profiles (Agarwal et al., 2021, section 4.2)."""
    thresholds, profiles = performance_profiles(normalized)
    lines = {name: (thresholds, y) for name, y in profiles.items()}
    text = (
        "Fraction of the runs, over all environments and seeds, whose normalized score is above a threshold, with 95 % bands. "
        "Higher is better."
    )
    chart = Chart("performance_profiles", "Fraction of runs with a score above x", "normalized score", lines)
    return Section("Performance profiles", [text, chart])


def pairs_section(findings: Findings, normalized: dict[str, np.ndarray]) -> Section:
    """Section that compares pairs of contestants: differences of scores, probabilities of improvement, gradients."""
    study, names = findings.study, findings.contestants
    named = [(pair[0], pair[1]) for pair in study.pairs]
    pairs = [pair for pair in named if set(pair) <= set(names)] or [(names[0], name) for name in names[1:]]
    questions = {(pair[0], pair[1]): pair[2] for pair in study.pairs if len(pair) == 3}
    rows, intervals = [], dict[str, dict[str, tuple[float, float, float]]]()
    for before, after in pairs:
        cells, better, worse = [], 0, 0
        for environment in findings.environments:
            low, high = findings.score_range(environment)
            scores = findings.values(environment, study.score)
            found = difference(scores[before], scores[after]) if before in scores and after in scores else None
            if found is None:
                cells.append(EMPTY_CELL)
                continue
            mean, lowest, highest = (value / (high - low) for value in found[:3])
            text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(round(value, 2) + 0.0 for value in (mean, lowest, highest)))
            intervals.setdefault(f"{before} -> {after}", {})[environment] = (mean, lowest, highest)
            enough = found.n_seeds >= FEWEST_SEEDS
            better, worse = better + (enough and lowest > 0), worse + (enough and highest < 0)
            cells.append(f"**{text}**" if enough and (lowest > 0 or highest < 0) else text)
        known = before in normalized and after in normalized
        probability = probability_of_improvement(normalized[before], normalized[after]) if known else None
        question = [questions.get((before, after), "")] if questions else []
        rows.append([f"{before} -> {after}", *question, f"{better} / {worse}", format_estimate(probability, 2), *cells])
    header = ["pair", *(["question"] if questions else []), "better / worse", "probability of improvement"]
    text = (
        "The second contestant compared with the first. Difference of the normalized scores (interquartile means), bold if "
        f"the interval excludes 0, with at least {FEWEST_SEEDS} seeds. Better / worse: number of environments where it does. "
        "Probability of improvement: that a run of the second has a higher score than a run of the first, mean over "
        "environments; ties count one half."
    )
    parts: list[str | Table | Chart] = [text, Table([*header, *findings.environments], rows)]
    if intervals:
        title = "Differences of the normalized scores"
        parts.append(Chart("differences", title, "second minus first", intervals=intervals))
    if any(policies(findings)):
        settings = {name: setting for setting, name in study.measured.items() if setting}
        parts += steps_of_gradients(findings, [(settings[a], settings[b]) for a, b in pairs if {a, b} <= settings.keys()])
    return Section("Pairs", parts)


def search_section(findings: Findings) -> Section:
    """Section with the results of the search for learning rates."""
    study, runs = findings.study, findings.runs[findings.runs.phase == "search"]
    chosen = chosen_learning_rates(study, findings.runs)
    rates = sorted(set(study.search.learning_rates))
    parts: list[str | Table | Chart] = [
        "Mean score over the seeds of the search, for each learning rate. Bold: the one that is selected. *: it is the lowest "
        "or the highest of all, so that a better one may be outside."
    ]
    for environment, of_environment in runs.groupby("environment", sort=False):
        rows = []
        for name, (algorithm, setting) in study.contestants.items():
            means = of_environment[of_environment.contestant == name].groupby("learning_rate")[study.score].mean()
            if not len(means):
                continue
            rate = chosen[str(environment), algorithm, setting]
            digits = digits_of(findings, str(environment)) if environment in findings.environments else 1
            cells = [format_number(means[at], digits) if pd.notna(means.get(at)) else EMPTY_CELL for at in rates]
            edge = "*" if rate in (rates[0], rates[-1]) else ""
            cells[rates.index(rate)] = f"**{cells[rates.index(rate)]}**{edge}"
            rows.append([name, *cells])
        parts += [f"**{environment}**", Table(["learning rate", *(f"{rate:g}" for rate in rates)], rows)]
    return Section("Learning rates", parts)


def failures_section(findings: Findings) -> Section:
    """Section with the runs that have failed."""
    failed = findings.runs[findings.runs.error != ""]
    rows = [[run.environment, run.contestant, run.phase, str(run.seed), run.error] for run in failed.itertuples()]
    text = f"{len(rows)} runs have failed. They are not part of any number above."
    return Section("Failed runs", [text, Table(["environment", "contestant", "phase", "seed", "error"], rows)])


def settings_section(folder: Path) -> Section:
    """Section with the settings and versions of the study."""
    settings = read_yaml(folder / "study.yml")
    shown = yaml.safe_dump({key: settings[key] for key in ("study", "versions")}, sort_keys=False, width=120)
    introduction = "Settings and versions. `study.yml` also has the hyperparameters of each environment and contestant."
    return Section("Study", [introduction, f"```yaml\n{shown.strip()}\n```"])


def write_report(study: Study, results: Results, folder: Path, selection: Selection | None = None) -> Path:
    """
    Write the report of a study. The study may still be running. The same results give the same files.

    :param folder: folder for report.html, report.md and its pictures, which has study.yml
    :param selection: the part of the study that the report shows; None for all of it
    :return: path of report.html
    """
    findings = Findings(study, results.frame("runs"), results.frame("points"), selection)
    sections = []
    if findings.contestants:
        normalized = findings.normalized()
        aggregate_scores = aggregates(normalized)
        sections += [scores_section(findings, aggregate_scores), curves_section(findings), speed_section(findings)]
        if aggregate_scores:
            sections.append(profiles_section(normalized))
        if len(findings.contestants) > 1:
            sections.append(pairs_section(findings, normalized))
        sections.append(runs_section(findings))
    if (findings.runs.phase == "search").any():
        sections.append(search_section(findings))
    if any(policies(findings)):
        sections.append(statistics_section(findings))
        if findings.contestants:
            sections.append(rank_section(findings))
    if (findings.runs.error != "").any():
        sections.append(failures_section(findings))
    expected = set(itertools.product(*findings.selection, study.seeds_of("final")))
    missing = len(expected.difference(zip(findings.final.environment, findings.final.contestant, findings.final.seed)))
    introduction = INTRODUCTION + FEW_SEEDS * (study.seeds < 10)
    if missing:
        introduction += f" The study is not complete: {missing} of {len(expected)} runs have no score."
    unscored = findings.runs[
        (findings.runs.phase != "statistics") & (findings.runs.error == "") & findings.runs[study.score].isna()
    ]
    if len(unscored):
        score = study.score.replace("_", " ")
        introduction += f" {len(unscored)} runs ended without a {score}: no episode ended in time, or it is not finite."
    sections = [Section("How to read it", [introduction]), *sections, settings_section(folder)]
    write_markdown("Comparison", sections, folder / "report.md")
    write_html("Comparison", sections, folder / "report.html")
    return folder / "report.html"
