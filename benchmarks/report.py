"""
The tables of docs/performance.md, from the results that the other benchmarks have written.

    python benchmarks/report.py

Reads the JSON files in benchmarks/results and writes what stands between `<!-- NAME -->` and `<!-- end -->` in the document.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from common import interquartile_mean, median_and_range
from time_to_solve import by_contestant, median

HERE = Path(__file__).parent
RESULTS, DOCUMENT = HERE / "results", HERE.parent / "docs" / "performance.md"


def results_of(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where_time_goes(scenario: str) -> str:
    before, after = (
        next(r["microseconds_per_frame"] for r in results_of(f"where_time_goes_{when}") if r["scenario"] == scenario)
        for when in ("before", "after")
    )
    contestants = list(after)
    columns = [(after if name == "A2C" else which)[name] for name in contestants for which in (before, after)][1:]
    header = ["microseconds per frame", "A2C"]
    header += [f"{name}, {when}" for name in contestants[1:] for when in ("before", "after")]
    rows = [[part, *(f"{np.median(column[part]):.2f}" for column in columns)] for part in columns[0]]
    totals = [np.median(np.sum(list(column.values()), axis=0)) for column in columns]
    return table(header, [*rows, ["**sum**", *(f"**{total:.2f}**" for total in totals)]])


def throughput(scenario: str, file: str = "throughput") -> str:
    lines = [line for line in results_of(file) if line["scenario"] == scenario]
    speeds = {(line["contestant"], line["environments"]): np.array(line["frames_per_second"]) for line in lines}
    kinds = list(dict.fromkeys(kind for _, kind in speeds))
    rows = []
    for (contestant, kind), own in speeds.items():
        ratios = [median_and_range(own / speeds["A2C", other]) for other in kinds if other in (kind, kinds[0])]
        rows.append([contestant, kind, f"{np.median(own):,.0f}", *ratios[::-1], *[""] * (len(kinds) - len(ratios))])
    header = ["", "environments", "frames/s", "x A2C there", *(f"x A2C in {kind}" for kind in kinds[:1] if len(kinds) > 1)]
    return table(header, rows)


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
    return table(header, rows)


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
    return table([f"{label} ({lines[0]['unit']})", *columns], rows)


def main() -> None:
    def filled(match: re.Match[str]) -> str:
        function, *arguments = match[1].split()
        return f"<!-- {match[1]} -->\n\n{globals()[function](*arguments)}\n\n<!-- end -->"

    text = re.sub(r"<!-- (?!end)(.*?) -->.*?<!-- end -->", filled, DOCUMENT.read_text(), flags=re.DOTALL)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
