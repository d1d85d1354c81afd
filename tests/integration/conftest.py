"""What takes long to make: once for all tests."""

import shutil
from pathlib import Path

import pytest
from helpers.agents import AGENTS
from helpers.installed import CHECKOUT, Environment, build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    return build_wheel(CHECKOUT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment in which the wheel is installed."""
    return Environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="session")
def beside_agents(installed: Environment) -> Environment:
    """The environment of the wheel, with a copy of the agents in its working folder."""
    shutil.copytree(AGENTS, installed.cwd / "rl-trained-agents")
    return installed
