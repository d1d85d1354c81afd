"""The files of a study: its settings and versions, its runs, and the points of their curves."""

import csv
import importlib.metadata
import io
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from sb3_vpg.common.checkpoint import atomic_write
from sb3_vpg.study.study import Cell, Run, Study, read_yaml

#: Number of points of a learning curve
N_POINTS = 50
#: Version of the format. Results of another version are refused
FORMAT = 2
VERSIONS = ("sb3_vpg", "stable_baselines3", "sb3_contrib", "rl_zoo3", "torch", "gymnasium", "numpy", "envpool")
#: Settings that may change within a folder: they add runs, or change only the report
EXTENDABLE = ("algorithms", "seeds", "first_seed", "learning_rates", "pairs", "gym_packages", "score_range")
#: Settings whose parts may be added or left out
COLLECTIONS = ("environments", "settings", "entries")


class Measures(NamedTuple):
    """
    What is known of a finished run. All are None if the run has failed.

    :param timesteps: timesteps of training
    :param wall_seconds: wall-clock time of training
    :param processor_seconds: processor time of training, of all threads
    :param deterministic_return: mean return of the final model, deterministic
    :param stochastic_return: mean return of the final model, stochastic
    :param training_return: mean return of the training episodes in the last tenth of the budget
    :param episode_length: mean length of the deterministic episodes
    """

    timesteps: int | None = None
    wall_seconds: float | None = None
    processor_seconds: float | None = None
    deterministic_return: float | None = None
    stochastic_return: float | None = None
    training_return: float | None = None
    episode_length: float | None = None


class Point(NamedTuple):
    """
    A number at some time of a run.

    :param timesteps: timesteps of training
    :param seconds: seconds of training
    :param metric: "return" (mean of the training episodes that ended since the point before) or a gradient statistic
    :param measured: setting of the gradient statistic; empty for a return
    :param value: the number
    """

    timesteps: int
    seconds: float
    metric: str
    measured: str
    value: float


def learning_curve(episodes: list[tuple[int, float, float]], budget: int) -> tuple[list[Point], float | None]:
    """
    :param episodes: end (timesteps and seconds) and return of each training episode
    :param budget: number of timesteps
    :return: the mean return in each of :data:`N_POINTS` parts of the budget, without those in which no episode ends; and the
        mean return in the last tenth of the budget, None if no episode ends there
    """
    timesteps, seconds, returns = np.array(episodes, dtype=np.float64).reshape(-1, 3).T
    points = []
    for low, high in pairwise(np.linspace(0, budget, N_POINTS + 1)):
        part = (low < timesteps) & (timesteps <= high)
        if part.any():
            points.append(Point(int(high), seconds[part][-1], "return", "", returns[part].mean()))
    last = (0.9 * budget < timesteps) & (timesteps <= budget)
    return points, float(returns[last].mean()) if last.any() else None


#: Columns of runs.csv, one row for each run, and of points.csv, one row for each number
COLUMNS = {"runs": (*Run._fields, *Measures._fields, "error"), "points": (*Run._fields, *Point._fields)}
TEXTS = ("phase", "environment", "algorithm", "setting", "metric", "measured", "error")


