"""Means over the images of all ranks with their intervals, from running sums alone: memory does not depend on their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.runtime import distributed
from vitscope.stats.intervals import LEAST_EVENTS, Estimate, check_level, estimate, t_half_width


class RunningMean:
    """Count, sum and sum of squares over images, kept in float64 on the device the values came from.

    Args:
        answers: Whether the values are right or wrong answers (0, 1) or their changes (-1, 0, 1) rather than measurements.
    """

    def __init__(self, answers: bool = False) -> None:
        self.count, self.answers = 0, answers
        self._sum: Tensor | None = None
        self._square_sum: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add one row per image: ``values (B, ...)``, the same trailing shape on every call."""
        values = values.detach().double()
        self.count += len(values)
        total, square = values.sum(0), values.square().sum(0)  # (...) each
        if self._sum is None or self._square_sum is None:
            self._sum, self._square_sum = total, square
        else:
            self._sum += total
            self._square_sum += square

    def state(self) -> tuple[int, np.ndarray | None]:
        """Return the count and the two sums ``(2, ...)`` as plain arrays (None where nothing was added)."""
        if self._sum is None or self._square_sum is None:
            return self.count, None
        return self.count, torch.stack([self._sum, self._square_sum]).cpu().numpy()


def check_any_image(mean: RunningMean) -> None:
    """Refuse a mean to which no rank added an image that has a label, with a ValueError."""
    if not sum(distributed.gather_objects(mean.count)):
        raise ValueError("Expected at least one image with a label to evaluate, received none.")


def estimates(means: Sequence[RunningMean], level: float = 0.95) -> list[Estimate]:
    """Return each mean over all ranks' images, with its t-interval.

    Args:
        means: Running means, the same number on every rank; a rank that saw no image leaves its own empty.
        level: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: A level outside (0, 1).
    """
    check_level(level)
    ranks = distributed.gather_objects([m.state() for m in means])
    return [_estimate(states, level, mean.answers) for mean, states in zip(means, zip(*ranks))]


def estimate_lists(lists: Sequence[Sequence[RunningMean]], level: float = 0.95) -> list[list[Estimate]]:
    """Return the `estimates` of several lists of means, in lists of the same lengths; the ranks exchange all of them at once."""
    remaining = iter(estimates([mean for means in lists for mean in means], level))
    return [[next(remaining) for _ in means] for means in lists]


def _estimate(states: Sequence[tuple[int, Any]], level: float, answers: bool) -> Estimate:
    shares = [sums for _, sums in states if sums is not None]
    if not shares:
        return Estimate(np.array(np.nan), np.array(np.nan), 0)
    total, square = np.sum(shares, axis=0)
    count = sum(n for n, _ in states)
    if not answers:
        return estimate(count, total, square, level)
    # of values -1, 0 and 1 the two sums give how often each occurs
    most = np.maximum(np.maximum(square + total, square - total) / 2, count - square)
    half_width = np.where(count - most >= LEAST_EVENTS, t_half_width(count, total, square, level), np.nan)
    return Estimate(total / count, half_width, count)
