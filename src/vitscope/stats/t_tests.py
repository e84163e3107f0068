"""Means over seeds with t-intervals, and Holm's correction: what every table and every claim is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vitscope.stats.intervals import t_quantile

#: two-sided level of intervals and tests
LEVEL = 0.95

#: values that differ by no more than this share of their magnitude are equal: networks compute in float32, and a mean or a
#: difference of what they compute is some roundings apart
ROUNDING = 8 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: NaN where there is no seed.
        half_width: Half the two-sided 95% t-interval; NaN with fewer than two seeds or without spread, and where ``ends`` says
            more.
        p: Two-sided p-value of the t-test that the mean is 0; NaN with fewer than two seeds or without spread.
        n: Number of seeds.
        ends: Both ends of an interval that does not lie evenly about the mean.
    """

    mean: float
    half_width: float
    p: float
    n: int
    ends: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width if self.ends is None else self.ends[0]

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width if self.ends is None else self.ends[1]

    @property
    def bars(self) -> tuple[float, float]:
        """The distances from the mean to both ends, 0 where there is no interval: what a figure draws."""
        below, above = self.mean - self.low, self.high - self.mean
        return (below, above) if below >= 0 and above >= 0 else (0.0, 0.0)


def t_interval(values: Sequence[float], magnitude: float = 0.0) -> Interval:
    """Return the mean of one value per seed with its t-interval (3 seeds: 4.30 standard errors).

    Values that are equal, up to `ROUNDING`, have no spread to judge by: an interval without width would hold the truth only if
    it were known. They have no interval and no p (both NaN), and so decide no claim.

    Args:
        values: One number per seed.
        magnitude: Magnitude of the numbers that the values are sums or differences of; that of the values themselves where it
            is smaller.

    Raises:
        ValueError: A value that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not np.isfinite(sample).all():
        raise ValueError(f"Expected finite values, received {list(values)}.")
    n = len(sample)
    mean = float(sample.mean()) if n else float("nan")
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    if np.ptp(sample) <= ROUNDING * max(magnitude, float(np.abs(sample).max())):
        return Interval(mean, float("nan"), float("nan"), n)
    error = float(sample.std(ddof=1)) / n**0.5
    return Interval(mean, t_quantile(n, LEVEL) * error, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted so that the chance of any false rejection stays below the level (Holm 1979).

    Adjusted values are comparable with the level directly. NaN stands for a test that was not made: it stays NaN and
    does not count.
    """
    tested = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    adjusted = {name: float("nan") for name in p_values}
    largest = 0.0
    for rank, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[name] = largest
    return adjusted
