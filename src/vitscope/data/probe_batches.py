"""Frozen batches for diagnostics: built when they are read, identical on every pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import overload

from torch import Tensor

from vitscope.data import range_checks

Batch = tuple[Tensor, Tensor]

#: Batches stay in memory once read where all of them together take at most this many bytes.
KEEP_BYTES = 512 * 2**20


class ProbeBatches(Sequence[Batch]):
    """A sequence of `(x, y)` in which batch b is `build(b)`, a pure function.

    Small sequences are built once; every read hands out copies, so nobody can change a batch for the next pass.

    Args:
        build: Makes batch b.
        n_batches: How many there are.
        n_images: Images in all of them.
        n_bytes: Size of all of them in memory, an estimate.
        attributes: Further labels by name, each `(n_images,)` in the order of the images: `texture` of `shapes`.
    """

    def __init__(
        self,
        build: Callable[[int], Batch],
        n_batches: int,
        n_images: int,
        n_bytes: int,
        attributes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._build = build
        self._n_batches = n_batches
        self.n_images = n_images
        self.attributes = dict(attributes or {})
        self._kept: dict[int, Batch] | None = {} if n_bytes <= KEEP_BYTES else None

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
        if self._kept is None:
            return self._build(index)
        if index not in self._kept:
            self._kept[index] = self._build(index)
        x, y = self._kept[index]
        return x.clone(), y.clone()


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
