"""
Execute the notebooks of the course, once: the tests execute them, and the site shows what they printed and drew.

``python docs/course/execution.py`` executes those that have changed.
"""

import hashlib
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

COURSE = Path(__file__).parent
CHECKOUT = COURSE.parents[1]
NOTEBOOKS = sorted(COURSE.glob("*.ipynb"))
EXECUTED = CHECKOUT / "build" / "course"
#: Seconds until a cell is stopped
TIMEOUT = 600
#: Variables of the kernels. The caller may have chosen another backend, with which there are no pictures
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
#: Number of notebooks that are executed at a time
N_PROCESSES = 2


def can_execute(notebook: Path) -> bool:
    """:return: whether all that the notebook imports is installed. EnvPool has no wheels for Windows and for Python 3.10"""
    return "EnvPool" not in notebook.read_text() or find_spec("envpool") is not None


def standalone(notebook: Path) -> NotebookNode:
    """
    :param notebook: a notebook of the course
    :return: the notebook as a reader downloads it: its first cell writes the module that the notebooks share beside it
    """
    node = nbformat.read(notebook, as_version=4)
    module = (COURSE / "course.py").read_text().rstrip()
    node.cells.insert(
        0,
        nbformat.v4.new_code_cell(
            f"%%writefile course.py\n{module}", id="course-module"
        ),
    )
    return node


def executed(notebook: Path) -> NotebookNode:
    """
    Execute what a reader downloads, in an empty folder. The result is kept in ``build/course`` until the notebook, the package
    or a version of what it depends on changes.

    :param notebook: a notebook of the course
    :return: the notebook with its outputs; without outputs if it cannot be executed here
    :raises nbclient.exceptions.CellExecutionError: if a cell raises an error
    """
    if not can_execute(notebook):
        return nbformat.read(notebook, as_version=4)
    kept = EXECUTED / f"{notebook.stem}_{_state_of(notebook)}.ipynb"
    if not kept.exists():
        node = standalone(notebook)
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                node,
                timeout=TIMEOUT,
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
            )
            client.log.setLevel(logging.WARNING)
            # Errors only: the kernel warns of connections without encryption
            client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
            client.execute(env={**os.environ, **ENVIRONMENT})
        del node.cells[0]
        EXECUTED.mkdir(parents=True, exist_ok=True)
        # Another process may read it at the same time
        partial = kept.with_suffix(f".{os.getpid()}")
        nbformat.write(node, partial)
        partial.replace(kept)
        for old in set(EXECUTED.glob(f"{notebook.stem}_*.ipynb")) - {kept}:
            old.unlink(missing_ok=True)
    return nbformat.read(kept, as_version=4)


def execute_all() -> None:
    """Execute all notebooks that have changed."""
    with ThreadPoolExecutor(N_PROCESSES) as threads:
        list(threads.map(executed, NOTEBOOKS))


def _state_of(notebook: Path) -> str:
    return hashlib.sha256(notebook.read_bytes() + _state_of_package()).hexdigest()[:12]


@cache
def _state_of_package() -> bytes:
    files = [COURSE / "course.py", *sorted((CHECKOUT / "sb3_vpg").rglob("*.py"))]
    names = (
        "envpool",
        "gymnasium",
        "matplotlib",
        "numpy",
        "stable_baselines3",
        "torch",
    )
    versions = [version(name) for name in names if find_spec(name)]
    return b"".join(file.read_bytes() for file in files) + " ".join(versions).encode()


if __name__ == "__main__":
    execute_all()
