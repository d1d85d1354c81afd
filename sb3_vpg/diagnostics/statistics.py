"""
How noisy is a policy gradient? Statistics of independent estimates of it at a frozen policy.

``g_1 .. g_m`` are the gradients that m independent batches give, each as one update would see it; ``G`` is their expectation
and ``Sigma`` their covariance. All statistics are functions of the inner products ``g_i . g_j`` alone::

    |G|^2       mean of g_i . g_j over i != j               unbiased, unlike the squared norm of the mean
    tr(Sigma)   mean of g_i . g_i  -  |G|^2                 the sample variance, summed over the parameters
    SNR         |G|^2 / tr(Sigma)                           Roberts & Tedrake (2009)
    cosines     mean of cos(g_i, g_j) over i != j           Ilyas et al. (2020), https://arxiv.org/abs/1811.02553
    noise scale episodes per batch x tr(Sigma) / |G|^2      McCandlish et al. (2018), https://arxiv.org/abs/1812.06162
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_vpg.estimators import Array

# Inner products are summed over so many parameters at a time, in double precision
GRAM_COLUMNS = 2**16


class Estimate(NamedTuple):
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GradientStatistics:
    """
    Statistics of the gradient that one update would use; see the head of the module.

    :param mean_norm: norm of the mean of all gradients, in which noise is left: its square exceeds \\|G\\|^2 by tr(Sigma) / m
    :param variance: tr(Sigma), the variance of the gradient summed over the parameters
    :param snr: signal-to-noise ratio, \\|G\\|^2 / tr(Sigma); 0 where the noise hides the signal (the estimate of \\|G\\|^2 is
        not positive)
    :param pairwise_cosine: mean cosine of two gradients
    :param cosine_with_reference: mean cosine of a gradient and the mean of the reference's gradients from all *other* data
    :param noise_scale: number of episodes in a batch at which tr(Sigma) would be \\|G\\|^2; infinite where ``snr`` is 0
    """

    mean_norm: Estimate
    variance: Estimate
    snr: Estimate
    pairwise_cosine: Estimate
    cosine_with_reference: Estimate
    noise_scale: Estimate


def statistics_of(
    gradients: th.Tensor,
    reference: th.Tensor | None = None,
    *,
    n_per_update: int = 1,
    n_episodes: float = 1,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> GradientStatistics:
    """
    :param gradients: independent estimates of a gradient, shape (m, number of parameters), m >= 2
    :param reference: what to compare the directions with, estimates from the same data, of the same shape; None for
        ``gradients`` themselves
    :param n_per_update: how many of the estimates one update averages
    :param n_episodes: episodes behind each of the estimates
    :param confidence: of the intervals, in (0, 1)
    :param n_bootstrap: resamples of the m estimates behind the intervals (percentile bootstrap; pairs are pairs of different
        estimates in a resample, too)
    :param seed: of the bootstrap
    :return: the statistics of an update's gradient
    :raises ValueError: if there are fewer than two estimates, or the shapes differ
    """
    reference = gradients if reference is None else reference
    if gradients.ndim != 2 or len(gradients) < 2 or reference.shape != gradients.shape:
        raise ValueError(
            "gradients and reference must have one shape (m, number of parameters) with m >= 2, "
            f"got {tuple(gradients.shape)} and {tuple(reference.shape)}"
        )
    m = len(gradients)
    resamples = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=n_bootstrap)
    # How often each estimate is drawn: first the data themselves, then the resamples
    counts = np.concatenate([np.ones((1, m)), resamples])
    products = _gram(gradients, gradients)

    every_pair = ((counts @ products) * counts).sum(axis=1)
    squares = np.diag(products)
    n_pairs = m**2 - (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = (every_pair - counts**2 @ squares) / n_pairs
        variance = (counts @ squares / m - signal) / n_per_update
        noise_to_signal = np.where(signal > 0, variance / signal, np.inf)
        cosines = _cosines(products, squares[:, None], squares)
        pairwise_cosine = (((counts @ cosines) * counts).sum(axis=1) - counts**2 @ np.diag(cosines)) / n_pairs
        samples = {
            "mean_norm": np.sqrt(every_pair.clip(min=0)) / m,
            "variance": variance.clip(min=0),
            "snr": 1 / noise_to_signal,
            "pairwise_cosine": pairwise_cosine,
            "cosine_with_reference": _cosines_with_others(products, gradients, reference, counts),
            "noise_scale": noise_to_signal * n_per_update * n_episodes,
        }
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    estimates = {}
    for name, values in samples.items():
        # A resample of one estimate alone has no pairs
        resampled = values[1:][n_pairs[1:] > 0]
        low, high = np.quantile(resampled, tails, method="nearest") if len(resampled) else (np.nan, np.nan)
        estimates[name] = Estimate(float(values[0]), float(low), float(high))
    return GradientStatistics(**estimates)


def _gram(left: th.Tensor, right: th.Tensor) -> Array:
    """:return: inner products of the rows, shape (number of rows, number of rows)"""
    products = sum(
        a.double() @ b.double().T for a, b in zip(left.split(GRAM_COLUMNS, dim=1), right.split(GRAM_COLUMNS, dim=1))
    )
    return products.cpu().numpy()


def _cosines(products: Array, squares: Array, other_squares: Array) -> Array:
    """Cosines from inner products; 0 where one of the vectors is zero and has no direction."""
    norms = np.sqrt(squares.clip(min=0) * other_squares.clip(min=0))
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)


def _cosines_with_others(products: Array, gradients: th.Tensor, reference: th.Tensor, counts: Array) -> Array:
    """:return: mean over i of cos(g_i, sum of the reference's gradients other than the i-th), for each row of ``counts``"""
    if reference is gradients:
        between = among = products
    else:
        between, among = _gram(gradients, reference), _gram(reference, reference)
    # The sum over j with count c_j, less the terms of i itself
    inner = counts @ between.T - counts * np.diag(between)
    toward = counts @ among
    whole = (toward * counts).sum(axis=1, keepdims=True)
    squares = whole - 2 * counts * toward + counts**2 * np.diag(among)
    return (_cosines(inner, np.diag(products), squares) * counts).sum(axis=1) / counts.sum(axis=1)
