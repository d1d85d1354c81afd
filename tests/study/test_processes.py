"""Jobs in processes of their own: results, progress, errors, crashes and a full disk."""

import errno
import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from sb3_vpg.study import processes
from sb3_vpg.study.processes import Event, in_processes


@pytest.fixture(autouse=True)
def little_preloaded(monkeypatch: pytest.MonkeyPatch):
    """The jobs of these tests need no zoo."""
    monkeypatch.setattr(processes, "PRELOADED", ["sb3_vpg.study.processes"])


def job(task: str, report) -> str:
    report(0.5)
    print("output of", task)
    os.write(2, f"from C: {task}\n".encode())
    if task == "raises":
        raise ValueError("in\ntwo lines")
    if task == "raises a long text":
        raise ValueError("long " * 100_000)
    if task == "crashes":
        os._exit(7)
    if task == "is killed in a message":
        # The first half of the length of a message, to the only pipe of the process
        os.write(report.__closure__[0].cell_contents.fileno(), b"\0\0")
        os._exit(7)
    if task == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if task == "sleeps":
        time.sleep(60)
    return task


JOB = f"{__name__}:job"


def events_of(tmp_path: Path, *tasks: str, n_processes: int = 2) -> list[Event]:
    jobs = ((task, (task,)) for task in tasks)
    with closing(in_processes(JOB, jobs, n_processes, tmp_path / "output.log")) as events:
        return list(events)


def test_each_job_reports_its_progress_and_ends_once(tmp_path: Path):
    events = events_of(tmp_path, "a", "b", "raises", "crashes")
    ended = {event.key: (event.result, event.error) for event in events if event.progress == 1}
    assert ended == {
        "a": ("a", None),
        "b": ("b", None),
        "raises": (None, "ValueError: in two lines"),
        "crashes": (None, "the process ended with exit code 7"),
    }
    assert [event.progress for event in events if event.key == "a"] == [0.5, 1]
    output = (tmp_path / "output.log").read_text()
    assert "output of a\n" in output
    assert "from C: a\n" in output
    assert "Traceback" in output


def test_a_job_that_is_killed_in_the_middle_of_a_message_is_an_error_of_that_job(tmp_path: Path):
    ended = [event for event in events_of(tmp_path, "is killed in a message", "a") if event.progress == 1]
    assert {event.key: event.error for event in ended} == {
        "is killed in a message": "the process ended with exit code 7",
        "a": None,
    }


def test_the_text_of_an_error_has_an_end(tmp_path: Path):
    (event,) = (event for event in events_of(tmp_path, "raises a long text") if event.progress == 1)
    assert event.error.startswith("ValueError: long long")
    assert len(event.error) == 2000


def test_a_full_disk_is_not_an_error_of_the_job_but_the_end(tmp_path: Path):
    with pytest.raises(OSError, match=r"a run cannot write its files: .*No space left on device"):
        events_of(tmp_path, "disk", "a")


def test_closing_ends_the_processes(tmp_path: Path):
    begin = time.monotonic()
    with closing(in_processes(JOB, [("sleeps", ("sleeps",))], 1, tmp_path / "output.log")) as events:
        assert next(events) == Event("sleeps", 0.5)
    assert time.monotonic() - begin < 30
