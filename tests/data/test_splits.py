from __future__ import annotations

import numpy as np
import pytest

from vitscope.data import splits

LABELS = np.repeat([0, 1, 2], [50, 20, 3])[np.random.default_rng(0).permutation(73)]


def test_hold_out_is_stratified_disjoint_and_complete():
    kept, held = splits.hold_out(LABELS, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate((kept, held))), np.arange(73))
    np.testing.assert_array_equal(np.bincount(LABELS[held]), [5, 2, 1])


def test_shares_are_rounded_to_the_nearest_image():
    labels = np.repeat([0, 1], [18, 24])
    _, held = splits.hold_out(labels, 0.1, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[held]), [2, 2])  # of 1.8 and 2.4
    np.testing.assert_array_equal(np.bincount(labels[splits.fraction(labels, 0.1, seed=0)]), [2, 2])


def test_hold_out_never_takes_a_class_whole():
    kept, held = splits.hold_out(np.array([0, 0, 1]), 0.9, seed=0)
    assert set(np.array([0, 0, 1])[kept]) == {0, 1}
    assert len(held) == 1


@pytest.mark.parametrize(("share", "counts"), [(0.5, [25, 10, 2]), (0.02, [1, 1, 1]), (1.0, [50, 20, 3])])
def test_fraction_is_of_each_class_and_at_least_one_image(share, counts):
    chosen = splits.fraction(LABELS, share, seed=0)
    np.testing.assert_array_equal(np.bincount(LABELS[chosen]), counts)


def test_fractions_of_one_seed_are_nested_and_seeds_differ():
    small, large = (set(splits.fraction(LABELS, share, seed=0).tolist()) for share in (0.2, 0.6))
    assert small < large
    assert small != set(splits.fraction(LABELS, 0.2, seed=1).tolist())


def test_permuted_labels_keep_the_counts_and_lose_the_images():
    labels = np.repeat(np.arange(10), 100)
    shuffled = splits.permuted(labels, seed=0)
    np.testing.assert_array_equal(np.bincount(shuffled), np.bincount(labels))
    assert 0.05 < (shuffled == labels).mean() < 0.15  # chance is 0.1, standard error below 0.01
    np.testing.assert_array_equal(shuffled, splits.permuted(labels, seed=0))
