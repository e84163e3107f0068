"""A data module of a few images that counts how often each one is read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from tests.helpers.small_data import small
from vitscope.data import DataModule
from vitscope.data.sources.array_images import ArrayImages

#: images read since the last `clear`, by index
READS: Counter[int] = Counter()


class CountedImages(ArrayImages):
    """Images in memory whose pipeline counts what it is asked for."""

    def batch(self, key, recipe):
        READS.update(np.asarray(key.indices).tolist())
        return super().batch(key, recipe)


def counted(split, *, root=None, split_seed=0):
    images = small(split)
    return CountedImages(images.images, images.labels, images.class_names)


def counted_module(**options) -> DataModule:
    return DataModule(counted, name="small", num_classes=3, image_size=8, batch_size=8, eval_batch_size=8, **options)


def network() -> torch.nn.Module:
    """Return a network of 8x8 images with a convolution, BatchNorm and a head."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3),
    ).eval()  # fmt: skip
