"""Shared by all tests."""

import multiprocessing as mp
import os
from typing import Any

import hypothesis
import pytest
import torch as th

# So that a failing assertion in a helper shows its values, as in a test
pytest.register_assert_rewrite("helpers")

# Workers of SubprocVecEnv and ranks are then forks of a process that has imported this, which takes seconds, once.
# PyTorch imports torch._dynamo when the first optimizer is made
mp.set_forkserver_preload(["stable_baselines3", "sb3_vpg", "torch._dynamo"])

# The same cases each time, few of them; HYPOTHESIS_PROFILE=thorough tries many others, and keeps what fails
hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Files whose tests share what takes seconds to make
ON_ONE_WORKER = {
    # Gradients of many episodes
    "gradients": ("diagnostics/test_gradients.py",),
    # The process of which workers and ranks are forks
    "processes": (
        *("common/test_checkpoint.py", "common/test_faults.py", "common/test_random_states.py"),
        *("distributed/test_training_in_ranks.py", "envs/test_exploring_starts.py", "test_vpg_environments.py"),
    ),
    # The warm Python, and what has been trained
    "installed": (
        *("integration/test_hub.py", "integration/test_hyperparameter_files.py", "integration/test_own_command_line.py"),
        *("integration/test_packaging.py", "integration/test_start_up_hook.py", "integration/test_compare_command.py"),
        *("integration/test_trained_agents.py", "integration/test_tutorials.py", "integration/test_zoo_commands.py"),
        "integration/test_watch_command.py",
    ),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: the tests of each group of files are given to one worker, and first; all other tests one by one."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((group for group, files in ON_ONE_WORKER.items() if file.endswith(files)), nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The networks are small: more threads only wait for each other."""
    th.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Device "auto" is the CPU, except in the tests of GPUs."""
    if "cuda" not in request.keywords:
        monkeypatch.setattr(th.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True, scope="session")
def no_logs_left_behind(tmp_path_factory: pytest.TempPathFactory):
    """Every model makes a log folder, in the system's temporary folder unless SB3 is told where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("logs")))
        yield
