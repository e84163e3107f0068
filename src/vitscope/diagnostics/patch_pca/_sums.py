"""Moments of patch features by groups of images, and the features of the first images, from one pass over the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vitscope.core.tap import Tap
from vitscope.linalg.feature_moments import FeatureMoments
from vitscope.runtime.distributed import gather_objects
from vitscope.stats.jackknife import N_GROUPS, group_numbers_of_batch

#: which patches ``(B, h, w)`` of a map ``(B, C, h, w)`` are used
PatchChoice = Callable[[int, Tensor], Tensor]


class PatchSums:
    """Sums that are kept between batches; memory does not depend on the number of images.

    Args:
        names: Names of the chosen taps.
        n_shown: First images whose features are kept.
        choice: Function that tells which patches count, by the index of the chosen tap and its map; None for all.
    """

    def __init__(self, names: Sequence[str], n_shown: int, choice: PatchChoice | None = None) -> None:
        self.names, self.n_shown, self._choice = list(names), n_shown, choice
        self.groups = [[FeatureMoments() for _ in range(N_GROUPS)] for _ in names]
        self.border = [FeatureSum() for _ in names]
        self.grids: list[tuple[int, ...] | None] = [None] * len(self.names)
        self.n_images = 0
        self._batch: dict[int, Tensor] = {}
        self._features: list[tuple[int, list[np.ndarray]]] = []

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take the maps ``(B, C, h, w)`` of a tap, if it is one of the chosen."""
        if tap.name not in self.names:
            return
        place, shape = self.names.index(tap.name), tuple(x.shape[1:])
        known_shape = self.grids[place] or shape
        if known_shape != shape:
            raise ValueError(f"Expected maps of one shape at {tap.name}, received {known_shape} and {shape}.")
        self.grids[place] = shape
        self._batch[place] = x.clone()  # the batch's number, which gives the groups, is told at its end

    def close_batch(self, number: int, n_images: int) -> None:
        """Add the batch's features to the groups of its images, and keep those of the first images."""
        self.n_images += n_images
        group_of_image = torch.from_numpy(group_numbers_of_batch(number, n_images))
        for place, x in sorted(self._batch.items()):
            used = None if self._choice is None else self._choice(place, x)
            vectors = x.permute(0, 2, 3, 1)  # (B, h, w, C)
            self.border[place].add(vectors)
            for group in range(N_GROUPS):
                members = (group_of_image == group).to(x.device)
                rows = vectors[members] if used is None else vectors[members][used[members]]
                if rows.numel():
                    self.groups[place][group].add(rows.reshape(-1, x.shape[1]))
        n_missing = self.n_shown - sum(len(maps[0]) for _, maps in self._features if maps)
        if n_missing > 0 and len(self._batch) == len(self.names):
            maps = [self._batch[place][:n_missing].cpu() for place in range(len(self.names))]
            self._features.append((number, [(m if m.dtype == torch.float64 else m.float()).numpy() for m in maps]))
        self._batch.clear()

    def result(self) -> list[list[FeatureMoments]]:
        """Return this rank's moments of each tap and group."""
        return self.groups

    def shown_features(self) -> list[np.ndarray]:
        """Return the features ``(n_shown, C, h, w)`` of each chosen tap, in the order of the images, the same on every rank."""
        parts = sorted((part for share in gather_objects(self._features) for part in share), key=lambda part: part[0])
        if not parts:
            return []
        return [np.concatenate([maps[i] for _, maps in parts])[: self.n_shown] for i in range(len(self.names))]


class FeatureSum:
    """Sums of the feature vectors at the border of maps and of all, whose means tell on which side the background lies."""

    def __init__(self) -> None:
        self.n_border = self.n_all = 0
        self.border: Tensor | None = None
        self.all: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add maps ``(B, h, w, C)``."""
        total, inner = vectors.double().sum((0, 1, 2)), vectors[:, 1:-1, 1:-1].double().sum((0, 1, 2))
        n_inner = vectors[:, 1:-1, 1:-1].numel() // vectors.shape[-1]
        n = vectors.numel() // vectors.shape[-1]
        self.n_border, self.n_all = self.n_border + n - n_inner, self.n_all + n
        self.border = total - inner if self.border is None else self.border + total - inner
        self.all = total if self.all is None else self.all + total

    def border_side(self, axis: np.ndarray) -> float:
        """Return the mean score of the border minus that of all patches, over all ranks, along an axis ``(C,)``."""
        state = None if self.border is None or self.all is None else (self.border.cpu().numpy(), self.all.cpu().numpy())
        shares = [share for share in gather_objects((state, self.n_border, self.n_all)) if share[0] is not None]
        border, total = (np.sum([share[0][i] for share in shares], axis=0) for i in range(2))
        n_border, n_all = (sum(share[i] for share in shares) for i in (1, 2))
        return float((border / n_border - total / n_all) @ axis)
