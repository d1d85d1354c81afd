"""``python -m sb3_vpg compare``: run or resume a study, and write its report."""

import argparse
import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from sb3_vpg.common.checks import check_known, check_number
from sb3_vpg.envs import VEC_ENVS
from sb3_vpg.study.processes import TRAINING, in_processes
from sb3_vpg.study.report import write_report
from sb3_vpg.study.results import Measures, Results, keep_settings
from sb3_vpg.study.statistics import chosen_learning_rates
from sb3_vpg.study.study import Cell, Run, Selection, Study, make_study, read_settings, varied
from sb3_vpg.zoo.runs import sigterm_as_ctrl_c

DESCRIPTION = """Compare algorithms, and settings of VPG, over environments and seeds. Hyperparameters are those of the zoo's
entries. An interrupted study resumes with the same command. The folder has the results (runs.csv, points.csv), the settings
(study.yml) and the report (report.html, report.md and pictures)."""
EXAMPLES = """examples:
  python -m sb3_vpg compare --env CartPole-v1 Acrobot-v1 --algo vpg a2c ppo --seeds 10 -f mine
  python -m sb3_vpg compare --env Acrobot-v1 --vary gae_lambda=0.9,0.95,1 --dry-run
  python -m sb3_vpg ablation --env CartPole-v1 --dry-run    # compare --config hyperparams/studies/ablation.yml -f ablation"""


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    # The zoo's manager looks for --vec-env here, which has another meaning for it
    sys.argv = sys.argv[:1]
    try:
        with sigterm_as_ctrl_c():
            compare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. Runs that have ended are kept; the same command runs the others.")
        sys.exit(130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sb3_vpg compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--env", nargs="+", help="environments (default: CartPole-v1); with --config, some of the study's")
    parser.add_argument(
        "--algo", nargs="+", help="algorithms of the zoo (default: vpg a2c ppo, or vpg with --vary); see --env"
    )
    parser.add_argument("--vary", nargs="+", metavar="KEYWORD=VALUE,VALUE", help="settings of VPG: all combinations of values")
    parser.add_argument("--config", type=Path, help="YAML file of a study; docs/compare.md explains the keys")
    parser.add_argument(
        "--entries",
        nargs="+",
        metavar="[ALGO=]FILE",
        help="files with hyperparameters, as the zoo's -conf: VPG's, or ALGO's (default: the zoo's entries)",
    )
    parser.add_argument("--setting", nargs="+", help="some of the settings of the study")
    parser.add_argument("--seeds", type=int, help="number of runs of each algorithm and setting (default: 4)")
    parser.add_argument("--first-seed", type=int, help="seed of the first run (default: 0)")
    parser.add_argument("--steps", type=int, help="timesteps of each run (default: those of the zoo's entries)")
    parser.add_argument("--vec-env", choices=VEC_ENVS, help="class of the training environments")
    parser.add_argument("--gym-packages", nargs="+", help="modules to import, which register environments or estimators")
    parser.add_argument("-f", "--folder", type=Path, default=Path("comparison"), help="folder (default: comparison)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of parallel runs, one thread each")
    parser.add_argument(
        "--track",
        nargs="?",
        const="wandb",
        choices=("wandb", "tensorboard"),
        help="log training as the zoo does (default: wandb)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="execute runs that have failed again")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their cost, and stop")
    parser.add_argument("--report", action="store_true", help="write the report of the runs that have ended, and stop")
    return parser.parse_args()


def study_of(args: argparse.Namespace) -> tuple[Study, Selection]:
    """
    :return: the study, and the part of it that the arguments select
    :raises ValueError: if a name is not known, or a value is not allowed
    """
    settings = read_settings(args.config) if args.config else {}
    if args.vary:
        if settings.get("settings"):
            raise ValueError(f"--vary is not allowed with the settings of {args.config}")
        settings = {"algorithms": ["vpg"], **settings, "settings": varied(args.vary)}
    if not args.config:
        given = {"environments": args.env, "algorithms": args.algo}
        settings |= {key: value for key, value in given.items() if value}
    if args.entries:
        settings["entries"] = named_entries(args.entries)
    for key in ("seeds", "first_seed", "steps", "vec_env", "gym_packages"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    study = make_study(settings)
    if args.vec_env and isinstance(settings.get("environments"), dict):
        study = replace(study, environments={name: {**of, "vec_env": args.vec_env} for name, of in study.environments.items()})
    for flag, known in (("env", study.environments), ("algo", study.algorithms), ("setting", study.settings)):
        for name in getattr(args, flag) or ():
            check_known(f"--{flag}", name, known)
    contestants = [
        name
        for name, (algorithm, setting) in study.contestants.items()
        if algorithm in (args.algo or study.algorithms) and setting in (args.setting or ["", *study.settings])
    ]
    if not contestants:
        raise ValueError("--algo and --setting select nothing together: other algorithms than VPG have no settings")
    return study, Selection(list(dict.fromkeys(args.env or study.environments)), contestants)


def named_entries(texts: Sequence[str]) -> str | dict[str, str]:
    """
    :param texts: a file, or files by algorithm, such as "ppo=mine.yml"
    :return: ``entries`` of :class:`Study`
    :raises ValueError: if a file of several has no algorithm, or an algorithm several files
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    files = {}
    for text in texts:
        algorithm, equals, file = text.partition("=")
        if not equals:
            raise ValueError(f"--entries {text!r} is not allowed; with several files, it must have the form algorithm=file")
        if algorithm in files:
            raise ValueError(f"--entries has {algorithm} twice; name one file for each algorithm")
        files[algorithm] = file
    return files


def compare(args: argparse.Namespace) -> None:
    """Run a study, or what is missing of it, and write its report."""
    check_number("--processes", args.processes, low=1, integer=True)
    if args.track and importlib.util.find_spec(args.track) is None:
        raise ValueError(f"--track {args.track} needs a package: pip install {args.track}")
    if args.folder.is_file():
        raise ValueError(f"--folder {args.folder} is a file; choose a folder")
    if args.report:
        report(args)
        return
    study, selection = study_of(args)
    # Inherited by the processes: EnvPool's and NumPy's threads, too
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        hyperparameters = check_cells(study, selection, args.processes, Path(folder))
        if args.dry_run and not (args.folder / "study.yml").exists():
            plan(study, selection, hyperparameters, Results(Path(folder)), args.processes, Path(folder))
            return
        with folder_of(args.folder):
            cells = {", ".join(filter(None, cell)): of for cell, of in hyperparameters.items()}
            changed = keep_settings(args.folder, asdict(study), cells, write=not args.dry_run)
            if changed:
                print(f"Note: the folder has runs with other versions of {', '.join(changed)}")
            results = Results(args.folder, write=not args.dry_run)
            if args.retry_failed:
                results.forget_failed(study, hyperparameters)
            runs, seconds = plan(study, selection, hyperparameters, results, args.processes, Path(folder))
            if args.dry_run:
                return
            if runs:
                execute_all(study, selection, results, runs, seconds, args)
            print(f"Report: {write_report(study, results, args.folder)}")
            n_failed = (results.frame("runs").error != "").sum()
            if n_failed:
                print(f"{n_failed} runs in the folder have failed: output.log has their errors, --retry-failed repeats them")


def report(args: argparse.Namespace) -> None:
    """Write the report of the runs that have ended: of what the arguments select, or else of the folder's own study."""
    path = args.folder / "study.yml"
    if not path.is_file():
        raise ValueError(f"there is no study in {args.folder}: {path} does not exist")
    if not (args.config or args.vary):
        args.config = path
    study, selection = study_of(args)
    with folder_of(args.folder):
        keep_settings(args.folder, asdict(study), {}, write=False)
        print(f"Report: {write_report(study, Results(args.folder), args.folder, selection)}")


@contextmanager
def folder_of(folder: Path) -> Iterator[None]:
    """Context in which no other process uses the folder of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            try:
                yield
            finally:
                shutil.rmtree(folder / ".running", ignore_errors=True)
    except Timeout as error:
        raise ValueError(f"{folder} is in use: a study runs there now") from error


def check_cells(study: Study, selection: Selection, n_processes: int, folder: Path) -> dict[Cell, dict[str, Any]]:
    """
    Make the model of each cell.

    :return: hyperparameters by cell
    :raises ValueError: if the zoo does not know an algorithm or a keyword, a model cannot be made, or the gradient statistics
        cannot be measured
    """
    jobs = [(name, (study, name, selection.contestants, folder / name.replace("/", "_"))) for name in selection.environments]
    cells: dict[str, dict[Cell, dict[str, Any]]] = {}
    with closing(in_processes(f"{TRAINING}:check_cells", jobs, n_processes, folder / "output.log")) as events:
        for event in events:
            if event.error is not None:
                error = event.error.removeprefix("ValueError: ")
                # An expected error names the environment; a crash cannot
                raise ValueError(error if error != event.error else f"{event.key}: {error}")
            cells[event.key] = event.result
    return {cell: of for name in selection.environments for cell, of in cells[name].items()}


def plan(
    study: Study,
    selection: Selection,
    hyperparameters: Mapping[Cell, Mapping[str, Any]],
    results: Results,
    n_processes: int,
    folder: Path,
) -> tuple[list[Run], dict[Cell, float]]:
    """
    Print the runs that are missing, and their cost: from the speeds of earlier runs, or measured now.

    :return: these runs, and the estimated seconds of a run of each cell; 0 if its speed is unknown
    """
    known = results.frame("runs")
    # Where the search has not ended, all final runs are missing
    unknown_rates = {run.cell: math.nan for run in study.search_runs(*selection) if run not in results}
    chosen = chosen_learning_rates(study, known) | unknown_rates
    phases = [study.search_runs(*selection), study.final_runs(*selection, chosen), study.statistics_runs(*selection, chosen)]
    runs = [run for phase in phases for run in phase if run not in results]
    ended = known[known.phase != "statistics"].dropna(subset="timesteps").groupby(["environment", "algorithm"])
    speeds = {key: rows.wall_seconds.sum() / rows.timesteps.sum() for key, rows in ended}
    unknown = {run.cell[:2]: run for run in reversed(runs) if run.cell[:2] not in speeds}
    source = "speeds of the runs in the folder" if not unknown else "measured now, a few seconds each"
    jobs = [
        (key, (study, run._replace(phase="final"), folder / "-".join(key).replace("/", "_"))) for key, run in unknown.items()
    ]
    with closing(in_processes(f"{TRAINING}:measure_speed", jobs, n_processes, folder / "output.log")) as events:
        for event in tqdm(events, desc="Measuring speed", total=len(jobs), disable=not jobs, leave=False):
            # A training that fails here fails in its run too, whose row has the error
            speeds[event.key] = 0.0 if event.error is not None else event.result
    seconds = {cell: of["n_timesteps"] * speeds.get(cell[:2], 0.0) for cell, of in hyperparameters.items()}
    for key in dict.fromkeys(run.cell[:2] for run in runs):
        costs = [seconds[run.cell] for run in runs if run.cell[:2] == key]
        speed = f"{1 / speeds[key]:9,.0f}" if speeds[key] else "  unknown"
        print(f"{key[0]:24} {key[1]:9} {len(costs):4} runs {speed} steps/s {tqdm.format_interval(sum(costs)):>8}")
    if runs:
        costs = [seconds[run.cell] for run in runs]
        duration = tqdm.format_interval(max(sum(costs) / n_processes, *costs))
        print(f"{len(runs)} runs in {n_processes} processes: about {duration} of training ({source}), and evaluations")
    return runs, seconds


def execute_all(
    study: Study,
    selection: Selection,
    results: Results,
    planned: Sequence[Run],
    seconds: Mapping[Cell, float],
    args: argparse.Namespace,
) -> None:
    """Execute the runs that are missing: the search, then the final runs, then the gradient statistics. See :func:`plan`."""
    n_ended, tracking = 0, (args.track, args.folder) if args.track else None
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
    total = sum(seconds[run.cell] for run in planned)
    with tqdm(total=total, bar_format=bar_format, smoothing=0) as bar:

        def execute(runs: Iterable[Run]) -> None:
            nonlocal n_ended
            missing = [run for run in runs if run not in results]
            fractions = dict.fromkeys(missing, 0.0)
            folders = {run: args.folder / ".running" / str(n_ended + i) for i, run in enumerate(missing)}
            jobs = [(run, (study, run, folders[run], tracking)) for run in missing]
            with closing(in_processes(f"{TRAINING}:execute", jobs, args.processes, args.folder / "output.log")) as events:
                for run, progress, result, error in events:
                    if progress == 1.0:
                        measures, points = result or (Measures(), [])
                        results.add(run, measures, points, error or "")
                        shutil.rmtree(folders[run], ignore_errors=True)
                        n_ended += 1
                        tqdm.write(f"{n_ended:4} {line(study, run, measures, error)}")
                    bar.set_description_str(f"{n_ended} of {len(planned)} runs", refresh=False)
                    bar.update(min((progress - fractions[run]) * seconds[run.cell], total - bar.n))
                    fractions[run] = progress

        execute(study.search_runs(*selection))
        chosen = chosen_learning_rates(study, results.frame("runs"))
        execute([*study.final_runs(*selection, chosen), *study.statistics_runs(*selection, chosen)])


def line(study: Study, run: Run, measures: Measures, error: str | None) -> str:
    """:return: a run and what came of it"""
    rate = "" if run.learning_rate is None else f" at {run.learning_rate:g}"
    phase = "" if run.phase == "final" else f" ({run.phase})"
    start = f"{run.environment:20} {run.algorithm} {run.setting}".rstrip() + f"{rate}{phase}, seed {run.seed}:"
    if error is not None:
        return f"{start} FAILED: {error} (more in output.log)"
    score = getattr(measures, study.score)
    text = "" if score is None else f" {score:.1f},"
    return f"{start}{text} {measures.timesteps:,} steps, {measures.wall_seconds:.1f} s"


if __name__ == "__main__":
    main()
