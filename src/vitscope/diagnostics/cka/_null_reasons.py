"""Reasons why similarities or their intervals are null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vitscope.core.tap import Tap
from vitscope.stats.intervals import LEAST_IMAGES, few_images


def undefined_taps(
    measures: Sequence[str],
    similarities: np.ndarray,
    sides: tuple[Sequence[Tap], Sequence[Tap]],
    other_reasons: Mapping[str, str],
) -> dict[str, str]:
    """Return why taps are null in all measures or in some of them, by the entries that are null.

    Args:
        measures: Names of the measures.
        similarities: ``(n_measures, n_taps, n_other_taps)``.
        sides: Taps of the rows and of the columns.
        other_reasons: Further reasons by the name of a tap; such taps are left out.
    """
    reasons: dict[str, str] = {}
    finite = np.isfinite(similarities)
    for axis, taps in zip((2, 1), sides):
        for tap, is_defined in zip(taps, np.asarray(finite.any(axis=axis)).T.tolist()):  # n_measures of each tap
            if tap.name in other_reasons or all(is_defined):
                continue
            if not any(is_defined):
                reasons[tap.name] = "it does not vary between images, or not enough for the measure"
                continue
            for name in (name for name, defined in zip(measures, is_defined) if not defined):
                reasons[f"{name} at {tap.name}"] = "it does not vary enough for the measure, or not in every image"
    return reasons


def missing_intervals(
    measures: Sequence[str], similarities: np.ndarray, half_widths: np.ndarray, n_images: int
) -> dict[str, str]:
    """Return why there are no intervals: few images, or a single batch for CKA."""
    if n_images < LEAST_IMAGES or "cka" not in measures:
        return few_images(n_images)
    index = list(measures).index("cka")
    has_none = bool(np.isfinite(similarities[index]).any()) and not np.isfinite(half_widths[index]).any()
    return {"the intervals of cka": "a single batch"} if has_none else {}
