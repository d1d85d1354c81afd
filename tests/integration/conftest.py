"""
What takes long to make: once for all tests, whichever of pytest-xdist's workers run them. Each worker has a folder of its own
in which processes run.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.agents import AGENTS
from helpers.installed import CHECKOUT, Environment, build_wheel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are slow: they install packages, start processes or train whole agents."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("slow")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """:return: a folder of this name that the first worker has made and filled"""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    (wheel,) = made_once(tmp_path_factory, "wheel", lambda folder: build_wheel(CHECKOUT, folder)).glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Environment]:
    """An environment in which the wheel is installed."""
    cwd = tmp_path_factory.mktemp("cwd")
    folder = made_once(tmp_path_factory, "installed", lambda folder: Environment.make(folder / "env", cwd, wheel))
    environment = Environment(folder / "env", cwd)
    yield environment
    environment.close()


@pytest.fixture(scope="session")
def beside_agents(installed: Environment) -> Environment:
    """The environment of the wheel, with a copy of the agents in its working folder."""
    shutil.copytree(AGENTS, installed.cwd / "rl-trained-agents")
    return installed
