"""Statistics of eigenvalues pooled over mini-batches: NEP, APE, their intervals, and a density for the eye."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import gaussian_kde

Statistic = Callable[[np.ndarray, np.ndarray], float]

#: resamples of the bootstrap over batches
RESAMPLES = 2000


def negative_proportion(values: np.ndarray, residuals: np.ndarray) -> float:
    """Return NEP: the share of ``values`` that lie below zero by more than their residual."""
    return float(np.mean(values < -residuals)) if values.size else float("nan")


def near_zero_proportion(values: np.ndarray, residuals: np.ndarray) -> float:
    """Return the share of ``values`` within their residual of zero, whose sign is not known."""
    return float(np.mean(np.abs(values) <= residuals)) if values.size else float("nan")


def positive_average(values: np.ndarray, residuals: np.ndarray) -> float:
    """Return APE: the mean of those ``values`` that lie above zero by more than their residual; NaN for none."""
    positive = values[values > residuals]
    return float(positive.mean()) if positive.size else float("nan")


def bootstrap(statistic: Statistic, values: np.ndarray, residuals: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the 95 % percentile interval ``(2,)`` of ``statistic`` when batches (rows) are drawn with replacement.

    NaN for a single batch: there is nothing to draw from.
    """
    n_batches = len(values)
    if n_batches < 2:
        return np.full(2, np.nan)
    draws = np.random.default_rng(seed).integers(n_batches, size=(RESAMPLES, n_batches))
    sample = np.array([statistic(values[rows], residuals[rows]) for rows in draws])
    sample = sample[np.isfinite(sample)]
    return np.percentile(sample, [2.5, 97.5]) if sample.size else np.full(2, np.nan)


def kernel_density(values: np.ndarray, n_grid: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid and the Gaussian kernel density (Scott's bandwidth) of the pooled ``values`` on it.

    Values that are all (nearly) equal have no bandwidth: a thousandth of their magnitude is used.
    """
    pooled = np.asarray(values, dtype=float).reshape(-1)
    scale = max(float(np.abs(pooled).max()), np.finfo(float).tiny)
    spread = float(pooled.std(ddof=1)) if pooled.size > 1 else 0.0
    width = spread * pooled.size ** (-1 / 5) if spread > 1e-6 * scale else 1e-3 * scale
    grid = np.linspace(pooled.min() - 4 * width, pooled.max() + 4 * width, n_grid)
    if spread > 1e-6 * scale:
        return grid, gaussian_kde(pooled)(grid)
    deviation = (grid[:, None] - pooled) / width  # (n_grid, n)
    return grid, np.exp(-0.5 * deviation**2).mean(1) / (width * np.sqrt(2 * np.pi))
