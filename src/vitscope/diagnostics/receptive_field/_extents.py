"""Extents of a field on an image: radius and square around a point that hold a share of its mass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.runtime.distributed import gather_objects
from vitscope.stats.jackknife import N_GROUPS, group_numbers_of_batch

#: a share is reached where it is missed by rounding alone
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Distances:
    """Distances of the pixels of an image from a point, sorted once for many fields.

    Attributes:
        values: (n_distances,) different distances, ascending.
        index: (H * W,) place of each pixel's distance among them.
        pixels: (n_distances,) share of the image's pixels within each.
    """

    values: np.ndarray
    index: np.ndarray
    pixels: np.ndarray


def distances(size: tuple[int, int], center: np.ndarray) -> tuple[Distances, Distances]:
    """Return the Euclidean and the Chebyshev distance of each pixel's center from a point, in pixels.

    Args:
        size: (H, W) of the image.
        center: (2,) row and column of the point, where whole numbers are centers of pixels.
    """
    rows, columns = np.abs(np.arange(size[0]) - center[0]), np.abs(np.arange(size[1]) - center[1])
    euclidean = np.hypot(rows[:, None], columns[None, :])
    square = np.maximum(rows[:, None], columns[None, :])
    return _sorted(euclidean), _sorted(square)


def _sorted(distance: np.ndarray) -> Distances:
    values, index = np.unique(distance.round(9).ravel(), return_inverse=True)
    index = index.ravel()
    return Distances(values, index, np.bincount(index, minlength=len(values)).cumsum() / distance.size)


def radii(field: np.ndarray, distance: Distances, shares: np.ndarray) -> np.ndarray:
    """Return the radii within which lie the shares of a field, NaN for a field that is 0 or not finite.

    The share within a radius is known at the distances of pixel centers and linear between them, so that the radius follows
    small changes of the field.

    Args:
        field: (H * W,) at least 0.
        distance: Euclidean distances from the center.
        shares: (n_shares,) in (0, 1].
    """
    held = _held(field, distance)
    return np.full(len(shares), np.nan) if held is None else _reached(shares, held, distance.values)


def area_ratios(field: np.ndarray, distance: Distances, shares: np.ndarray) -> np.ndarray:
    """Return the shares of the image's pixels in the squares that hold the shares of a field, linear between two squares.

    What of a square lies outside of the image is not counted. A flat field has the shares themselves. Arguments are those of
    `radii`, with Chebyshev distances.
    """
    held = _held(field, distance)
    if held is None:
        return np.full(len(shares), np.nan)
    return _reached(shares, np.append(0.0, held), np.append(0.0, distance.pixels))


def _reached(shares: np.ndarray, held: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return where the ascending function ``held`` of ``values`` reaches the shares first, linear between two values."""
    shares = shares * (1 - _ROUNDING)
    after = np.zeros(len(shares), int)
    if len(held) > 1:
        after = np.clip(np.searchsorted(held, shares), 1, len(held) - 1)
    before = np.maximum(after - 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.clip((shares - held[before]) / (held[after] - held[before]), 0, 1)
    return np.where(after > 0, values[before] + part * (values[after] - values[before]), values[0])


def _held(field: np.ndarray, distance: Distances) -> np.ndarray | None:
    """Return the share of a field ``(H * W,)`` within each distance ``(n_distances,)``; None where it is 0 or not finite."""
    total = field.sum()
    if not (np.isfinite(total) and total > 0):
        return None
    return np.bincount(distance.index, field, len(distance.values)).cumsum() / total


def centroid(field: np.ndarray) -> np.ndarray:
    """Return row and column ``(2,)`` of the center of mass of a field ``(H, W)``."""
    rows, columns = (np.arange(n) for n in field.shape)
    return np.array([field.sum(axis=1) @ rows, field.sum(axis=0) @ columns]) / field.sum()


class GroupSums:
    """Sums of fields over the images of each group, so that memory does not depend on the number of images."""

    def __init__(self) -> None:
        self.fields: Tensor | None = None  # (n_groups, H, W)

    def add(self, fields: Tensor, groups: Tensor) -> None:
        """Add the fields ``(B, H, W)`` of images in float64 to their groups ``(B,)``."""
        if self.fields is None:
            self.fields = fields.new_zeros(N_GROUPS, *fields.shape[1:])
        self.fields.index_add_(0, groups.to(fields.device), fields)


def gathered(sums: GroupSums | None) -> np.ndarray | None:
    """Return the sums ``(n_groups, H, W)`` over all ranks; None where no rank added any."""
    state = None if sums is None or sums.fields is None else sums.fields.cpu().numpy()
    states = [fields for fields in gather_objects(state) if fields is not None]
    return np.sum(states, axis=0) if states else None


def image_groups(number: int, n_images: int) -> Tensor:
    """Return the group ``(n_images,)`` of each image of a batch, which follows from its place alone on whatever rank."""
    return torch.from_numpy(group_numbers_of_batch(number, n_images))
