"""Intervals of contrasts whose replicates are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit


def percentiles(replicates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the interval that holds ``level`` of the replicates (axis 0); NaN where none is finite."""
    columns = replicates.reshape(len(replicates), -1).T
    ends = (1 - level) / 2, (1 + level) / 2
    rows = [np.quantile(c[np.isfinite(c)], ends) if np.isfinite(c).any() else np.full(2, np.nan) for c in columns]
    low, high = np.array(rows).reshape(-1, 2).T
    return low, high


def by_kind(contrast: np.ndarray, replicates: np.ndarray, kinds: Sequence[str], level: float) -> dict[str, Any]:
    """Return each kind's mean contrast over its units and its interval over units and images.

    A model has few units of a kind, of which a percentile interval would hold the truth far too rarely: the interval is
    Student's over units, and the normal one of the mean over resampled images, their half widths added in squares.
    That of a kind of one unit is over images alone.

    Args:
        contrast: (n_units,) NaN for units without one, which are left out.
        replicates: (n_resamples, n_units) with images resampled.
        kinds: (n_units) of the units.
        level: coverage.
    """
    names, rows = [], []
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero((np.array(kinds) == kind) & np.isfinite(contrast))
        if not len(members):
            continue
        mean = contrast[members].mean()
        units = contrast[members].var(ddof=1) / len(members) if len(members) > 1 else 0.0
        resampled = replicates[:, members].mean(axis=1)
        resampled = resampled[np.isfinite(resampled)]  # of few images a replicate may have drawn none
        images = resampled.var(ddof=1) if len(resampled) > 1 else np.nan
        quantile = stdtrit(len(members) - 1, 0.5 + level / 2) if len(members) > 1 else 0.0
        half = np.sqrt(quantile**2 * units + ndtri(0.5 + level / 2) ** 2 * images)
        names.append(kind)
        rows.append((mean, mean - half, mean + half))
    mean, low, high = np.array(rows).reshape(-1, 3).T
    return {"kind_names": tuple(names), "kind_contrast": mean, "kind_low": low, "kind_high": high}
