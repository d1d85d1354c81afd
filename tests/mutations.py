"""
How many faults do the tests catch? Plants each fault of ``mutations.toml`` in a copy of the checkout and runs tests there: ::

    python tests/mutations.py [-k TEXT] [--first N] [--processes 2] [--list]

A fault is caught if a test fails, or if the tests take longer than ten minutes, which is printed. It is an error if the text
to be replaced is not in its file, or more than once; if the tests do not run; if they fail without the fault. Exit status 0
if all faults are caught.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tomllib  # Python 3.11

CHECKOUT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "logs", "*.egg-info")
TIMEOUT = 600
# By pytest's exit code; with another one, the tests did not run
OUTCOMES = {0: "SURVIVED", 1: "caught", None: f"caught: longer than {TIMEOUT} s"}


class Fault(NamedTuple):
    """
    :param number: its place in the list, from 1
    :param file: in ``sb3_vpg/``
    :param find: text that occurs once in the file
    :param replace: what stands in its place then
    :param what: what is wrong then
    :param tests: files of tests, or single ones, as pytest takes them
    """

    number: int
    file: str
    find: str
    replace: str
    what: str
    tests: Sequence[str]

    def planted(self, checkout: Path) -> str:
        """
        :return: the file with the fault
        :raises ValueError: if the text is not there, or more than once
        """
        path = checkout / "sb3_vpg" / self.file
        source = path.read_text() if path.is_file() else ""
        if source.count(self.find) != 1:
            raise ValueError(f"{self.find!r} occurs {source.count(self.find)} times in sb3_vpg/{self.file}, not once")
        return source.replace(self.find, self.replace)


def expanded(tests: Sequence[str]) -> list[str]:
    """:return: the tests, with each pattern replaced by the files that match it, each file once"""
    found = [sorted(path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob(t)) if "*" in t else [t] for t in tests]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def run(original: Path, tests: Sequence[str], fault: Fault | None = None) -> tuple[str, str]:
    """:return: what came of it, and the test that failed or the end of the output"""
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        checkout = Path(folder) / "checkout"
        shutil.copytree(original, checkout)
        if fault is not None:
            try:
                (checkout / "sb3_vpg" / fault.file).write_text(fault.planted(original))
            except ValueError as error:
                return "ERROR", str(error)
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
        with (Path(folder) / "output").open("w+") as file:
            process = subprocess.Popen(
                command, cwd=checkout, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            code: int | None = None
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(TIMEOUT)
            # With the processes that the tests have started, and may have left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            file.seek(0)
            output = file.read()
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", output, re.MULTILINE)
    return OUTCOMES.get(code, "ERROR"), failed[1] if code == 1 and failed else output.strip().rpartition("\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="TEXT", default="", help="only faults with this text in their file or description")
    parser.add_argument("--first", metavar="N", type=int, default=1, help="begin with the N-th, where a run was stopped")
    parser.add_argument("--processes", type=int, default=2, help="faults at a time")
    parser.add_argument(
        "--list", action="store_true", help="print the faults, and which of their texts are not there; run nothing"
    )
    args = parser.parse_args()

    table = tomllib.loads((CHECKOUT / "tests" / "mutations.toml").read_text())
    every = [
        Fault(i, **{**x, "tests": expanded(x.get("tests", table["tests"][x["file"]]))})
        for i, x in enumerate(table["faults"], start=1)
    ]
    faults = [fault for fault in every if fault.number >= args.first and args.k in f"{fault.file}: {fault.what}"]

    if args.list:
        for fault in faults:
            print(f"{fault.number:4} {fault.file}: {fault.what}")
            try:
                fault.planted(CHECKOUT)
            except ValueError as error:
                print(f"     ERROR: {error}")
        return 0

    def try_out(fault: Fault) -> None:
        begin = time.monotonic()
        harmed = [f"{test} without it: {unharmed[test][1]}" for test in fault.tests if unharmed[test][0] != "SURVIVED"]
        outcome, detail = ("ERROR", harmed[0]) if harmed else run(original, fault.tests, fault)
        line = f"{fault.number:4} {outcome} in {time.monotonic() - begin:.0f} s  {fault.file}: {fault.what}  [{detail}]"
        print(line, flush=True)
        survivors.extend([] if outcome.startswith("caught") else [line])

    survivors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder, ThreadPoolExecutor(args.processes) as pool:
        # The checkout may be worked on meanwhile
        original = Path(shutil.copytree(CHECKOUT, Path(folder) / "original", ignore=NOT_COPIED))
        tests = sorted({test for fault in faults for test in fault.tests})
        unharmed = dict(zip(tests, pool.map(lambda test: run(original, [test]), tests)))
        list(pool.map(try_out, faults))
    n_caught = len(faults) - len(survivors)
    print(f"caught {n_caught} of {len(faults)} ({n_caught / max(len(faults), 1):.1%})", *survivors, sep="\n")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
