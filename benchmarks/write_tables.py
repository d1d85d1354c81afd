"""
Write the tables of README.md, docs/results.md, docs/performance.md, docs/swingup.md, docs/envpool.md and docs/ablation.md, and
the figure of learning curves, from the results of the other benchmarks.

    python benchmarks/write_tables.py

Reads the files in benchmarks/results, and the report of the ablation, docs/ablation/report.md. Replaces the text between
`<!-- table: NAME -->` and `<!-- end -->` in the documents, and draws docs/learning_curves.png.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from engines import engines_table
from harness import markdown_table, median_and_range, read_lines
from same_task import ENGINES, LEVEL, tests
from scipy.stats import ks_2samp
from time_to_solve import by_contestant, interquartile_mean, median

from sb3_vpg.study.statistics import iqm

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
PAGES = ("results", "performance", "swingup", "envpool", "ablation")
DOCUMENTS = (HERE.parent / "README.md", *(DOCS / f"{page}.md" for page in PAGES))
ALGORITHMS = ("vpg", "a2c", "ppo", "trpo")


def results_of(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def where_time_goes(scenario: str) -> str:
    columns = next(r["microseconds_per_frame"] for r in results_of("where_time_goes") if r["scenario"] == scenario)
    parts = next(iter(columns.values()))
    rows = [[part, *(f"{np.median(column[part]):.2f}" for column in columns.values())] for part in parts]
    totals = [np.median(np.sum(list(column.values()), axis=0)) for column in columns.values()]
    return markdown_table(
        ["microseconds per frame", *columns], [*rows, ["**sum**", *(f"**{total:.2f}**" for total in totals)]]
    )


def throughput(scenario: str, file: str = "throughput") -> str:
    lines = [line for line in results_of(file) if line["scenario"] == scenario]
    speeds = {(line["contestant"], line["environments"]): np.array(line["frames_per_second"]) for line in lines}
    kinds = list(dict.fromkeys(kind for _, kind in speeds))
    rows = []
    for (contestant, kind), own in speeds.items():
        ratios = [median_and_range(own / speeds["A2C", other]) for other in kinds if other in (kind, kinds[0])]
        rows.append([contestant, kind, f"{np.median(own):,.0f}", *ratios[::-1], *[""] * (len(kinds) - len(ratios))])
    header = ["", "environments", "frames/s", "x A2C there", *(f"x A2C in {kind}" for kind in kinds[:1] if len(kinds) > 1)]
    return markdown_table(header, rows)


def masks_and_memory() -> str:
    lines = results_of("masks_and_memory")
    rows = []
    for ppo, own in zip(lines[::2], lines[1::2]):
        speeds = [np.array(line["frames_per_second"]) for line in (ppo, own)]
        of_both = [f"{np.median(speed):,.0f}" for speed in speeds]
        ratio, mib = median_and_range(speeds[1] / speeds[0]), [f"{line['mib']:.0f}" for line in (ppo, own)]
        rows.append([f"{own['contestant']} x {own['n_envs']}", *of_both, ratio, *mib])
    header = ["", "PPO, frames/s", "VPG, frames/s", "VPG / PPO", "PPO, MiB", "VPG, MiB"]
    return markdown_table(header, rows)


def gpu(task: str) -> str:
    lines = [line for line in results_of("gpu") if line["task"] == task]
    of = {(line["width"], line["n_envs"], line["device"], line["algorithm"]): line for line in lines}
    rows = []
    for width, n_envs in dict.fromkeys((line["width"], line["n_envs"]) for line in lines):
        a2c, vpg, ppo = (of[width, n_envs, "cuda", name] for name in ("A2C", "VPG, gae", "PPO"))
        speed = vpg["frames_per_second"]
        row = [f"{width} x {n_envs}" if width else f"{n_envs}", f"{a2c['frames_per_second']:,.0f}", f"{speed:,.0f}"]
        row += [f"{speed / a2c['frames_per_second']:.2f}", f"{ppo['frames_per_second'] / a2c['frames_per_second']:.2f}"]
        row.append(f"{vpg['share_of_update']:.0%}")
        on_cpu = [of.get((width, n_envs, "cpu", name)) for name in ("A2C", "VPG, gae")]
        row += ["" if line is None else f"{line['frames_per_second']:,.0f}" for line in on_cpu]
        rows.append(row)
    first = "width x environments" if task == "vectors" else "environments"
    header = [first, "A2C", "VPG", "VPG / A2C", "PPO / A2C", "update", "A2C, CPU", "VPG, CPU"]
    return markdown_table(header, rows)


def slow_environments() -> str:
    rows: dict[float, list[str]] = defaultdict(list)
    lines = results_of("slow_environments")
    for line in lines:
        percent = 100 * np.array(line["shares"])
        cell = f"{np.median(percent):.0f} % [{percent.min():.0f}, {percent.max():.0f}]"
        rows[line["milliseconds"]].append(cell)
    names = dict.fromkeys(line["contestant"] for line in lines)
    return markdown_table(["a step takes", *names], [[f"{ms:g} ms", *cells] for ms, cells in rows.items()])


def time_to_solve(env_id: str) -> str:
    groups = by_contestant(results_of("time_to_solve_" + env_id))
    of_ppo = median(groups["PPO"], "seconds")
    rows = []
    for name, runs in groups.items():
        seconds = [run["seconds"] for run in runs if run["solved"]]
        solved, middle = f"{len(seconds)}/{len(runs)}", median(runs, "seconds")
        figures = (
            [interquartile_mean(seconds, digits=2), f"{min(seconds):.2f}", f"{max(seconds):.2f}"] if seconds else ["-"] * 3
        )
        medians = [f"{middle:.2f}", f"{median(runs, 'steps'):,.0f}", f"{middle / of_ppo:.3f}"]
        rows.append([name, runs[0]["vec_env"], solved, *figures, *medians])
    header = ["", "environments", "solved", "seconds, IQM [95 %]", "min", "max", "median", "median steps", "median / PPO's"]
    return markdown_table(header, rows)


def engines(*measure: str) -> str:
    return engines_table(read_lines(RESULTS / "engines.jsonl"), " ".join(measure))


def scaling(part: str) -> str:
    lines = [line for line in results_of("scaling") if line["part"] == part]

    def x(line: dict[str, Any]) -> int:
        return line["width"] if part == "width" else line["n_envs"] * (line["n_steps"] if part == "memory" else 1)

    def column(line: dict[str, Any]) -> str:
        return line["contestant"] + ("" if line["native"] else ", DummyVecEnv")

    values = {(x(line), column(line)): np.median(line["values"]) for line in lines}
    columns = list(dict.fromkeys(name for _, name in values))
    label = {"envs": "environments", "memory": "steps in a rollout", "width": "units in a layer"}[part]
    rows = [
        [f"{at:,}", *(f"{values[at, name]:,.0f}" if (at, name) in values else "" for name in columns)]
        for at in dict.fromkeys(at for at, _ in values)
    ]
    return markdown_table([f"{label} ({lines[0]['unit']})", *columns], rows)


def zoo_runs() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """:return: runs of the study ``hyperparams/studies/zoo.yml``, by environment and algorithm"""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in study_runs("zoo").to_dict("records"):
        runs[run["environment"]][run["algorithm"]].append(run)
    return runs


def steps_and_seconds(runs: list[dict[str, Any]]) -> tuple[str, str]:
    return f"{runs[0]['steps'] / 1e6:.2g} M", f"{np.median([run['processor_seconds'] for run in runs]):.0f}"


def return_steps_and_time(runs: list[dict[str, Any]], digits: int = 1) -> str:
    steps, seconds = steps_and_seconds(runs)
    return f"{interquartile_mean([run['score'] for run in runs], digits)}<br>{steps}, {seconds} s"


def algorithms() -> str:
    rows = [[env_id, *(return_steps_and_time(of_env[algo]) for algo in ALGORITHMS)] for env_id, of_env in zoo_runs().items()]
    return markdown_table(["return<br>steps, time", *map(str.upper, ALGORITHMS)], rows)


def scores() -> str:
    rows = [
        [env_id, *(f"{iqm([run['score'] for run in of_env[algo]]):.1f}" for algo in ALGORITHMS)]
        for env_id, of_env in zoo_runs().items()
    ]
    return markdown_table(["", *map(str.upper, ALGORITHMS)], rows)


def algorithms_on(env_id: str, *thresholds: str) -> str:
    return with_thresholds({algo.upper(): runs for algo, runs in zoo_runs()[env_id].items()}, thresholds)


def own_start(*thresholds: str) -> str:
    runs = study_runs("own_start").groupby("setting", sort=False)
    return with_thresholds({name.replace("_", " "): of_setting.to_dict("records") for name, of_setting in runs}, thresholds)


def with_thresholds(runs_of: dict[str, list[dict[str, Any]]], thresholds: Sequence[str]) -> str:
    rows = []
    for name, runs in runs_of.items():
        keys = ("score", "stochastic_return", "episode_length")
        scores, noisy_scores, lengths = ([run[key] for run in runs] for key in keys)
        reached = [str(sum(score >= float(threshold) for score in scores)) for threshold in thresholds]
        lowest, length, noisy = f"{min(scores):.0f}", f"{np.mean(lengths):.0f}", interquartile_mean(noisy_scores)
        steps, seconds = steps_and_seconds(runs)
        rows.append([name, steps, interquartile_mean(scores), *reached, lowest, length, noisy, seconds])
    at_least = [f"seeds >= {threshold}" for threshold in thresholds]
    return markdown_table(["", "steps", "return", *at_least, "lowest seed", "length", "stochastic", "seconds"], rows)


def study_runs(name: str) -> pd.DataFrame:
    """:return: the runs of a study of ``python -m sb3_vpg compare``, in a folder of benchmarks/results, with their scores"""
    score = yaml.safe_load((RESULTS / name / "study.yml").read_text())["study"]["score"]
    runs = pd.read_csv(RESULTS / name / "runs.csv")
    return runs.assign(steps=runs.timesteps, score=runs[score])


def of_settings(name: str, threshold: str) -> str:
    """:return: returns of the settings of a study, and the number of seeds that reach a threshold"""
    runs = study_runs(name)
    rows = []
    for setting in yaml.safe_load((RESULTS / name / "study.yml").read_text())["study"]["settings"]:
        scores = runs.score[runs.setting == setting]
        rows.append([setting, interquartile_mean(scores, 0), str(sum(scores >= float(threshold)))])
    return markdown_table(["setting", "return", f"seeds >= {threshold}"], rows)


def by_setting(name: str) -> str:
    """:return: returns of all settings of a study in all its environments"""
    runs = study_runs(name)
    rows = []
    for setting, of_setting in runs.groupby("setting", sort=False):
        returns = (interquartile_mean(scores, 0) for _, scores in of_setting.groupby("environment", sort=False).score)
        rows.append([f"`{setting}`", *returns])
    return markdown_table(["", *runs.environment.unique()], rows)


def study(name: str, digits: str = "0") -> str:
    runs = study_runs(name)
    algorithms = sorted(runs.algorithm.unique(), key=lambda name: not name.startswith("vpg"))

    rows = []
    for env_id, of_env in runs.groupby("environment", sort=False):
        own = [of_env[of_env.algorithm == algorithm].to_dict("records") for algorithm in algorithms]
        rows.append([env_id, *(return_steps_and_time(seeds, int(digits)) if seeds else "" for seeds in own)])
    return markdown_table(["return<br>steps, time", *algorithms], rows)


def beside(name: str, *peers: str) -> str:
    """:return: VPG's runs in a study, and those of others: each seed if there are at most three"""
    rows = []
    for env_id, of_env in study_runs(name).groupby("environment", sort=False):
        own = of_env[of_env.algorithm == "vpg"]
        largest = own.score.abs().max()
        digits = 0 if largest >= 100 else 1 if largest > 1 else 2
        extremes = f"{own.score.min():.{digits}f}, {own.score.max():.{digits}f}"
        row = [env_id, interquartile_mean(own.score, digits), extremes, f"{own.processor_seconds.median():.0f}"]
        for algo in peers:
            runs = of_env[of_env.algorithm == algo]
            each = ", ".join(f"{score:.{digits}f}" for score in runs.score)
            returns = each if len(runs) <= 3 else interquartile_mean(runs.score, digits)
            row.append(f"{returns}<br>{runs.processor_seconds.median():.0f} s" if len(runs) else "")
        rows.append(row)
    return markdown_table(["", "VPG", "lowest, highest", "seconds", *map(str.upper, peers)], rows)


