"""Corruption errors: a model's errors as a share of a baseline's (Hendrycks and Dietterich 2019, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitscope.diagnostics.corruption._baselines import ALEXNET, CLEAN


class Baseline(NamedTuple):
    """Errors of a reference model: under each condition ``(n_types, n_severities)``, NaN where unknown, and clean."""

    name: str
    error: np.ndarray
    clean: float | None


def check_baseline(baseline: str) -> None:
    """Raise ValueError where a baseline is neither a data set with published errors of AlexNet nor ``auto`` or ``none``."""
    if baseline not in ("auto", "none", *ALEXNET):
        raise ValueError(f"Expected baseline to be auto, none, {', '.join(ALEXNET)}, received {baseline!r}.")


def alexnet(data: str, types: Sequence[str], severities: Sequence[int]) -> Baseline:
    """Return AlexNet's published errors on one of the data sets that have them."""
    table = ALEXNET[data]
    nan = (np.nan,) * 5
    error = np.array([[table.get(name, nan)[severity - 1] for severity in severities] for name in types])
    return Baseline(f"AlexNet on {data}", error, CLEAN.get(data))


def corruption_errors(error: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Return CE of each type ``(n_types,)`` in percent: the sum over severities over the baseline's; NaN over zero."""
    total = baseline.error.sum(axis=1)
    return 100 * error.sum(axis=1) / np.where(total > 0, total, np.nan)


def relative_errors(error: np.ndarray, clean: float, baseline: Baseline) -> np.ndarray:
    """Return relative CE ``(n_types,)`` in percent: what is lost against clean images, over what the baseline loses.

    NaN where the baseline's clean error is unknown, or where it loses nothing.
    """
    if baseline.clean is None:
        return np.full(len(error), np.nan)
    lost = (baseline.error - baseline.clean).sum(axis=1)
    return 100 * (error - clean).sum(axis=1) / np.where(lost > 0, lost, np.nan)
