"""Representations of all images at every tap: pooled or flattened features, gathered over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitscope.core.probe import Probe
from vitscope.core.tap import Tap
from vitscope.linalg.basis_memory import free_memory
from vitscope.runtime import distributed


@dataclass(frozen=True)
class Representation:
    """Features of n images at one tap, float64 on the CPU, up to a rotation of the features.

    Attributes:
        features: (n, r) rows with the inner products of the images' features.
        patterns: (n, r') the same after each image's mean over its features was taken away.
    """

    features: Tensor
    patterns: Tensor

    def rows(self, index: Tensor) -> Representation:
        """Return the representation of some of the images."""
        return Representation(self.features[index], self.patterns[index])


def pooled(x: Tensor) -> Tensor:
    """Return the mean over positions of maps ``(B, C, h, w)``, ``(B, C)`` float64 on the CPU."""
    return x.detach().flatten(2).mean(dim=2, dtype=torch.float64).cpu()


def flattened(x: Tensor) -> Tensor:
    """Return maps ``(B, C, h, w)`` as rows ``(B, C h w)`` on the CPU, a copy."""
    rows = x.detach().flatten(1).cpu()
    return rows.clone() if rows.data_ptr() == x.data_ptr() else rows


class FeatureStore:
    """The features of this rank's images, batch by batch.

    Args:
        names: Names of the taps.
        n_images: Number of images on all ranks.
        max_memory: Bytes that features and Gram matrices of all images may take; None: a quarter of what is free.
    """

    def __init__(self, names: Sequence[str], n_images: int, max_memory: float | None) -> None:
        self.names, self.n_images, self.max_memory = names, n_images, max_memory
        self._batches: list[tuple[int, list[Tensor]]] = []  # number, (B, D) of each tap

    def add(self, number: int, features: Sequence[Tensor]) -> None:
        """Keep the features ``(B, D)`` of a batch at every tap.

        Raises:
            ValueError: Those of all images would not fit into memory.
        """
        if not self._batches:
            self._check_memory(features)
        self._batches.append((number, list(features)))

    def _check_memory(self, features: Sequence[Tensor]) -> None:
        # features, their copies in float64 or as Gram matrices, and the matrices of one measure
        images = self.n_images
        widths = [min(f.shape[1], images + 1) for f in features]
        held = sum(f.shape[1] * f.element_size() for f in features) + sum(16 * w + 16 * images for w in widths)
        needed = float(images * held)
        limit = free_memory(torch.device("cpu")) / 4 if self.max_memory is None else self.max_memory
        if needed > limit:
            widest = max(range(len(features)), key=lambda i: features[i].shape[1])
            raise ValueError(
                f"similarity compares all images at once and needs {needed / 2**30:.3g} GiB for the features of {images} "
                f"images at {len(features)} taps (up to {features[widest].shape[1]} at {self.names[widest]!r}), received "
                f"max_memory={limit / 2**30:.3g} GiB: use n_images={max(4, int(images * (limit / needed) ** 0.5))}, "
                "features='pooled', or fewer taps."
            )

    def representations(self) -> list[Representation]:
        """Return the representation of every tap, all ranks' images in the order of the batches."""
        result = []
        for index in range(len(self.names)):
            local = [(number, features[index].numpy()) for number, features in self._batches]
            parts = sorted((p for share in distributed.gather_objects(local) for p in share), key=lambda part: part[0])
            result.append(_representation(torch.cat([torch.from_numpy(rows) for _, rows in parts])))
            for _, features in self._batches:
                features[index] = features[index][:0]  # its memory is free again
        return result


def _representation(x: Tensor) -> Representation:
    """Return features ``(n, D)`` in float64; more features than images as rows of a square root of their Gram matrix."""
    n, width = x.shape
    if width <= n:
        x = x.double()
        return Representation(x, x - x.mean(dim=1, keepdim=True))
    means = torch.stack([row.double().mean() for row in x])
    gram = torch.zeros(n, n, dtype=torch.float64)
    for part in x.split(1 << 14, dim=1):
        centered = part.double() - means[:, None]
        gram += centered @ centered.T
    if not bool(torch.isfinite(gram).all()):
        return Representation(torch.full((n, 1), torch.nan, dtype=torch.float64), gram[:, :1])
    values, vectors = torch.linalg.eigh(gram)
    patterns = vectors * values.clamp_min(0).sqrt()  # (n, n)
    # what an image's features have in common is orthogonal to its pattern
    return Representation(torch.cat([patterns, means[:, None] * width**0.5], dim=1), patterns)


def null_reason(x: Representation) -> str | None:
    """Return why a representation cannot be compared; None where it can."""
    if not bool(torch.isfinite(x.features).all()):
        return "its activations are not finite"
    spread = (x.features - x.features.mean(dim=0)).square().sum()
    if bool(spread <= 1e-14 * x.features.square().sum()):  # rounding of float32
        return "it does not vary between images"
    return None


def check_reached(features: dict[int, Tensor], taps: Sequence[Tap]) -> list[Tensor]:
    """Return the features of every tap in order.

    Raises:
        ValueError: A tap that the forward pass did not reach.
    """
    for index, tap in enumerate(taps):
        if index not in features:
            raise ValueError(f"Expected a feature map at tap {tap.name!r}, received none: the model did not run it.")
    return [features[index] for index in range(len(taps))]


def all_taps(probe: Probe, other: Probe | None) -> list[Tap]:
    """Return the taps of a probe, and after them those of a second one."""
    return [*probe.taps, *(other.taps if other is not None else ())]