def ablation_section(title: str) -> pd.DataFrame:
    """:return: the first table of a section of the ablation's report; all cells are text"""
    report = (DOCS / "ablation" / "report.md").read_text()
    section = report[report.index(f"\n## {title}\n") :]
    header, _, *rows = [line.strip("| ").split(" | ") for line in re.search(r"(\|.*\n)+", section)[0].splitlines()]
    return pd.DataFrame(rows, columns=header)


def ablation_returns() -> str:
    scores = ablation_section("Scores")
    runs = ablation_section("Runs").set_index(["environment", "contestant"])
    for environment in scores.columns[1:-2]:
        rates = [runs["learning rate"].get((environment, name), "-") for name in scores.contestant]
        scores[environment] = [cell if rate == "-" else f"{cell} at {rate}" for cell, rate in zip(scores[environment], rates)]
    return markdown_table(["", *scores.columns[1:]], scores.values.tolist())


def answer(better: int, worse: int) -> str:
    """:return: what a step does, by the rule that docs/ablation.md states, from the numbers of environments"""
    if better and worse:
        return "depends on the task"
    if max(better, worse) < 2:
        return "none found"
    return "better" if better else "worse"


def ablation_steps() -> str:
    pairs, rows = ablation_section("Pairs"), []
    for pair, question, counts, _, *differences in pairs.values.tolist():
        expected = re.search("Expected: ([a-z ]+)", question)[1]
        found = answer(*map(int, counts.split(" / ")))
        rows.append([f"`{pair}`", expected, f"{found} ({counts})", *differences])
    return markdown_table(["step", "expected", "found", *pairs.columns[4:]], rows)


