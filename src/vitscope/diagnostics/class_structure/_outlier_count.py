"""The number of eigenvalues above the bulk, from the gaps between the largest ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: gaps of the bulk that must follow the gap below the last outlier
LEAST_BULK_GAPS = 8
#: probability, over all places tried, of a gap as wide as that below the last outlier within a bulk of equal mean gaps
LEVEL = 0.01


@dataclass(frozen=True)
class OutlierCount:
    """The number of eigenvalues above the bulk.

    Attributes:
        count: The number; 0 where no gap is wider than those of the bulk.
        gap_ratio: Ratio of the last outlier to the eigenvalue below it; NaN without an outlier.
        p_value: Probability of such a gap within a bulk, for all places tried; NaN without an outlier.
    """

    count: int
    gap_ratio: float
    p_value: float


def count_outliers(eigenvalues: np.ndarray) -> OutlierCount:
    """Count the eigenvalues above the bulk.

    With the positive eigenvalues in descending order, ``g_j = log(l_j / l_{j+1})`` is the gap below the j-th. Below the last
    outlier lies the last gap that is too wide for the bulk under it: if the gaps of a bulk are independent and exponential with
    one mean, ``r_j = g_j / mean(g_{j+1}, ..., g_{m-1})`` of n following gaps exceeds r with probability ``(1 + r / n)^-n``. The
    last j at which this probability times the number of places tried is at most `LEVEL` is the count. Eigenvalues of random
    matrices repel each other, so that their gaps vary less than exponential ones; a bulk whose tail is a power law has wider gaps
    at its edge, which the rule can take for outliers, so that a count should come out alike on other images.

    Args:
        eigenvalues: ``(k,)`` the largest ones, in any order.
    """
    values = np.sort(eigenvalues[eigenvalues > 0])[::-1]
    gaps = np.log(values[:-1] / values[1:])
    n_places = len(gaps) - LEAST_BULK_GAPS
    for j in range(n_places - 1, -1, -1):
        following = gaps[j + 1 :]
        mean, n = float(following.mean()), len(following)
        ratio = 0.0
        if mean > 0:
            ratio = gaps[j] / mean
        elif gaps[j] > 0:
            ratio = np.inf
        p_value = min(1.0, float(n_places * (1 + ratio / n) ** -n))
        if p_value <= LEVEL:
            return OutlierCount(j + 1, float(np.exp(gaps[j])), p_value)
    return OutlierCount(0, float("nan"), float("nan"))


def largest_countable(n_eigenvalues: int) -> int:
    """Return the largest number of outliers that can be counted among so many eigenvalues."""
    return max(0, n_eigenvalues - 1 - LEAST_BULK_GAPS)


def matched_number(count: int, n_classes: int) -> str:
    """Return which of C - 1, C, C (C - 1) and C^2 a count equals, or ``none``."""
    numbers = {
        "C - 1": n_classes - 1,
        "C": n_classes,
        "C (C - 1)": n_classes * (n_classes - 1),
        "C^2": n_classes**2,
    }
    return next((name for name, number in numbers.items() if number == count), "none")
