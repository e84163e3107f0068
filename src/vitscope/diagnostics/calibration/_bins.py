"""Binned calibration errors: how far confidence is from accuracy."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from vitscope.core.evaluation import bin_edges, interval_of, sums_of_members
from vitscope.stats.intervals import share_interval

Binning = Literal["equal_width", "official"]
BINNINGS: tuple[str, ...] = get_args(Binning)


class Bins(NamedTuple):
    """A reliability diagram: edges ``(n + 1,)``; count, mean confidence and accuracy ``(n,)``, 0 in empty bins."""

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the gap between confidence and accuracy, averaged over images.

        `vitscope.core.evaluation.calibration_error` is the same number from sums that ranks add up; its last digits may differ,
        since it divides once and this divides in each bin.
        """
        return float(np.abs(self.confidence - self.accuracy) @ self.count / self.count.sum())

    @property
    def signed_error(self) -> float:
        """Mean confidence minus accuracy: above 0 for an over-confident model."""
        return float((self.confidence - self.accuracy) @ self.count / self.count.sum())


def equal_width(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> Bins:
    """Sort images into the intervals (0, 1/n], ..., (1 - 1/n, 1]: a confidence of exactly 1 belongs to the last."""
    edges = bin_edges(n_bins).numpy()
    return _filled(edges, bin_of(confidence, edges), confidence, correct)


def equal_mass(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> Bins:
    """Sort images into ``n_bins`` groups of (as nearly as can be) equal size by confidence (Nguyen and O'Connor 2015).

    Images of one and the same confidence are never torn apart, so saturated predictions share a bin and the result does
    not depend on their order.
    """
    ordered = np.sort(confidence)
    last = np.ceil(np.arange(1, n_bins + 1) * len(ordered) / n_bins).astype(int) - 1
    edges = np.unique(np.concatenate([[0.0], ordered[last]]))
    return _filled(edges, bin_of(confidence, edges), confidence, correct)


def accuracy_interval(count: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the 95 % interval of each bin's accuracy ``(n,)``."""
    return share_interval(np.rint(accuracy * count), count)


def official(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> Bins:
    """Return the bins of the released code of Park and Kim (ops/tests.py), whose two halves disagree.

    Images are counted in (a, b] but their confidence is summed over [a, b), so that a confidence of exactly 1 is counted
    and adds nothing: a model that is always right and saturated gets an error near 1.
    """
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    closed_right = bin_of(confidence, edges)
    closed_left = np.searchsorted(edges, confidence, side="right") - 1
    count = np.bincount(closed_right, minlength=n_bins).astype(np.float64)
    total = np.bincount(closed_left, confidence, minlength=n_bins + 1)[:n_bins]
    accuracy = np.bincount(closed_right, correct, minlength=n_bins) / np.maximum(count, 1)
    return Bins(edges, count, total / (count + 1e-7), accuracy)


def bin_of(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin (edges[i], edges[i + 1]] of each image ``(n,)`` by the rule of `vitscope.core.evaluation`."""
    return interval_of(torch.from_numpy(confidence), torch.from_numpy(edges)).numpy()


def _filled(edges: np.ndarray, member: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Bins:
    images = (torch.from_numpy(np.ascontiguousarray(values)) for values in (member, confidence, correct))
    count, total_confidence, total_right = sums_of_members(*images, n_bins=max(len(edges) - 1, 1)).numpy()
    full = np.maximum(count, 1)
    return Bins(edges, count, total_confidence / full, total_right / full)
