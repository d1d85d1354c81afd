"""Shared by all tests."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch as th
from helpers.installed import CHECKOUT, Environment, build_wheel

# The same cases each time, few of them; HYPOTHESIS_PROFILE=thorough tries many others, and keeps what fails
hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The networks are small: more threads only wait for each other."""
    th.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_logs_left_behind(tmp_path_factory: pytest.TempPathFactory):
    """Every model makes a log folder, in the system's temporary folder unless SB3 is told where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("logs")))
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    return build_wheel(CHECKOUT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment in which the wheel is installed."""
    return Environment(tmp_path_factory.mktemp("installed"), wheel)
