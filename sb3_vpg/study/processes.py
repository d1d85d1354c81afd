"""Execute jobs in parallel, each in a process of its own: a crash ends one job only."""

import errno
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

#: The module that does the work of a study, and imports the zoo
TRAINING = "sb3_vpg.study.training"
#: Processes are forks of one that has imported these modules. Making an optimizer imports the second one, which takes seconds
PRELOADED = [TRAINING, "torch._dynamo"]

#: Longest error in characters; output.log has all of it
MAX_ERROR = 2000
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class Event(NamedTuple):
    """
    News of a job.

    :param key: the key of the job
    :param progress: finished fraction
    :param result: result of the finished job
    :param error: error of the failed job; None for no error
    """

    key: Any
    progress: float = 1.0
    result: Any = None
    error: str | None = None


def in_processes(
    function: str, jobs: Iterable[tuple[Any, tuple]], n_processes: int, output: Path
) -> Generator[Event, None, None]:
    """
    Call a function for each job. Closing the generator ends all processes, and so does the death of this one.

    :param function: module and name, such as "sb3_vpg.study.training:execute": only the processes import it. Called with the
        arguments of a job, and a function to report the finished fraction
    :param jobs: key and arguments of each job; taken when a process is free
    :param n_processes: number of parallel processes
    :param output: file to which the processes append their output
    :return: events of all jobs; the last event of a job has the progress 1
    :raises OSError: if the disk is full, or the output cannot be written
    """
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload(PRELOADED)
    waiting = iter(jobs)
    running: dict[Any, tuple[Any, Any]] = {}
    try:
        while True:
            while len(running) < n_processes and (job := next(waiting, None)) is not None:
                key, arguments = job
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(function, arguments, sender, output))
                process.start()
                sender.close()
                running[receiver] = process, key
            if not running:
                return
            ready: Any
            for ready in wait(list(running)):
                process, key = running[ready]
                try:
                    event = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    event = Event(None, error=f"the process ended with exit code {process.exitcode}")
                if isinstance(event, OSError):
                    raise OSError(f"a run cannot write its files: {event}") from event
                if event.progress == 1.0:
                    del running[ready]
                    process.join()
                yield event._replace(key=key)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _work(function: str, arguments: tuple, sender: Connection, output: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    news: Event | OSError
    try:
        with output.open("a", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            for descriptor in (1, 2):
                # What libraries in C print
                os.dup2(sys.stdout.fileno(), descriptor)
            try:
                # A finished job is reported with its result
                result = pkgutil.resolve_name(function)(
                    *arguments, lambda progress: sender.send(Event(None, min(progress, 0.99)))
                )
                news = Event(None, result=result)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    raise
                traceback.print_exc()
                news = Event(None, error=" ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR])
    except OSError as error:
        news = error
    sender.send(news)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
