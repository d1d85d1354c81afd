"""The package as users have it: built as a wheel and installed in an environment of its own, away from the checkout."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
HYPERPARAMS = {
    path.relative_to(CHECKOUT).with_suffix("").as_posix(): path for path in sorted((CHECKOUT / "hyperparams").rglob("*.yml"))
}
WARM = Path(__file__).parent / "warm_python.py"
CLIENT = Path(__file__).parent / "warm_python_client.py"
HOOK_OFF = {"SB3_VPG_NO_ZOO_HOOK": "1"}


def script_in(page: str) -> str:
    """:return: the one Python block of a page in docs/"""
    (script,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / page).read_text(), re.DOTALL)
    return script


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """
    :param env: environment variables on top of those of the tests
    :return: the finished process, whatever its exit status
    """
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables_for(env), capture_output=True, text=True, timeout=300
    )


def variables_for(env: dict[str, str] | None = None) -> dict[str, str]:
    """Environment variables for a process, with these on top of those of the tests."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SB3_VPG_"))}
    return variables | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}


def output_of(process: subprocess.CompletedProcess[str]) -> str:
    """
    :return: what the process wrote to stdout and stderr
    :raises AssertionError: if it failed
    """
    output = process.stdout + process.stderr
    assert process.returncode == 0, f"{process.args} failed with {process.returncode}:\n{output}"
    return output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """
    :param condition: what is waited for, two minutes at most
    :param process: brings it about
    :raises AssertionError: if the process ends before, or it takes longer
    """
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def heed_interruptions() -> None:
    """For a process that is to be interrupted: a shell lets what it starts in the background ignore that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def build_wheel(source: Path, folder: Path) -> Path:
    """
    :param source: a checkout or an unpacked source distribution
    :return: the wheel, built offline with the build backend that is installed
    """
    output_of(call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """
    A virtual environment with the wheel in it, see :meth:`make`.

    :param folder: where it is
    :param cwd: the folder in which its processes run: tests that write files do so there
    """

    def __init__(self, folder: Path, cwd: Path):
        self.cwd = cwd
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site_packages = Path(self.evaluate("sysconfig.get_path('purelib')"))
        self._server: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, folder: Path, cwd: Path, wheel: Path, without: tuple[str, ...] = ()) -> "Environment":
        """
        Make a virtual environment. Dependencies come from the environment that runs the tests: its site-packages stand behind
        the new environment's own on the path. None of the .pth files in there is run, and so an editable install of the
        checkout is not seen.

        :param folder: where to make it
        :param cwd: the folder in which its processes run
        :param wheel: what to install
        :param without: start of the names in site-packages that are to be missing
        """
        venv.create(folder, symlinks=os.name != "nt", with_pip=False)
        self = cls(folder, cwd)
        outer = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
        if without:
            outer = [_view(path, folder / f"view_{i}", without) for i, path in enumerate(outer)]
        (self.site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in outer))
        pip = [sys.executable, "-m", "pip", "--python", self.python]
        output_of(call(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=cwd))

        for module in ("sb3_vpg", "sb3_vpg_zoo_hook"):
            found = self.evaluate(f"importlib.util.find_spec({module!r}).origin")
            assert found.startswith(str(self.site_packages)), f"{module} would be imported from {found}, not from the wheel"
        assert str(CHECKOUT) not in self.evaluate("sys.path")
        return self

    def run(self, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python with these arguments, in the folder ``cwd``."""
        return call(self.python, *arguments, cwd=self.cwd, env=env)

    @cached_property
    def warm_python(self) -> Path:
        """
        A program that does as ``python`` does, without the seconds for imports: in a fork of a Python that has imported what
        the zoo needs (Stable-Baselines3, Optuna, the Hub's package ...), but neither the zoo nor the package.
        """
        # A socket must have a short path
        folder = Path(tempfile.mkdtemp())
        program = folder / "python"
        program.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
        program.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            number = listener.fileno()
            command = [self.python, "-c", WARM.read_text(), str(number)]
            self._server = subprocess.Popen(
                command, cwd=self.cwd, env=variables_for(HOOK_OFF), stdin=subprocess.PIPE, pass_fds=[number]
            )
        return program

    def run_warm(self, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """The same as :meth:`run`, by ``warm_python``."""
        return call(self.warm_python, *arguments, cwd=self.cwd, env=env)

    def close(self) -> None:
        """End what ``warm_python`` has started."""
        if self._server is not None:
            self._server.communicate()
            shutil.rmtree(self.warm_python.parent)

    def start(
        self, *arguments: str | Path, before: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """
        As :meth:`run_warm`, without waiting for its end.

        :param before: a command that runs what follows it; this is then ``python``, as in :meth:`run`
        """
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [*before, str(self.python if before else self.warm_python), *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.cwd, env=variables_for(env), preexec_fn=heed_interruptions, **pipes)

    def evaluate(self, expression: str, env: dict[str, str] | None = None) -> str:
        """
        :return: what ``print(expression)`` prints in this environment
        """
        script = f"import importlib.util, sys, sysconfig; print({expression})"
        process = self.run("-c", script, env=env)
        output_of(process)
        return process.stdout.strip()


def _view(site_packages: Path, view: Path, without: tuple[str, ...]) -> Path:
    view.mkdir()
    for entry in site_packages.iterdir():
        if not entry.name.startswith(without):
            (view / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return view
