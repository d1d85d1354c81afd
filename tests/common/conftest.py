"""Shared by the tests of checkpoints and random states."""

from pathlib import Path

import pytest
from helpers.models import cartpole_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little."""
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    cartpole_model().learn(64).save(path)
    return path