def same_task(part: str) -> list[dict[str, Any]]:
    return [result for result in read_lines(RESULTS / "same_task.jsonl") if result["part"] == part]


def same_distributions() -> str:
    results = same_task("distributions")
    of_test, rows = tests(results), []
    for result in results:
        for policy in ("random", "trained"):
            row = [result["env"] if policy == "random" else "", policy]
            row.append(str(len(result[f"{policy}, EnvPool"]["returns"])))
            for kind, digits in (("returns", 2), ("lengths", 1)):
                for engine in ENGINES:
                    values = result[f"{policy}, {engine}"][kind]
                    row.append(f"{np.mean(values):,.{digits}f} +- {np.std(values):,.{digits}f}")
                _, p, adjusted = of_test[result["env"], policy, kind]
                row.append(f"**{p:.1g}**" if adjusted <= LEVEL else f"{p:.2g}")
            rows.append(row)
    columns = [f"{kind}, {engine}" if engine != "p" else "p" for kind in ("return", "length") for engine in (*ENGINES, "p")]
    return markdown_table(["", "policy", "episodes", *columns], rows)


def same_beginnings() -> str:
    rows = []
    for result in same_task("distributions"):
        if "control" not in result:
            continue
        lengths = [result[key]["lengths"] for key in ("random, gymnasium", "random, EnvPool", "control")]
        cells = [f"{np.mean(x):.1f} +- {np.std(x):.1f}" for x in lengths]
        rows.append([result["env"], *cells, f"{ks_2samp(*lengths[1:]).pvalue:.2g}"])
    header = ["length, random policy", "gymnasium", "EnvPool", "gymnasium, begun as in EnvPool", "p of the last two"]
    return markdown_table(header, rows)