class Results:
    """
    The files runs.csv and points.csv in the folder of a study. A run is appended when it has ended: first its points, then its
    row in runs.csv, which makes it count. What a killed process has left, a part of a line or points without a run, is removed
    when the files are opened.

    :param folder: the folder; files that do not exist are created
    :param write: False: files that exist are not changed
    :raises ValueError: if the folder has results of another format
    :raises OSError: if the files cannot be written; they have not changed then
    """

    def __init__(self, folder: Path, write: bool = True):
        if (folder / "results.csv").exists():
            raise ValueError(f"{folder / 'results.csv'} has results of an older format: choose another --folder")
        self.paths, self.write = {name: folder / f"{name}.csv" for name in COLUMNS}, write
        self._keep(lambda row: True)

    def _keep(self, wanted: Any) -> None:
        """Keep the wanted rows of runs.csv, and their points."""
        rows = {name: _complete_rows(path, COLUMNS[name]) for name, path in self.paths.items()}
        rows["runs"] = [row for row in rows["runs"] if wanted(row)]
        self._ended = {_key(row) for row in rows["runs"]}
        rows["points"] = [row for row in rows["points"] if _key(row) in self._ended]
        for name, path in self.paths.items():
            content = _as_csv([COLUMNS[name], *rows[name]])
            if not path.is_file() or (self.write and path.read_bytes() != content):
                with atomic_write(path) as file:
                    file.write(content)

    def __contains__(self, run: Run) -> bool:
        return _key(run) in self._ended

    def forget_failed(self, study: Study, cells: Container[Cell]) -> None:
        """Remove the failed runs of these cells and of the study's seeds."""

        def wanted(row: Sequence[str]) -> bool:
            return not row[-1] or tuple(row[1:4]) not in cells or int(row[4]) not in study.seeds_of(row[0])

        self._keep(wanted)

    def add(self, run: Run, measures: Measures, points: Iterable[Point], error: str = "") -> None:
        """
        Append a run that has ended, with its error if it has failed.

        :raises OSError: if the files cannot be written; the run does not count then
        """
        # Milliseconds: more digits are noise, which cannot be compressed
        of_points = [(*run, *point._replace(seconds=round(point.seconds, 3))) for point in points]
        # In this order: the row in runs.csv makes the run count
        for name, rows in (("points", of_points), ("runs", [(*run, *measures, error)])):
            path = self.paths[name]
            try:
                with path.open("ab") as file:
                    file.write(_as_csv(rows))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"{path} cannot be written: {error}. The runs that have ended before are kept") from error
        self._ended.add(_key(run))

    def frame(self, name: str) -> pd.DataFrame:
        """:return: the rows of "runs" or "points", with exactly the numbers that were written; NaN for infinite ones"""
        numbers = {column: ["", "nan", "inf", "-inf"] for column in COLUMNS[name] if column not in TEXTS}
        texts = {column: str for column in COLUMNS[name] if column in TEXTS}
        return pd.read_csv(
            self.paths[name], dtype=texts, na_values=numbers, keep_default_na=False, float_precision="round_trip"
        )


def keep_settings(folder: Path, study: Mapping[str, Any], hyperparameters: Mapping[str, Any], write: bool = True) -> list[str]:
    """
    Write the settings of a study, its hyperparameters and the versions of packages into its folder. Compared with those that
    the folder has, numbers of seeds, learning rates of the search, pairs and score ranges may differ, and environments,
    algorithms and settings may be added or left out.

    :param folder: the folder
    :param study: the settings
    :param hyperparameters: hyperparameters of each cell
    :param write: False: only compare them
    :return: the packages whose versions differ from those that the folder has
    :raises ValueError: if the folder belongs to another study, or has settings of another format or that cannot be read
    :raises OSError: if the file cannot be written
    """
    path, changed = folder / "study.yml", []
    versions = {}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    new = {"format": FORMAT, "study": study, "hyperparameters": hyperparameters, "versions": versions}
    # As YAML gives it back. Hyperparameters in a Python file may be classes
    new = json.loads(json.dumps(new, default=str))
    if path.is_file():
        old = read_yaml(path)
        if not isinstance(old, dict) or old.get("format") != FORMAT or not new.keys() <= old.keys():
            raise ValueError(f"{path} has another format than {FORMAT}, that of this version: choose another --folder")
        old_cells = {cell: old["hyperparameters"].get(cell, new["hyperparameters"][cell]) for cell in new["hyperparameters"]}
        differences = [*_differences(old["study"], new["study"]), *_differences(old_cells, new["hyperparameters"])]
        for key, before, now in differences:
            raise ValueError(f"{folder} has another study ({key} is {before!r} there, {now!r} here): choose another --folder")
        changed = [name for name in versions if old["versions"].get(name, versions[name]) != versions[name]]
        new["versions"] = {**versions, **old["versions"]}
        new["hyperparameters"] = {**old["hyperparameters"], **new["hyperparameters"]}
    if write:
        with atomic_write(path) as file:
            file.write(yaml.safe_dump(new, sort_keys=False).encode())
    return changed


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in filter(new.__contains__, old) if key in COLLECTIONS else {**old, **new}:
            if name not in EXTENDABLE:
                yield from _differences(old.get(name), new.get(name), f"{key}: {name}" if key else name)
    elif old != new:
        yield key, old, new


def _key(row: Sequence[Any]) -> tuple[str, ...]:
    """:return: the run of a row, as texts"""
    return tuple("" if value is None else str(value) for value in row[: len(Run._fields)])


def _as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _complete_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """:return: the rows of a file without its header, and without a last line that is not complete"""
    header = _as_csv([columns]).decode()
    text = path.read_text(encoding="utf-8") if path.is_file() else header
    if not text.startswith(header):
        raise ValueError(f"{path} has another format: its first line is not {header.strip()!r}; choose another --folder")
    return list(csv.reader(io.StringIO(text[: text.rindex("\n") + 1], newline="")))[1:]
