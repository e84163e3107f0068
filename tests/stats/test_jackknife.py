"""The jackknife over groups against its closed form for means, and its coverage for a ratio of skewed numbers."""

from __future__ import annotations

import numpy as np
import pytest

from vitscope.stats.intervals import t_quantile
from vitscope.stats.jackknife import N_GROUPS, group_numbers, group_numbers_of_batch, jackknife_half_width


def left_out(values: np.ndarray) -> np.ndarray:
    groups = group_numbers(len(values))
    return np.stack([values[groups != group] for group in range(N_GROUPS)])


def test_groups_are_of_equal_size_up_to_one() -> None:
    counts = np.bincount(group_numbers(37))
    assert len(counts) == N_GROUPS
    assert counts.max() - counts.min() == 1


@pytest.mark.parametrize("period", [2, 5, 10])
def test_classes_that_alternate_do_not_widen_the_interval(period: int) -> None:
    """With images in turn each group would be of one class, and the interval of 10 classes ten times as wide."""
    values = (np.arange(2000) % period).astype(float)
    expected = t_quantile(N_GROUPS) * values.std() / np.sqrt(len(values))
    assert jackknife_half_width(left_out(values).mean(axis=1)) == pytest.approx(expected, rel=0.5)
    groups = np.concatenate([group_numbers_of_batch(number, 1000) for number in range(2)])
    rest = np.array([values[groups != group].mean() for group in range(N_GROUPS)])
    assert jackknife_half_width(rest) == pytest.approx(expected, rel=0.5)


def test_images_at_one_place_of_every_batch_are_in_all_groups() -> None:
    """Where every batch lists its classes in one order, groups of places would be groups of classes."""
    groups = np.stack([group_numbers_of_batch(number, N_GROUPS) for number in range(200)])  # (batches, places)
    assert (np.sort(groups, axis=1) == np.arange(N_GROUPS)).all()
    counts = np.stack([(groups == group).sum(axis=0) for group in range(N_GROUPS)])
    # 200 draws of 1 in 10: a mean of 20 and a deviation of 4.2, of which 5 is exceeded in 1 of 10^6 counts
    assert np.abs(counts - 20).max() < 5 * np.sqrt(200 * 0.1 * 0.9)


def test_groups_of_batches_are_of_equal_size_and_the_same_on_every_call() -> None:
    batches = [group_numbers_of_batch(number, 5) for number in range(4)]
    assert np.bincount(np.concatenate(batches)).tolist() == [2] * N_GROUPS
    np.testing.assert_array_equal(batches[3], group_numbers_of_batch(3, 5))


def test_of_a_mean_it_is_the_interval_of_the_means_of_groups() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    means = np.stack([values[group_numbers(40) == group].mean(axis=0) for group in range(N_GROUPS)])
    expected = t_quantile(N_GROUPS) * means.std(axis=0, ddof=1) / np.sqrt(N_GROUPS)
    np.testing.assert_allclose(jackknife_half_width(left_out(values).mean(axis=1)), expected, rtol=1e-12)


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        x = rng.lognormal(sigma=0.5, size=200)
        y = 2 * x + rng.normal(size=200)
        rest_x, rest_y = left_out(x), left_out(y)
        half_width = float(jackknife_half_width(rest_y.mean(axis=1) / rest_x.mean(axis=1)))
        hits += abs(y.mean() / x.mean() - 2) <= half_width
    assert hits / 1000 == pytest.approx(0.95, abs=0.025)  # 3.5 standard errors of 1000 draws
