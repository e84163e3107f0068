"""Exponents of power laws by least squares on logarithms, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitscope.stats.intervals import t_half_width_of_rows, t_quantile

#: points that a fitted slope needs for an interval
LEAST_POINTS = 4
#: layers of a kind that a mean exponent needs for an interval
LEAST_LAYERS = 3


@dataclass(frozen=True)
class PowerLaw:
    """``y = c x^exponent`` fitted to positive points.

    Attributes:
        exponent: Slope of log y on log x; NaN with fewer than `LEAST_POINTS` points, or where x does not vary.
        half_width: Half the 95 % interval of the slope in ordinary least squares.
        r_squared: Share of the variance of log y.
        n_points: Points that were used.
    """

    exponent: float
    half_width: float
    r_squared: float
    n_points: int


def fit_power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Fit ``y = c x^a`` to the points ``(n,)`` that are finite and positive.

    The interval takes the deviations of the points from the line for independent ones of one variance.
    """
    is_used = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    n = int(is_used.sum())
    log_x, log_y = np.log(x[is_used]), np.log(y[is_used])
    if n < LEAST_POINTS or np.ptp(log_x) < 1e-6:
        return PowerLaw(float("nan"), float("nan"), float("nan"), n)
    dx, dy = log_x - log_x.mean(), log_y - log_y.mean()
    slope = float(dx @ dy / (dx @ dx))
    rest = float(np.square(dy - slope * dx).sum())
    total = float(dy @ dy)
    error = np.sqrt(rest / (n - 2) / (dx @ dx))
    return PowerLaw(slope, t_quantile(n - 1) * float(error), 1 - rest / total if total > 0 else float("nan"), n)


def mean_by_kind(values: np.ndarray, kinds: tuple[str, ...], groups: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over each kind's layers ``(n_groups,)`` and their 95 % t-intervals over layers ``(n_groups, 2)``."""
    means, ends = [], []
    for group in groups:
        chosen_values = values[(np.array(kinds) == group) & np.isfinite(values)]
        mean = float(chosen_values.mean()) if len(chosen_values) else float("nan")
        half = float(t_half_width_of_rows(chosen_values, LEAST_LAYERS)) if len(chosen_values) else float("nan")
        means.append(mean)
        ends.append((mean - half, mean + half))
    return np.array(means), np.array(ends)
