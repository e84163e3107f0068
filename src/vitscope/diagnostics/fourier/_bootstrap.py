"""Percentile intervals of contrasts whose replicates are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def percentiles(replicates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the interval that holds ``level`` of the replicates (axis 0); NaN where none is finite."""
    columns = replicates.reshape(len(replicates), -1).T
    ends = (1 - level) / 2, (1 + level) / 2
    rows = [np.quantile(c[np.isfinite(c)], ends) if np.isfinite(c).any() else np.full(2, np.nan) for c in columns]
    low, high = np.array(rows).reshape(-1, 2).T
    return low, high


def by_kind(
    contrast: np.ndarray, replicates: np.ndarray, kinds: Sequence[str], level: float, seed: int
) -> dict[str, Any]:
    """Return each kind's mean contrast over its units and its interval, images and units resampled.

    Args:
        contrast: (n_units,) NaN for units without one, which are left out.
        replicates: (n_resamples, n_units) with images resampled.
        kinds: (n_units) of the units.
        level: coverage.
        seed: of the resampling of units.
    """
    rng = np.random.default_rng(seed)
    names, rows = [], []
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero((np.array(kinds) == kind) & np.isfinite(contrast))
        if not len(members):
            continue
        drawn = rng.choice(members, size=(len(replicates), len(members)))  # units of that kind, with replacement
        low, high = percentiles(np.take_along_axis(replicates, drawn, axis=1).mean(axis=1), level)
        names.append(kind)
        rows.append((contrast[members].mean(), low[0], high[0]))
    mean, low, high = np.array(rows).reshape(-1, 3).T
    return {"kind_names": tuple(names), "kind_contrast": mean, "kind_low": low, "kind_high": high}
