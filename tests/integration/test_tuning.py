"""
Searches for hyperparameters by several processes at once: the zoo's ``-optimize`` with a study in a journal file and in a
PostgreSQL server, as docs/tuning.md describes it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from helpers.installed import Environment, call, output_of, script_in, wait_until
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sb3_vpg.zoo.search_space import ESTIMATORS_WITH_BASELINES, sample_vpg_params

STUDY = ("--study-name", "vpg")
TRAIN = ("-m", "rl_zoo3.train", "--algo", "vpg", "--env", "CartPole-v1", "--num-threads", "1", *STUDY)
# One environment: a budget of 300 steps is then enough for rollouts of up to 32
SEARCH = (*TRAIN, "-optimize", "--no-optim-plots", "-f", "search", "-params", "n_envs:1", "--n-startup-trials", "2")
SHORT = ("-n", "300", "--n-evaluations", "1", "--eval-episodes", "1")
OPTUNA = ("-c", "from optuna.cli import main; main()")
ENDED = {TrialState.COMPLETE, TrialState.PRUNED}

# Imported by two workers through --gym-packages: neither goes on before the other is there
MEETING = """
import os, time
from pathlib import Path

folder = Path(os.environ["MEETING"])
(folder / str(os.getpid())).touch()
deadline = time.monotonic() + 120
while len(list(folder.iterdir())) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.001)
"""


def load_study(storage: str) -> optuna.Study:
    """The study as the zoo loads it: what ends with .log is a journal file."""
    return optuna.load_study(study_name="vpg", storage=journal(storage) if storage.endswith(".log") else storage)


def journal(file: str) -> JournalStorage:
    return JournalStorage(JournalFileBackend(file))


def study_of_one_trial(file: str) -> optuna.Study:
    """A new study in a journal file, with one trial that is complete."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(study_name="vpg", storage=journal(file), direction="maximize", sampler=sampler)
    trial = study.ask()
    sample_vpg_params(trial, n_envs=1)
    study.tell(trial, 9.0)
    return study


def two_at_once(installed: Environment, meeting: Path, *command: str) -> list[str]:
    """
    :param meeting: a folder that does not exist yet
    :return: the outputs of two processes that run the command, start searching at the same time and end well
    """
    meeting.mkdir()
    (installed.cwd / "meeting.py").write_text(MEETING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEETING", str(meeting))
        workers = [installed.start(*command, "--gym-packages", "meeting") for _ in range(2)]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output
    return outputs


def trials_of(output: str) -> set[int]:
    """Numbers of the trials that a worker says it has brought to an end."""
    return set(map(int, re.findall(r"Trial (\d+) (?:finished|pruned)", output)))


# ---------------------------------------------------------------------------------------------------------------
# Storages
# ---------------------------------------------------------------------------------------------------------------


def postgresql_program(name: str) -> Path:
    """:return: one of PostgreSQL's programs, which Debian does not put on the path"""
    on_path = shutil.which(name)
    candidates = [Path(on_path)] if on_path else sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not candidates:
        pytest.skip(f"PostgreSQL's {name} is neither on the path nor in /usr/lib/postgresql/*/bin")
    return candidates[-1]


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    The storage in a PostgreSQL server that is started for it and listens to the network, as far as this machine. A password is
    asked for, which PGPASSFILE has and the storage's address has not.
    """
    psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2, the driver for PostgreSQL, is missing")
    initdb, pg_ctl = postgresql_program("initdb"), postgresql_program("pg_ctl")
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        # The server refuses to run as root
        if shutil.which("runuser") is None or call("id", "postgres", cwd=Path("/")).returncode != 0:
            pytest.skip("PostgreSQL does not run as root, and there is no runuser or no user postgres to run it")
        prefix = ("runuser", "-u", "postgres", "--")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # pytest's own folders are closed to other users
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if prefix:
            shutil.chown(folder, "postgres")
        data, password_file = folder / "data", folder / "password"
        password_file.write_text("secret\n")
        make = ("--username=postgres", f"--pwfile={password_file}", "--auth=scram-sha-256", "--no-locale", "--encoding=UTF8")
        output_of(call(*prefix, initdb, "-D", data, "--no-sync", *make, cwd=folder))
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nfsync = off\n")
        output_of(call(*prefix, pg_ctl, "-D", data, "-l", folder / "log", "--wait", "start", cwd=folder))
        try:
            passwords = tmp_path_factory.mktemp("postgresql") / "passwords"
            passwords.write_text(f"127.0.0.1:{port}:*:*:secret\n")
            passwords.chmod(0o600)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PGPASSFILE", str(passwords))
                connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres")
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("CREATE ROLE vpg LOGIN PASSWORD 'secret'")
                    cursor.execute("CREATE DATABASE vpg OWNER vpg")
                connection.close()
                yield f"postgresql+psycopg2://vpg@127.0.0.1:{port}/vpg"
        finally:
            output_of(call(*prefix, pg_ctl, "-D", data, "--mode=immediate", "--wait", "stop", cwd=folder))


@pytest.fixture
def new_study_in_postgresql(installed: Environment, postgresql: str) -> str:
    """The storage in PostgreSQL, with an empty study: two workers that both make the tables get in each other's way."""
    create = ("create-study", "--storage", postgresql, *STUDY, "--direction", "maximize")
    output_of(installed.run_warm(*OPTUNA, *create))
    return postgresql


@pytest.fixture
def new_journal(tmp_path: Path) -> str:
    """The storage in a journal file that does not exist yet."""
    return str(tmp_path / "vpg.log")


# ---------------------------------------------------------------------------------------------------------------
# Two workers
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["new_journal", "new_study_in_postgresql"])
def test_two_workers_share_a_study(installed: Environment, tmp_path: Path, request: pytest.FixtureRequest, kind: str):
    storage: str = request.getfixturevalue(kind)
    search = (*SEARCH, *SHORT, "--storage", storage)

    numbers = list(map(trials_of, two_at_once(installed, tmp_path / "first", *search, "--n-trials", "3")))
    assert list(map(len, numbers)) == [3, 3]
    study = load_study(storage)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert sorted(numbers[0] | numbers[1]) == [trial.number for trial in study.trials] == list(range(6))
    first, second = ([study.trials[number] for number in sorted(of_one)] for of_one in numbers)
    assert first[0].datetime_start < second[-1].datetime_complete
    assert second[0].datetime_start < first[-1].datetime_complete

    # Each worker may begin its last trial at the same moment as the other
    two_at_once(installed, tmp_path / "second", *search, "--max-total-trials", "8")
    trials = load_study(storage).trials
    assert [trial.number for trial in trials] in (list(range(8)), list(range(9)))
    assert {trial.state for trial in trials} <= ENDED
    assert len({trial.params["learning_rate"] for trial in trials}) == len(trials)

    # The zoo takes trial 0 for none. Counted from the end any trial will do
    best = load_study(storage).best_trial
    number = best.number - len(trials)
    output = output_of(installed.run_warm(*TRAIN, "-n", "300", "-f", kind, "--storage", storage, "--trial-id", str(number)))
    estimator, baseline = ESTIMATORS_WITH_BASELINES[best.params["formulation"]]
    assert f"('estimator', '{estimator}')" in output
    assert f"('baseline', {baseline!r})" in output
    assert f"('learning_rate', {best.params['learning_rate']})" in output
    assert f"('n_steps', {best.user_attrs['n_steps']})" in output


