import pytest
from gymnasium import wrappers


@pytest.fixture(autouse=True)
def time_limit_of_gymnasium(monkeypatch: pytest.MonkeyPatch):
    """rl_zoo3 replaces it for the whole process, once it is imported."""
    own = next(base for base in wrappers.TimeLimit.__mro__ if base.__module__.startswith("gymnasium."))
    for module in (wrappers, wrappers.common):
        monkeypatch.setattr(module, "TimeLimit", own)
