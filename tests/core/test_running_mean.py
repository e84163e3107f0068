"""Means over images from running sums: closed forms over unequal batches, and which answers have an interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vitscope.core.running_mean import RunningMean, estimates
from vitscope.stats.intervals import LEAST_EVENTS


def answers(n_better: int, n_worse: int, n_equal: int) -> RunningMean:
    mean = RunningMean(answers=True)
    values = torch.tensor([1.0] * n_better + [-1.0] * n_worse + [0.0] * n_equal)
    for part in values.split(7):
        mean.add(part)
    return mean


def test_a_mean_over_unequal_batches_is_that_of_all_images() -> None:
    values = torch.randn(150, 3, generator=torch.Generator().manual_seed(0)) + 5  # float32, summed in float64
    mean = RunningMean()
    for part in values.split([100, 49, 1]):
        mean.add(part)
    (found,) = estimates([mean], level=0.9)
    rows = values.double().numpy()
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-14)
    expected = stats.t.ppf(0.95, 149) * stats.sem(rows)
    np.testing.assert_allclose(found.half_width, expected, rtol=1e-9)  # sums of squares: 25 beside a variance of 1
    assert found.count == 150


@pytest.mark.parametrize(
    ("counts", "has_interval"),
    [
        ((8, 8, 4), True),  # 12 differ from either frequent answer
        ((11, 9, 0), False),
        ((9, 11, 0), False),
        ((0, LEAST_EVENTS, 30), True),
        ((LEAST_EVENTS - 1, 0, 30), False),
        ((5, 5, 30), True),
        ((30, 4, 5), False),
    ],
)
def test_answers_have_an_interval_where_enough_differ_from_the_most_frequent_one(
    counts: tuple[int, int, int], has_interval: bool
) -> None:
    (found,) = estimates([answers(*counts)])
    values = np.repeat([1.0, -1.0, 0.0], counts)
    assert found.mean == pytest.approx(values.mean(), abs=1e-15)
    assert np.isfinite(found.half_width) == has_interval
    if has_interval:
        assert found.half_width == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values), rel=1e-12)