def same_spaces() -> str:
    rows = []
    for result in same_task("distributions"):
        rewards = []
        for engine in ENGINES:
            low, high = zip(*(result[f"{policy}, {engine}"]["rewards"] for policy in ("random", "trained")))
            rewards.append(f"{min(low):.4g} to {max(high):.4g}")
        own, limit = result["limits"]
        limits = str(own) if own == limit else f"{own} instead of {limit}"
        rows.append([result["env"], limits, *rewards, result["algorithm"], "; ".join(result["spaces"]) or "equal"])
    rewards_of = [f"rewards, {engine}" for engine in ENGINES]
    return markdown_table(["", "EnvPool's time limit", *rewards_of, "trained policy", "EnvPool's own spaces"], rows)


def same_steps() -> str:
    def size(x: float) -> str:
        return f"{x:.0e}" if x else "0"

    rows = []
    for result in same_task("step by step"):
        own, control = result["EnvPool"], result.get("gymnasium")
        largest = [size(r[key]) if r else "" for key in ("observation", "reward") for r in (own, control)]
        terminations = f"{own['terminations_that_differ']} of {own['terminations']}"
        mujoco = result["mujoco"] if result["env"].endswith("-v5") else ""
        rows.append([result["env"], mujoco, str(own["steps"]), *largest, terminations])
    header = ["", "gymnasium's MuJoCo", "steps", "observation", "(control)", "reward", "(control)", "terminations that differ"]
    return markdown_table(header, rows)


def draw_learning_curves(path: Path) -> None:
    """Draw the interquartile mean over seeds, and the range between the quartiles."""
    figure, axes = plt.subplots(2, 4, figsize=(13.6, 5.2))
    points = pd.read_csv(RESULTS / "zoo" / "points.csv.gz")
    for ax, env_id in zip(axes.flat, points.environment.unique()):
        for algo in ALGORITHMS:
            of_algo = points[(points.environment == env_id) & (points.algorithm == algo)]
            # A point is drawn only if episodes have ended in all seeds
            curves = of_algo.pivot(index="seed", columns="timesteps", values="value").dropna(axis=1)
            steps = curves.columns
            color = f"C{ALGORITHMS.index(algo)}"
            ax.plot(steps, iqm(curves), color=color, label=algo.upper(), linewidth=1.2)
            ax.fill_between(steps, *np.quantile(curves, (0.25, 0.75), axis=0), color=color, alpha=0.2, linewidth=0)
        ax.set_xscale("log")
        ax.set_title(env_id, fontsize=10)
        ax.grid(alpha=0.2)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=len(ALGORITHMS), frameon=False)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return of training episodes", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=110)


def main() -> None:
    def filled(match: re.Match[str]) -> str:
        function, *arguments = match[1].split()
        return f"<!-- table: {match[1]} -->\n\n{globals()[function](*arguments)}\n\n<!-- end -->"

    for document in DOCUMENTS:
        document.write_text(re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", filled, document.read_text(), flags=re.DOTALL))
    draw_learning_curves(DOCS / "learning_curves.png")


if __name__ == "__main__":
    main()
