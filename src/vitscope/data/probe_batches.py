"""Frozen batches for diagnostics: built when they are read, identical on every pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

from vitscope.data import batch_cache, philox, range_checks
from vitscope.data.augment.augment import Recipe
from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.sources.file_images import FileImages

Batch = tuple[Tensor, Tensor]


class ProbeBatches(Sequence[Batch]):
    """A sequence of `(x, y)` in which batch b is `build(b)`, a pure function.

    What is kept of them is said in `vitscope.data.batch_cache`; at first small sequences in the host's memory. Every read hands
    out copies, so nobody can change a batch for the next pass.

    Args:
        build: Function that makes batch b.
        n_batches: How many there are.
        n_images: Images in all of them.
        n_bytes: Size of all of them in memory.
        attributes: Further labels by name, each `(n_images,)` in the order of the images: `texture` of `shapes`; or
            `(n_images, H, W)` of their pixels: `object_mask`.
        targets: Function that makes the targets of batch b alone, without reading an image; None reads the batch.

    Attributes:
        place: Where batches are kept once read: `host`, `device`, `disk` or `none`.
        device: Where batches are given.
        reads_by_index: True: a rank reads the batches of its share alone.
    """

    reads_by_index = True

    def __init__(
        self,
        build: Callable[[int], Batch],
        n_batches: int,
        n_images: int,
        n_bytes: int,
        attributes: Mapping[str, Tensor] | None = None,
        targets: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._build, self._targets = build, targets
        self._n_batches = n_batches
        self.n_images, self.n_bytes = n_images, n_bytes
        self.attributes = dict(attributes or {})
        self._keep("host" if n_bytes <= batch_cache.SMALL_BYTES else "none", torch.device("cpu"))

    def _keep(self, place: str, device: torch.device) -> None:
        self.place, self.device = place, device
        self._store = batch_cache.new_store(place, self.n_bytes, device)

    @property
    def is_read_again(self) -> bool:
        """Whether each pass reads and decodes the images."""
        return self.place == "none"

    def cached(self, choice: str, device: torch.device) -> ProbeBatches:
        """Return the same batches on a device, kept where `choice` says; nothing is read yet.

        Args:
            choice: One of `vitscope.data.cache_choices.CHOICES`.
            device: The model's.

        Raises:
            ConfigError: An unknown choice, or a place without the space.
            StorageError: The disk has no space.
        """
        batches = copy.copy(self)
        batches._keep(batch_cache.choose_place(choice, self.n_bytes, device), device)
        return batches

    def target_batches(self) -> Iterator[Tensor]:
        """Yield the targets of each batch; no image is read where `targets` was given."""
        for index in range(self._n_batches):
            yield self[index][1] if self._targets is None else self._targets(index)

    def __len__(self) -> int:
        return self._n_batches

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Return one batch, or a list of them.

        Raises:
            IndexError: There is no such batch.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n_batches))]
        if not -self._n_batches <= index < self._n_batches:
            raise IndexError(f"Expected a batch in 0..{self._n_batches - 1}, received {index}.")
        index %= self._n_batches
        if self._store is not None and (batch := self._store.get(index)) is not None:
            return batch
        x, y = self._build(index)
        if self._store is not None:
            self._store.put(index, (x, y))
            if (batch := self._store.get(index)) is not None:
                return batch
        return x.to(self.device), y.to(self.device)


def freeze_batches(
    images: ArrayImages | FileImages,
    order: np.ndarray,
    recipe: Recipe,
    *,
    batch_size: int,
    seed: int,
    mixed: Callable[[Tensor, Tensor, tuple[int, ...]], Batch] | None,
    n_bytes: int,
) -> ProbeBatches:
    """Return batches of a split, each a function of the seed and its number.

    Args:
        images: The images of the split.
        order: (n,) numbers of the images, in the order in which they fill the batches.
        recipe: Augmentation and normalization.
        batch_size: Images a batch; the last one may be smaller.
        seed: Seed of augmentation, by (seed, number of the image), and of mixing, by (seed, number of the batch).
        mixed: Mixes images and targets of a batch by a seed; None leaves them as they are.
        n_bytes: Size of all batches in memory.
    """

    def numbers(index: int) -> np.ndarray:
        return order[index * batch_size : (index + 1) * batch_size]

    def build(index: int) -> Batch:
        x, y = images.batch(philox.Key(numbers(index), 0, philox.PROBE, seed), recipe)
        return mixed(x, y, (seed, philox.PROBE, index)) if mixed is not None else (x, y)

    def targets(index: int) -> Tensor:
        y = images.labels[torch.from_numpy(numbers(index))]
        if mixed is None:
            return y
        blank = torch.zeros(len(y), 1, recipe.image_size, recipe.image_size)  # mixing takes its boxes from the size
        return mixed(blank, y, (seed, philox.PROBE, index))[1]

    attributes = {} if mixed is not None else _attributes(images, order, recipe)
    return ProbeBatches(build, -(-len(order) // batch_size), len(order), n_bytes, attributes, targets)


def _attributes(images: ArrayImages | FileImages, order: np.ndarray, recipe: Recipe) -> dict[str, Tensor]:
    """Return the further labels of the images; those of pixels only where no augmentation moves or erases pixels."""
    if not isinstance(images, ArrayImages):
        return {}
    keeps_pixels = recipe.augment == "none" and not recipe.random_erasing
    selected = images.select(order).attributes
    return {name: values for name, values in selected.items() if keeps_pixels or values.ndim == 1}


def limit_images(n_images: int | None, available: int, name: str | None) -> int:
    """Return how many images a probe reads: those asked for, at most those available, with a warning.

    Args:
        n_images: Images asked for; None for all.
        available: Images of the split.
        name: Name of the data set, for the warning.

    Raises:
        ConfigError: Fewer than one image.
    """
    if n_images is None:
        return available
    range_checks.integer("probe.n_images", n_images, 1)
    if n_images > available:
        message = f"probe.n_images={n_images}: the split of {name} has {available} images; using all of them"
        warnings.warn(message, stacklevel=3)
    return min(n_images, available)
