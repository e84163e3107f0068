"""Images held in memory as bytes, and their batched pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from vitscope.data.augment.augment import Recipe, augment, erase, normalize
from vitscope.data.philox import Key


@dataclass(frozen=True)
class ArrayImages:
    """A split in memory.

    Attributes:
        images: Pixels, uint8 `(N, 3, H, W)`.
        labels: Class of each image, int64 `(N,)`.
        class_names: Name of each class.
        attributes: Further labels by name, each `(N,)`: `texture` in the cue-conflict split of `shapes`; or `(N, H, W)` of
            pixels: `object_mask`, True where an image's object is.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    attributes: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: ArrayLike) -> ArrayImages:
        """Return the images at `indices`, in that order."""
        selected = torch.as_tensor(np.asarray(indices))
        attributes = {name: values[selected] for name, values in self.attributes.items()}
        return replace(self, images=self.images[selected], labels=self.labels[selected], attributes=attributes)

    def relabeled(self, labels: Tensor) -> ArrayImages:
        """Return the same images with other labels."""
        return replace(self, labels=labels)

    def resized(self, size: int) -> ArrayImages:
        """Return the images at `size` x `size` (bilinear, antialiased); itself where they have it already.

        Masks of pixels are True where at least half of the resized pixel is.
        """
        if self.images.shape[-2:] == (size, size):
            return self
        attributes = {
            name: resize(values.float(), [size, size], antialias=True) >= 0.5 if values.ndim == 3 else values
            for name, values in self.attributes.items()
        }
        return replace(self, images=resize(self.images, [size, size], antialias=True), attributes=attributes)

    def batch(self, key: Key, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Return augmented, normalized images `(B, 3, H, W)` float32 and their labels `(B,)`."""
        image_indices = torch.from_numpy(key.indices)
        pixels = augment(self.images[image_indices], key, recipe)
        return erase(normalize(pixels, recipe.mean, recipe.std), key, recipe), self.labels[image_indices]
