"""The results file of an ablation study. Finished runs are appended; an interrupted study resumes from it."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sb3_vpg.study.study import COLUMNS, LAST_METRIC, Row, Run, Study

RUN = list(Run._fields)


def read(file: Path | io.StringIO) -> pd.DataFrame:
    """:return: the results in a file, with exactly the numbers that were written"""
    return pd.read_csv(file, float_precision="round_trip")


def best_learning_rates(results: pd.DataFrame, environment: str) -> dict[str, float]:
    """:return: for each formulation, the learning rate with the highest mean final return in the search"""
    search = results.query("environment == @environment and phase == 'search' and metric == 'final_return'")
    means = search.groupby(["formulation", "learning_rate"]).value.mean()
    return {str(name): float(rates.droplevel(0).idxmax()) for name, rates in means.groupby(level=0)}


class Results:
    """
    A CSV file in tidy format, with the columns :data:`sb3_vpg.study.study.COLUMNS` and one number per row. Each run is
    appended when it has finished. Incomplete rows and runs, left by a killed process, are removed.

    :param path: the file; it is created if it does not exist
    :raises ValueError: if the file has other columns
    """

    def __init__(self, path: Path):
        self.path = path
        header = ",".join(COLUMNS) + "\n"
        text = path.read_text() if path.is_file() else header
        if not text.startswith(header):
            raise ValueError(f"{path} is not a file of results: its first line is not {header.strip()}")
        complete_lines = text[: text.rindex("\n") + 1]
        frame = read(io.StringIO(complete_lines))
        runs = pd.MultiIndex.from_frame(frame[RUN])
        finished = runs[frame["metric"] == LAST_METRIC]
        frame[runs.isin(finished)].to_csv(path, index=False)
        self._finished = {Run(*run) for run in finished}

    def __contains__(self, run: Run) -> bool:
        return run in self._finished

    def add(self, run: Run, rows: Sequence[Row]) -> None:
        """
        Append the results of a run.

        :param run: a finished run
        :param rows: its results; the last row has the metric :data:`sb3_vpg.study.study.LAST_METRIC`
        """
        text = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, header=False)
        with self.path.open("a") as file:
            file.write(text)
        self._finished.add(run)

    def chosen_learning_rates(self, environment: str) -> dict[str, float]:
        """
        :return: for each formulation whose search is finished, the learning rate with the highest mean final return; the
            lowest one if several are equal
        """
        return best_learning_rates(read(self.path), environment)

    def select(self, study: Study) -> pd.DataFrame:
        """
        :return: all results so far, in the order of the study. Final runs are included only with the learning rate that the
            search selects now.
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
