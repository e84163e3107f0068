"""Statistics of eigenvalues pooled over mini-batches: NEP, APE, their intervals, and a density for figures."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import gaussian_kde

from vitscope.stats.intervals import exact_ends, t_quantile

#: eigenvalues at which the density is given
N_GRID = 400

#: mini-batches below which NEP has no interval: with fewer, none of the usual ones covers for clustered shares
NEP_BATCHES = 8

#: mini-batches that must have a negative eigenvalue, and another, before their shares tell how alike eigenvalues of a batch are
LEAST_SEEN = 5

#: mini-batches below which APE has no interval
APE_BATCHES = 4


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


def proportion_interval(values: np.ndarray, residuals: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return the interval ``(2,)`` of NEP, `negative_proportion`, over batches (rows); NaN with fewer than `NEP_BATCHES`.

    The exact interval (Clopper and Pearson) with the number of eigenvalues divided by the design effect, the variance of the mean
    over batches against that of independent eigenvalues, held between 1 and the eigenvalues a batch, and scaled by the quantiles
    of Student and Gauss (Korn and Graubard 1998), with Satterthwaite's degrees of freedom: only the excess over independence is
    estimated from the batches. Where fewer than `LEAST_SEEN` batches have a negative eigenvalue, or fewer have another, the
    eigenvalues of a batch count as one. The interval errs to the wide side: where negative eigenvalues are rare, or alike within
    a batch, it holds the truth more often than ``level`` says, up to always.
    """
    n_batches, k = values.shape
    if n_batches < NEP_BATCHES or not k:
        return np.full(2, np.nan)
    shares = (values < -residuals).mean(axis=1)
    mean, n = shares.mean(), n_batches * k
    independent = mean * (1 - mean) / n
    normal = quantile = ndtri(0.5 + level / 2)
    if min((shares > 0).sum(), (shares < 1).sum()) < LEAST_SEEN:
        effect = float(k)
    else:
        effect = np.clip(shares.var(ddof=1) / n_batches / independent, 1.0, k)
        if effect > 1:
            quantile = stdtrit((n_batches - 1) * (effect / (effect - 1)) ** 2, 0.5 + level / 2)
    effective = n / effect * (normal / quantile) ** 2
    return np.array(exact_ends(mean * effective, effective, (1 - level) / 2), dtype=np.float64)


def average_interval(values: np.ndarray, residuals: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return the interval ``(2,)`` of APE, `positive_average`, over batches (rows); NaN with fewer than `APE_BATCHES`.

    See `positive_interval`; NaN also where a batch left out leaves no positive eigenvalue.
    """
    n_batches = len(values)
    if n_batches < APE_BATCHES:
        return np.full(2, np.nan)
    whole = positive_average(values, residuals)
    without = [positive_average(np.delete(values, i, 0), np.delete(residuals, i, 0)) for i in range(n_batches)]
    return positive_interval(whole, np.array(without), level)


def positive_interval(whole: float, without: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return the interval ``(2,)`` of a positive mean from its values with one part (a mini-batch) left out.

    Student's for the logarithm, with the jackknife's variance: parts are positive and skewed. Where the largest of them stand
    out, few parts know how large others are: the upper end is that of Hall's (1992) correction for skewness where it is wider.
    For lognormal parts with a standard deviation of the logarithm from 0.2 to 1 it holds the truth at 92 to 97 %.

    Args:
        whole: The mean over all parts.
        without: (n,) the mean over all others, for each of n parts.
        level: Coverage.

    Returns:
        Both ends; NaN with fewer than `APE_BATCHES` parts, where a value is not positive, and where parts do not differ.
    """
    n = len(without)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(without)
    # equal up to rounding: there is nothing to judge the spread by
    if (
        n < APE_BATCHES
        or not np.isfinite(logs).all()
        or np.ptp(logs) <= 8 * np.finfo(np.float64).eps * max(1.0, np.abs(logs).max())
    ):
        return np.full(2, np.nan)
    influence = logs.mean() - logs
    error = np.sqrt((n - 1) / n * np.square(influence).sum())
    skewness = (influence**3).mean() / np.square(influence).mean() ** 1.5
    quantile = t_quantile(n, level)
    upper = max(quantile, -_hall_quantile(-quantile, skewness, n))
    return whole * np.exp([-quantile * error, upper * error])


def _hall_quantile(quantile: float, skewness: float, n: int) -> float:
    """Return the quantile of the studentized mean of ``n`` values whose skewness-corrected one has ``quantile`` (Hall 1992)."""
    slope = skewness / (3 * np.sqrt(n))
    if abs(slope) < 1e-9:
        return quantile
    return float(np.cbrt(1 + 3 * slope * (quantile - skewness / (6 * np.sqrt(n)))) - 1) / slope


def kernel_density(values: np.ndarray, n_grid: int = N_GRID) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid and the Gaussian kernel density (Scott's bandwidth) of the pooled ``values`` on it.

    Values that are all (nearly) equal have no bandwidth: a thousandth of their magnitude is used, of 1 where all are zero.
    """
    pooled = np.asarray(values, dtype=float).reshape(-1)
    scale = float(np.abs(pooled).max()) or 1.0
    spread = float(pooled.std(ddof=1)) if pooled.size > 1 else 0.0
    width = spread * pooled.size ** (-1 / 5) if spread > 1e-6 * scale else 1e-3 * scale
    grid = np.linspace(pooled.min() - 4 * width, pooled.max() + 4 * width, n_grid)
    if spread > 1e-6 * scale:
        return grid, gaussian_kde(pooled)(grid)
    deviation = (grid[:, None] - pooled) / width  # (n_grid, n)
    return grid, np.exp(-0.5 * deviation**2).mean(1) / (width * np.sqrt(2 * np.pi))
