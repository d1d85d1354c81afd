"""``python -m sb3_vpg ablation``: run or resume an ablation study, and write its report."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from sb3_vpg.common.checks import check_choice
from sb3_vpg.study.report import write_report
from sb3_vpg.study.results import Results
from sb3_vpg.study.study import Run, Study, load_study
from sb3_vpg.study.training import execute, prepare_process
from sb3_vpg.zoo import HYPERPARAMS


def main() -> None:
    """Run the command line."""
    args = parse_arguments()
    try:
        study = load_study(args.config)
        environments = args.env or list(study.environments)
        formulations = args.formulation or list(study.formulations)
        for env_id in environments:
            check_choice("--env", env_id, study.environments)
        for formulation in formulations:
            check_choice("--formulation", formulation, study.formulations)

        args.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(args.config, args.folder / "study.yml")
        results = Results(args.folder / "results.csv")
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        run_study(study, results, environments, formulations, args)
    except KeyboardInterrupt:
        print(f"Interrupted. Finished runs are saved in {results.path}; the same command resumes the study.")
        return
    study_results = results.select(study)
    score_ranges = {env_id: study.environments[env_id].score_range for env_id in study_results.environment.unique()}
    print(f"Report: {write_report(study_results, score_ranges, args.folder, study.steps)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sb3_vpg ablation",
        description="Compare formulations over environments and seeds. The same search selects a learning rate for each "
        "formulation. Gradient statistics are computed on the same data. An interrupted study resumes where it stopped.",
    )
    parser.add_argument("--config", type=Path, default=HYPERPARAMS / "ablation" / "ladder.yml", help="YAML file of the study")
    parser.add_argument("-f", "--folder", type=Path, default=Path("ablation"), help="folder of results.csv and the report")
    parser.add_argument("--env", nargs="+", help="environments to run (default: all of the study)")
    parser.add_argument("--formulation", nargs="+", help="formulations to run (default: all of the study)")
    parser.add_argument("--seeds", type=int, default=10, help="number of runs with the selected learning rate")
    parser.add_argument("--search-seeds", type=int, default=2, help="number of runs with each learning rate of the search")
    parser.add_argument("--statistics-seeds", type=int, default=3, help="number of runs that measure gradients; 0 for none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of parallel runs, one thread each")
    return parser.parse_args()


def keep_settings(config: Path, copy: Path) -> None:
    """
    Copy the settings of a study into its folder.

    :param config: the YAML file of the study
    :param copy: path of the copy
    :raises ValueError: if the folder has results of a study with other settings
    """
    if not copy.is_file():
        shutil.copyfile(config, copy)
    elif copy.read_bytes() != config.read_bytes():
        raise ValueError(f"{copy.parent} has results of a study with other settings than {config}: choose another --folder")


def run_study(
    study: Study, results: Results, environments: list[str], formulations: list[str], args: argparse.Namespace
) -> None:
    """Execute all runs that have no results yet, one environment after the other."""
    searched = formulations
    if args.statistics_seeds > 0:
        searched = list(dict.fromkeys([*formulations, study.statistics.policy_of]))
    n_searches = len(searched) * len(study.learning_rates) * args.search_seeds
    n_runs = len(environments) * (n_searches + len(formulations) * args.seeds + args.statistics_seeds)
    # Inherited by the worker processes. For small networks, one thread is faster than several
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), initializer=prepare_process)
    with tqdm(total=n_runs, unit="run", smoothing=0) as progress:

        def execute_all(runs: Iterable[Run]) -> None:
            pending = {}
            for run in runs:
                if run in results:
                    progress.update()
                else:
                    pending[pool.submit(execute, study, run)] = run
            for future in as_completed(pending):
                results.add(pending[future], future.result())
                progress.update()

        try:
            for env_id in environments:
                progress.set_description(env_id)
                execute_all(study.search_runs(env_id, searched, args.search_seeds))
                chosen = results.chosen_learning_rates(env_id)
                execute_all(study.final_runs(env_id, {name: chosen[name] for name in formulations}, args.seeds))
                if args.statistics_seeds > 0:
                    execute_all(study.statistics_runs(env_id, chosen[study.statistics.policy_of], args.statistics_seeds))
        finally:
            # Waits for the runs that have started
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
