"""Assertions about how often intervals of simulated data hold the truth."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

#: numbers of simulated data sets of a test in CI and of a slow one
FAST, SLOW = 200, 2000


def assert_coverage(covered: np.ndarray, lowest: float = 0.92, highest: float = 0.98) -> None:
    """Assert a coverage in [lowest, highest], give or take what the number of simulations leaves open at 1 in 1000."""
    n, hits = len(covered), int(np.sum(covered))
    assert binom.ppf(1e-3, n, lowest) <= hits <= binom.ppf(1 - 1e-3, n, highest), f"{hits} of {n}"
