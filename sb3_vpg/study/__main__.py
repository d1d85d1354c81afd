"""``python -m sb3_vpg ablation``: run an ablation study, or go on with it, and write its report."""

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
        print(f"Interrupted. The runs that have ended are in {results.path}; the same command goes on from there.")
        return
    of_study = results.of(study)
    score_ranges = {env_id: study.environments[env_id].score_range for env_id in of_study.environment.unique()}
    print(f"Report: {write_report(of_study, score_ranges, args.folder, study.steps)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sb3_vpg ablation",
        description="Formulations x environments x seeds, the learning rate of each formulation chosen by the same search, "
        "and statistics of their gradients. A study that was interrupted goes on where it was.",
    )
    parser.add_argument("--config", type=Path, default=HYPERPARAMS / "ablation" / "ladder.yml", help="YAML file of the study")
    parser.add_argument("-f", "--folder", type=Path, default=Path("ablation"), help="for results.csv and the report")
    parser.add_argument("--env", nargs="+", help="environments of the study; all by default")
    parser.add_argument("--formulation", nargs="+", help="formulations of the study; all by default")
    parser.add_argument("--seeds", type=int, default=10, help="runs with the chosen learning rate")
    parser.add_argument("--search-seeds", type=int, default=2, help="runs with each learning rate of the search")
    parser.add_argument("--statistics-seeds", type=int, default=3, help="runs at which gradients are measured; 0 for none")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    return parser.parse_args()


def keep_settings(config: Path, copy: Path) -> None:
    """
    Copy the settings of a study into its folder.

    :raises ValueError: if the folder is that of a study with other settings
    """
    if not copy.is_file():
        shutil.copyfile(config, copy)
    elif copy.read_bytes() != config.read_bytes():
        raise ValueError(f"{copy.parent} holds results of other settings than those of {config}: choose another --folder")


def run_study(
    study: Study, results: Results, environments: list[str], formulations: list[str], args: argparse.Namespace
) -> None:
    """Do all runs that have not been done, environment by environment."""
    searched = formulations
    if args.statistics_seeds > 0:
        searched = list(dict.fromkeys([*formulations, study.statistics.policy_of]))
    n_searches = len(searched) * len(study.learning_rates) * args.search_seeds
    n_runs = len(environments) * (n_searches + len(formulations) * args.seeds + args.statistics_seeds)
    # Inherited by the processes: the networks are small, more threads only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), initializer=prepare_process)
    with tqdm(total=n_runs, unit="run", smoothing=0) as progress:

        def do(runs: Iterable[Run]) -> None:
            waiting = {}
            for run in runs:
                if run in results:
                    progress.update()
                else:
                    waiting[pool.submit(execute, study, run)] = run
            for future in as_completed(waiting):
                results.add(waiting[future], future.result())
                progress.update()

        try:
            for env_id in environments:
                progress.set_description(env_id)
                do(study.search_runs(env_id, searched, args.search_seeds))
                chosen = results.chosen_learning_rates(env_id)
                do(study.final_runs(env_id, {name: chosen[name] for name in formulations}, args.seeds))
                if args.statistics_seeds > 0:
                    do(study.statistics_runs(env_id, chosen[study.statistics.policy_of], args.statistics_seeds))
        finally:
            # Runs under way end, or a process that failed has ended them
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
