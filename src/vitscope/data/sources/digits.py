"""`digits`: scikit-learn's 1,797 handwritten digits of 8x8 pixels, resized to 32x32, in three channels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torchvision.transforms.v2.functional import resize

from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.splits import hold_out
from vitscope.runtime.errors import DataError
from vitscope.runtime.value_ranges import Seed

_SIZE = 32
_TEST, _VAL = 0.25, 0.15  # of all, and of what is left


def load(split: str, *, root: str | None = None, split_seed: Seed = 0) -> ArrayImages:
    """Return a split of the digits: about 1145 train, 202 validation and 450 test images.

    Args:
        split: `train`, `val` or `test`; the test images are the same for every seed.
        root: Not used; the digits come with the wheel.
        split_seed: Chooses which of the other images are held out for validation.

    Raises:
        DataError: Unknown split.
    """
    images, labels = _digits()
    rest, test = hold_out(labels, _TEST, seed=0)
    train_indices, val_indices = hold_out(labels[rest], _VAL, seed=split_seed)
    indices_by_split = {"train": rest[train_indices], "val": rest[val_indices], "test": test}
    if split not in indices_by_split:
        raise DataError("data", "digits", f"there is no split {split!r}", "choose one of train, val, test")
    gray = images[torch.from_numpy(indices_by_split[split])]
    names = tuple(str(digit) for digit in range(10))
    return ArrayImages(
        gray.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[indices_by_split[split]]), names
    )


@lru_cache(maxsize=1)
def _digits() -> tuple[torch.Tensor, NDArray[np.int64]]:
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = np.asarray(pixels), np.asarray(labels, dtype=np.int64)
    small = torch.from_numpy(pixels).reshape(-1, 1, 8, 8).float() * (255 / 16)  # (N, 1, 8, 8), 17 levels to 0..255
    large = resize(small, [_SIZE, _SIZE], antialias=True).clamp(0, 255)
    return large.round().to(torch.uint8), labels
