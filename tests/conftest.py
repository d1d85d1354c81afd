"""Shared by all tests."""

import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The networks are small: more threads only wait for each other."""
    th.set_num_threads(1)
