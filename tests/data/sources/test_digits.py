from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vitscope.data.sources import digits
from vitscope.runtime.errors import DataError


def test_splits_hold_every_digit_once():
    splits = [digits.load(split) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == 1797
    for images in splits:
        assert images.images.shape[1:] == (3, 32, 32)
        assert images.labels.unique().tolist() == list(range(10))
    stacked = torch.cat([images.images[:, 0].flatten(1) for images in splits]).numpy()
    everything = digits._digits()[0][:, 0].flatten(1).numpy()
    np.testing.assert_array_equal(np.unique(stacked, axis=0), np.unique(everything, axis=0))


def test_the_test_split_is_the_same_for_every_seed_and_validation_is_not():
    assert torch.equal(digits.load("test", split_seed=0).images, digits.load("test", split_seed=1).images)
    assert not torch.equal(digits.load("val", split_seed=0).images, digits.load("val", split_seed=1).images)


def test_resizing_keeps_the_mean_gray():
    pixels, _ = load_digits(return_X_y=True)
    large = digits._digits()[0].double().mean((1, 2, 3)).numpy()
    # bilinear resizing by four weighs border pixels a little differently; bytes round to 0.5
    np.testing.assert_allclose(large, pixels.mean(1) * 255 / 16, atol=2.0)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="there is no split 'dev'"):
        digits.load("dev")
