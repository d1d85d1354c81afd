"""Weights and optimizer, compared bit for bit."""

import copy

import torch as th


def state_of(model):
    return copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))


def assert_equal(first, second):
    """Bit for bit, whatever is nested in what."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second):
            assert_equal(a, b)
    elif isinstance(first, th.Tensor):
        assert th.equal(first, second)
    else:
        assert first == second
