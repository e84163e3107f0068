"""Intervals of contrasts whose replicates are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitscope.stats.intervals import LEAST_IMAGES, t_quantile


def half_width_over_images(replicates: np.ndarray, n_images: int, level: float) -> np.ndarray:
    """Return half the t-interval over images of the mean of each column of ``replicates (n_resamples, ...)``.

    Its standard error is the standard deviation of the finite replicates. The share of the replicates themselves, a percentile
    interval, is too narrow for few images: of 95 % intervals over 8 or 16 images 90 % hold the truth. NaN for fewer than
    `vitscope.stats.intervals.LEAST_IMAGES` images, where skewed ones would not be covered, or two finite replicates.
    """
    good = np.isfinite(replicates)
    count = good.sum(axis=0)
    mean = np.where(good, replicates, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.square(np.where(good, replicates - mean, 0.0)).sum(axis=0)
    error = np.sqrt(np.where(count > 1, squares, np.nan) / np.maximum(count - 1, 1))
    return error * (t_quantile(n_images, level) if n_images >= LEAST_IMAGES else np.nan)


def by_kind(
    contrast: np.ndarray, replicates: np.ndarray, kinds: Sequence[str], level: float, n_images: int
) -> dict[str, Any]:
    """Return each kind's mean contrast over its units and its interval over units and images.

    A model has few units of a kind, of which a percentile interval would hold the truth far too rarely: the interval is
    Student's over units, and that of the mean over resampled images, their half widths added in squares.
    That of a kind of one unit is over images alone.

    Args:
        contrast: (n_units,) NaN for units without one, which are left out.
        replicates: (n_resamples, n_units) with images resampled.
        kinds: (n_units) of the units.
        level: Coverage.
        n_images: Number of images that were resampled; of fewer than `vitscope.stats.intervals.LEAST_IMAGES` there is no
            interval.
    """
    names, rows = [], []
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero((np.array(kinds) == kind) & np.isfinite(contrast))
        if not len(members):
            continue
        mean = contrast[members].mean()
        units = contrast[members].var(ddof=1) / len(members) if len(members) > 1 else 0.0
        # of few images a replicate may have drawn none: it is not finite, and left out
        images = half_width_over_images(replicates[:, members].mean(axis=1), n_images, level)
        quantile = t_quantile(len(members), level) if len(members) > 1 else 0.0
        half = np.sqrt(quantile**2 * units + images**2)
        names.append(kind)
        rows.append((mean, mean - half, mean + half))
    mean, low, high = np.array(rows).reshape(-1, 3).T  # (n_kinds, 3) to three of (n_kinds,), also without kinds
    return {"kind_names": tuple(names), "kind_contrast": mean, "kind_low": low, "kind_high": high}
