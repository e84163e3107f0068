"""Estimates of noise and coherence from lengths and inner products of the gradients of images, with jackknife intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitscope.stats.intervals import t_quantile

#: ``(sum q)^2 / sum q^2`` of the squared lengths q below which moments have no interval: few images make the sums. Intervals of
#: 128 and 256 images whose lengths are lognormal held the truth in 81 to 96 % of the cases with a standard deviation of the
#: logarithm of 0.7; with 1.2, where 66 to 92 % of the sets have no interval by this rule, the others held it in 0 to 94 %
#: (``benchmarks/curvature_rules.py --only noise``)
LEAST_EFFECTIVE_IMAGES = 16


@dataclass(frozen=True)
class NoiseStatistics:
    """Estimates for each group of parameters; fields as those of `GradientNoiseResult`, arrays ``(...,)`` or ``(..., 2)``."""

    gradient_square_norm: np.ndarray
    trace_covariance: np.ndarray
    noise_scale: np.ndarray
    noise_scale_interval: np.ndarray
    coherence: np.ndarray
    coherence_interval: np.ndarray
    m_coherence: np.ndarray
    mean_cosine: np.ndarray
    mean_cosine_interval: np.ndarray


def noise_statistics(
    square_norms: np.ndarray,
    mean_square: np.ndarray,
    products: np.ndarray,
    unit_square: np.ndarray,
    unit_products: np.ndarray,
) -> NoiseStatistics:
    """Return the estimates and their intervals.

    Args:
        square_norms: (n, n_groups) ``|g_i|^2``.
        mean_square: (n_groups,) ``|g|^2`` of the mean over images g.
        products: (n, n_groups) ``g_i . g``; NaN where no interval is wanted.
        unit_square: (n_groups,) squared length of the sum over images of ``u_i = g_i / |g_i|``, 0 for a gradient that is 0.
        unit_products: (n, n_groups) of each ``u_i`` with that sum; NaN likewise.
    """
    n = len(square_norms)
    total = square_norms.sum(0)
    n_units = (square_norms > 0).sum(0)
    square, trace = _moments(n, total, mean_square)
    # leaving image i out: |sum - g_i|^2 = |sum|^2 - 2 g_i . sum + |g_i|^2
    left_means = (n**2 * mean_square - 2 * n * products + square_norms) / (n - 1) ** 2
    left_square, left_trace = _moments(n - 1, total - square_norms, left_means)
    is_unit = (square_norms > 0).astype(np.float64)
    left_units = unit_square - 2 * unit_products + is_unit
    cosine, left_cosine = _mean_cosine(n_units, unit_square), _mean_cosine(n_units - is_unit, left_units)
    inverse, left_inverse = _ratio(square, trace), _ratio(left_square, left_trace)
    coherence, left_coherence = _ratio(n * square, total), _ratio((n - 1) * left_square, total - square_norms)
    enough = np.where(effective_images(square_norms) >= LEAST_EFFECTIVE_IMAGES, 1.0, np.nan)[..., None]
    inverse_ends = _interval(inverse, left_inverse) * enough
    return NoiseStatistics(
        gradient_square_norm=square,
        trace_covariance=trace,
        noise_scale=_ratio(np.where(trace < 0, 0.0, trace), square),  # equal gradients, but for rounding
        noise_scale_interval=np.stack([_inverted(inverse_ends[..., 1]), _inverted(inverse_ends[..., 0])], -1),
        coherence=coherence,
        coherence_interval=_interval(coherence, left_coherence) * enough,
        m_coherence=_ratio(n**2 * mean_square, total),
        mean_cosine=cosine,
        mean_cosine_interval=_interval(cosine, left_cosine),
    )


def effective_images(square_norms: np.ndarray) -> np.ndarray:
    """Return the number of images of equal lengths whose sum varies as much as that of ``square_norms (n, n_groups)``."""
    return _ratio(square_norms.sum(0) ** 2, np.square(square_norms).sum(0))


def _moments(n: int, total: np.ndarray, mean_square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return unbiased estimates of the squared length of the expected gradient and of the trace of the covariance."""
    trace = (total - n * mean_square) / (n - 1)
    return mean_square - trace / n, trace


def _mean_cosine(n_units: np.ndarray, unit_square: np.ndarray) -> np.ndarray:
    return _ratio(unit_square - n_units, n_units * (n_units - 1.0))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def _inverted(values: np.ndarray) -> np.ndarray:
    """Return 1 / values, infinite where they are not positive; NaN stays NaN."""
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(values), np.nan, 1 / np.maximum(values, 0.0))


def _interval(value: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return the 95 % interval ``(..., 2)`` by the jackknife over images."""
    n = len(left_out)
    with np.errstate(invalid="ignore"):
        error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean(0)).sum(0))
    half = t_quantile(n) * error
    return np.stack([value - half, value + half], -1)
