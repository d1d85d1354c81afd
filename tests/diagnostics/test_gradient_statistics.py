"""Gradient statistics, by hand and against the distributions that samples come from."""

import math

import numpy as np
import pytest
import torch as th
from helpers.gradients import NAMES, values

from sb3_vpg.diagnostics import (
    statistics_of,
)


def test_two_orthogonal_gradients_are_all_noise():
    statistics = values(statistics_of(th.tensor([[2.0, 0.0], [0.0, 2.0]])))
    assert statistics == {
        "mean_norm": pytest.approx(math.sqrt(2)),
        "variance": pytest.approx(4.0),
        "snr": 0.0,
        "pairwise_cosine": 0.0,
        "cosine_with_reference": 0.0,
        "noise_scale": math.inf,
    }


def test_by_hand():
    # g_i . g_j: 5, 2, 4 on the diagonal, 3, 2 (twice) beside it
    gradients = th.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    statistics = values(statistics_of(gradients, n_episodes=4))
    signal, mean_square = (3 + 2 + 2) / 3, 11 / 3
    assert statistics["mean_norm"] == pytest.approx(5 / 3)
    assert statistics["variance"] == pytest.approx(mean_square - signal)
    assert statistics["snr"] == pytest.approx(signal / (mean_square - signal))
    assert statistics["noise_scale"] == pytest.approx(4 * (mean_square - signal) / signal)
    cosines = [3 / math.sqrt(10), 2 / math.sqrt(20), 2 / math.sqrt(8)]
    assert statistics["pairwise_cosine"] == pytest.approx(np.mean(cosines))
    # The sums of the others are (1, 3), (2, 3), (3, 2)
    with_others = [5 / math.sqrt(5 * 10), 5 / math.sqrt(2 * 13), 4 / math.sqrt(4 * 13)]
    assert statistics["cosine_with_reference"] == pytest.approx(np.mean(with_others))


def test_equal_gradients_are_all_signal():
    statistics = values(statistics_of(th.ones(3, 4)))
    assert statistics["variance"] == pytest.approx(0, abs=1e-12)
    assert statistics["pairwise_cosine"] == pytest.approx(1)
    assert statistics["noise_scale"] == pytest.approx(0, abs=1e-12)
    assert statistics["snr"] > 1e10


def test_zero_gradients_have_no_signal_and_no_direction():
    statistics = values(statistics_of(th.zeros(3, 4)))
    assert statistics == {**dict.fromkeys(NAMES, 0.0), "noise_scale": math.inf}


def test_reference_is_compared_on_other_data_only():
    gradients, reference = th.tensor([[1.0, 0.0], [0.0, 1.0]]), th.tensor([[0.0, 3.0], [4.0, 0.0]])
    # With its own row of the reference each gradient would be orthogonal
    assert statistics_of(gradients, reference).cosine_with_reference.value == pytest.approx(1)


def test_the_gradient_of_an_update_averages_several():
    gradients = th.randn(8, 5, generator=th.Generator().manual_seed(0)) + 1
    one, four = statistics_of(gradients), statistics_of(gradients, n_per_update=4, n_episodes=3)
    assert four.variance.value == pytest.approx(one.variance.value / 4)
    assert four.snr.value == pytest.approx(4 * one.snr.value)
    assert four.noise_scale.value == pytest.approx(3 * one.noise_scale.value)


def test_unbiased_and_intervals_cover_the_truth():
    d, m, sigma, n_samples = 20, 32, 1.0, 300
    mean = th.full((d,), 0.3)
    truth = {"variance": d * sigma**2, "snr": 0.09 * d / (d * sigma**2), "noise_scale": 1 / 0.09}
    generator = th.Generator().manual_seed(0)
    samples = [
        statistics_of(mean + sigma * th.randn(m, d, generator=generator), n_bootstrap=200, seed=i) for i in range(n_samples)
    ]
    variance = np.mean([sample.variance.value for sample in samples])
    signal = np.mean([sample.snr.value * sample.variance.value for sample in samples])
    assert variance == pytest.approx(truth["variance"], rel=0.01)
    # The squared norm of the mean would be larger by d sigma^2 / m = 0.625
    assert signal == pytest.approx(0.09 * d, abs=0.1)
    for name, value in truth.items():
        covered = np.mean([getattr(s, name).low <= value <= getattr(s, name).high for s in samples])
        # Percentile intervals of 32 samples are somewhat too narrow
        assert 0.85 < covered < 0.99, name


@pytest.mark.parametrize("shape", [(1, 3), (3,)])
def test_one_gradient_has_no_variance(shape):
    with pytest.raises(ValueError, match="m >= 2"):
        statistics_of(th.ones(shape))


@pytest.mark.parametrize(("confidence", "low", "high"), [(0.4, 1, 1), (0.6, 0, 2)])
def test_half_of_what_lies_outside_an_interval_is_on_either_side(confidence, low, high):
    # The norm of the mean is how often the third gradient is drawn: 0, 1 and 2 times in a quarter, a half and a quarter of the
    # resamples, leaving out those of one gradient alone
    statistics = statistics_of(th.tensor([[0.0], [0.0], [3.0]]), confidence=confidence)
    assert statistics.mean_norm == (1, low, high)


def test_what_cannot_be_negative_is_not():
    """Neither by rounding, with equal gradients, nor in a resample with most of its weight on the largest one."""
    equal = [statistics_of(th.randn(1, 50, generator=th.manual_seed(i)).repeat(5, 1), n_bootstrap=0) for i in range(50)]
    for statistics in [*equal, statistics_of(th.tensor([[1.5], [1.0], [1.2]]))]:
        for name in ("variance", "snr", "noise_scale"):
            estimate = getattr(statistics, name)
            assert not any(number < 0 for number in (estimate.value, estimate.low, estimate.high)), (name, estimate)
