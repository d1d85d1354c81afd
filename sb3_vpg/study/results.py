"""The file of an ablation study's results, to which runs are added as they end, and from which a study goes on."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sb3_vpg.study.study import COLUMNS, LAST_METRIC, Row, Run, Study

RUN = list(Run._fields)


def read(file: Path | io.StringIO) -> pd.DataFrame:
    """:return: the results in a file, each number as it was written"""
    return pd.read_csv(file, float_precision="round_trip")


def best_learning_rates(results: pd.DataFrame, environment: str) -> dict[str, float]:
    search = results.query("environment == @environment and phase == 'search' and metric == 'final_return'")
    means = search.groupby(["formulation", "learning_rate"]).value.mean()
    return {str(name): float(rates.droplevel(0).idxmax()) for name, rates in means.groupby(level=0)}


class Results:
    """
    A tidy CSV file: the columns of :data:`sb3_vpg.study.study.COLUMNS`, a row for each number. Each run is added as it
    ends; what a process that was killed has left half-written is dropped.

    :param path: the file, made if it is not there
    :raises ValueError: if it has other columns
    """

    def __init__(self, path: Path):
        self.path = path
        header = ",".join(COLUMNS) + "\n"
        text = path.read_text() if path.is_file() else header
        if not text.startswith(header):
            raise ValueError(f"{path} is not a file of results, whose first line is {header.strip()}")
        complete_lines = text[: text.rindex("\n") + 1]
        frame = read(io.StringIO(complete_lines))
        runs = pd.MultiIndex.from_frame(frame[RUN])
        ended = runs[frame["metric"] == LAST_METRIC]
        frame[runs.isin(ended)].to_csv(path, index=False)
        self._done = {Run(*run) for run in ended}

    def __contains__(self, run: Run) -> bool:
        return run in self._done

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """
        :param run: a run that has ended
        :param rows: its results, the last of them with :data:`sb3_vpg.study.study.LAST_METRIC`
        """
        text = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, header=False)
        with self.path.open("a") as file:
            file.write(text)
        self._done.add(run)

    def chosen_learning_rates(self, environment: str) -> dict[str, float]:
        """
        :return: for each formulation whose search is done, the learning rate with the highest mean return at the end, the
            lower one of two that are equal
        """
        return best_learning_rates(read(self.path), environment)

    def of(self, study: Study) -> pd.DataFrame:
        """
        :return: all results so far, in the study's order; of runs with a chosen learning rate, those with the one that the
            search would choose now
        """
        results = read(self.path)
        environments, formulations = list(study.environments), list(study.formulations)
        results = results.sort_values(
            ["environment", "formulation"],
            key=lambda names: names.map((environments if names.name == "environment" else formulations).index),
            kind="stable",
        )
        chosen = {env_id: best_learning_rates(results, env_id) for env_id in environments}
        rates = [chosen[run.environment].get(run.formulation) for run in results.itertuples()]
        return results[(results.phase != "final") | (results.learning_rate == rates)]