# ---------------------------------------------------------------------------------------------------------------
# Stopping and going on
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal_number", "status", "state"),
    [
        (signal.SIGINT, 0, TrialState.FAIL),
        (signal.SIGTERM, 0, TrialState.FAIL),
        (signal.SIGKILL, -signal.SIGKILL, TrialState.RUNNING),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_search_that_was_stopped_goes_on(
    installed: Environment, new_journal: str, signal_number: signal.Signals, status: int, state: TrialState
):
    study = study_of_one_trial(new_journal)
    search = (*SEARCH, "--storage", new_journal, "--max-total-trials", "2")
    worker = installed.start(*search, "-n", "100000000", "--n-evaluations", "1")
    wait_for_trial(study, 1, worker, new_journal)
    worker.send_signal(signal_number)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == status, output
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, state]

    # One that was killed counts as running until the study is told
    tell = ("tell", "--storage", new_journal, "--storage-class", "JournalFileBackend", *STUDY, "--trial-number", "1")
    output_of(installed.run_warm(*OPTUNA, *tell, "--state", "fail", "--skip-if-finished"))
    assert study.trials[1].state == TrialState.FAIL
    output_of(installed.run_warm(*search, *SHORT))
    assert [trial.state in ENDED for trial in study.trials] == [True, False, True]


def wait_for_trial(study: optuna.Study, number: int, worker: subprocess.Popen[str], file: str) -> None:
    """
    Wait until the worker trains the trial with this number: it has drawn its hyperparameters, and no longer locks the file.
    A signal while Optuna removes the lock would make it fail to remove it again.
    """

    def trains() -> bool:
        # The last attribute that is written
        drawn = len(study.trials) > number and "batch_size" in study.trials[number].user_attrs
        return drawn and not any(Path(file).parent.glob("*.lock*"))

    wait_until(trains, worker)


# ---------------------------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------------------------


def test_an_entry_written_from_a_trial_trains_the_same(installed: Environment, new_journal: str):
    study_of_one_trial(new_journal)
    train = (*TRAIN, "-n", "300", "--seed", "1", "-f", "found_by_search")
    found = ("--storage", new_journal, "--trial-id", "-1", "-params", "n_envs:1")
    output_of(installed.run_warm(*train, *found))

    script = script_in("tuning.md")
    process = installed.run_warm("-c", script, "found_by_search/vpg/CartPole-v1_1/CartPole-v1/config.yml")
    output_of(process)
    (installed.cwd / "found.yml").write_text(process.stdout)
    output_of(installed.run_warm(*train, "-conf", "found.yml"))

    agents = [f"found_by_search/vpg/CartPole-v1_{run}/CartPole-v1.zip" for run in (1, 2)]
    same = """
import sys
from sb3_vpg import VPG
first, second = (VPG.load(agent).policy.state_dict() for agent in sys.argv[1:])
print(all(first[name].equal(second[name]) for name in first))
"""
    assert output_of(installed.run_warm("-c", same, *agents)) == "True\n"
