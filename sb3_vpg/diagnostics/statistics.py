"""
Statistics of independent estimates of a policy gradient at a fixed policy.

``g_1 .. g_m`` are the gradients of m independent batches, each the gradient of one update. ``G`` is their expectation and
``Sigma`` their covariance. All statistics are functions of the inner products ``g_i . g_j``::

    |G|^2       mean of g_i . g_j over i != j               unbiased, unlike the squared norm of the mean
    tr(Sigma)   mean of g_i . g_i  -  |G|^2                 sample variance, summed over the parameters
    SNR         |G|^2 / tr(Sigma)                           Roberts & Tedrake (2009)
    cosines     mean of cos(g_i, g_j) over i != j           Ilyas et al. (2020), https://arxiv.org/abs/1811.02553
    noise scale episodes per batch x tr(Sigma) / |G|^2      McCandlish et al. (2018), https://arxiv.org/abs/1812.06162
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_vpg.estimators import Array

# Number of parameters that are converted to double precision at a time, for the inner products
GRAM_COLUMNS = 2**16


class Estimate(NamedTuple):
    """A statistic (``value``) and its bootstrap interval (``low`` to ``high``)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GradientStatistics:
    """
    Statistics of the gradient of one update. The docstring of the module defines G and Sigma.

    :param mean_norm: norm of the mean gradient, >= 0. It overestimates \\|G\\|: its square exceeds \\|G\\|^2 by tr(Sigma) / m.
    :param variance: tr(Sigma), the variance of the gradient summed over the parameters, >= 0. It depends on the scale of
        psi_t, so compare it only between formulations of the same scale.
    :param snr: signal-to-noise ratio, \\|G\\|^2 / tr(Sigma), >= 0. 0 if the estimate of \\|G\\|^2 is not positive. Larger: a
        more reliable gradient. Values far below 1 are typical.
    :param pairwise_cosine: mean cosine of two gradients, in [-1, 1]. 1: all batches agree on the direction; 0: they do not
        agree at all.
    :param cosine_with_reference: mean cosine, in [-1, 1], of a gradient and the mean of the reference's gradients from all
        *other* batches. Smaller: more noise, or a biased direction.
    :param noise_scale: number of episodes in a batch at which tr(Sigma) equals \\|G\\|^2; infinite if ``snr`` is 0. In a much
        smaller batch, noise dominates.
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
    :param reference: gradients with which directions are compared: estimates from the same batches, same shape. None for
        ``gradients`` themselves
    :param n_per_update: number of estimates that one update averages, >= 1
    :param n_episodes: number of episodes of each estimate
    :param confidence: confidence level of the intervals, in (0, 1]
    :param n_bootstrap: number of resamples of the m estimates for the intervals (percentile bootstrap). Pairs within a
        resample are also pairs of different estimates. Typical: 1000 to 10000; 0 for no intervals.
    :param seed: seed of the bootstrap
    :return: the statistics of the gradient of an update
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
    # Number of times each estimate is drawn: row 0 is the data, the other rows are the resamples
    counts = np.concatenate([np.ones((1, m)), resamples])
    products = _gram(gradients, gradients)

    all_pairs = ((counts @ products) * counts).sum(axis=1)
    squares = np.diag(products)
    n_pairs = m**2 - (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = (all_pairs - counts**2 @ squares) / n_pairs
        variance = (counts @ squares / m - signal).clip(min=0) / n_per_update
        noise_to_signal = np.where(signal > 0, variance / signal, np.inf)
        cosines = _cosines(products, squares[:, None], squares)
        pairwise_cosine = (((counts @ cosines) * counts).sum(axis=1) - counts**2 @ np.diag(cosines)) / n_pairs
        samples = {
            "mean_norm": np.sqrt(all_pairs.clip(min=0)) / m,
            "variance": variance,
            "snr": 1 / noise_to_signal,
            "pairwise_cosine": pairwise_cosine,
            "cosine_with_reference": _cosines_with_others(products, gradients, reference, counts),
            "noise_scale": noise_to_signal * n_per_update * n_episodes,
        }
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    estimates = {}
    for name, values in samples.items():
        # A resample that consists of a single estimate has no pairs
        resampled = values[1:][n_pairs[1:] > 0]
        low, high = np.quantile(resampled, tails, method="nearest") if len(resampled) else (np.nan, np.nan)
        estimates[name] = Estimate(float(values[0]), float(low), float(high))
    return GradientStatistics(**estimates)


def _gram(left: th.Tensor, right: th.Tensor) -> Array:
    """:return: inner products of the rows of ``left`` and ``right``"""
    products = sum(
        a.double() @ b.double().T for a, b in zip(left.split(GRAM_COLUMNS, dim=1), right.split(GRAM_COLUMNS, dim=1))
    )
    return products.cpu().numpy()


def _cosines(products: Array, squares: Array, other_squares: Array) -> Array:
    """:return: cosines from inner products and squared norms; 0 if one of the vectors is zero"""
    norms = np.sqrt(squares.clip(min=0) * other_squares.clip(min=0))
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)


def _cosines_with_others(products: Array, gradients: th.Tensor, reference: th.Tensor, counts: Array) -> Array:
    """:return: mean over i of cos(g_i, sum of the reference's gradients other than the i-th), for each row of ``counts``"""
    if reference is gradients:
        cross_products = reference_products = products
    else:
        cross_products, reference_products = _gram(gradients, reference), _gram(reference, reference)
    # Inner products of g_i with the sum of all reference gradients, minus the i-th term
    inner = counts @ cross_products.T - counts * np.diag(cross_products)
    # Squared norm of the sum of all reference gradients without the i-th
    with_sum = counts @ reference_products
    total = (with_sum * counts).sum(axis=1, keepdims=True)
    squares = total - 2 * counts * with_sum + counts**2 * np.diag(reference_products)
    return (_cosines(inner, np.diag(products), squares) * counts).sum(axis=1) / counts.sum(axis=1)
