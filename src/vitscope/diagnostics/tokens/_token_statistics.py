"""Norms of the tokens of each tap, and running sums over images of their largest activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean, estimates
from vitscope.core.shared_values.feature_squares import channel_squares, flat_map, squared_map, token_squares
from vitscope.core.tap import Tap
from vitscope.runtime import distributed
from vitscope.stats.intervals import Estimate

#: Sun et al. 2024: a massive activation is larger than 100, and at least 1000 times the median magnitude
MASSIVE_MAGNITUDE, MASSIVE_RATIO = 100.0, 1000.0


class KeptRows:
    """Rows of the first images, in the order of the images, whichever rank saw them.

    Args:
        limit: Images whose rows are kept; None for all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0
        self._batches: list[tuple[int, np.ndarray]] = []
        self._waiting: np.ndarray | None = None

    def add(self, rows: Tensor) -> None:
        """Keep rows ``(B, ...)`` of a batch whose number `close` will tell, in float32 and no more than are asked for."""
        remaining = len(rows) if self.limit is None else max(0, self.limit - self.count)
        self._waiting = rows[:remaining].detach().float().cpu().numpy()

    def close(self, number: int) -> None:
        """Note the number of the batch."""
        if self._waiting is not None and len(self._waiting):
            self._batches.append((number, self._waiting))
            self.count += len(self._waiting)
        self._waiting = None

    def state(self) -> list[tuple[int, np.ndarray]]:
        """Return the batches with their numbers."""
        return self._batches


def gathered_rows(kept_rows: Sequence[KeptRows]) -> list[np.ndarray | None]:
    """Return all ranks' rows ``(n_images, ...)`` of each; None where nothing was kept."""
    gathered = distributed.gather_objects([rows.state() for rows in kept_rows])
    results: list[np.ndarray | None] = []
    for rows, states in zip(kept_rows, zip(*gathered)):
        batches = sorted((batch for state in states for batch in state), key=lambda batch: batch[0])
        results.append(np.concatenate([part for _, part in batches])[: rows.limit] if batches else None)
    return results


class TapEstimates(NamedTuple):
    """Means over images by tap, with their intervals; the attributes of `TapSums` of these names say of what."""

    norm: list[Estimate]
    prefix_norm: list[Estimate]
    channel: list[Estimate]
    peak: list[Estimate]
    largest: list[Estimate]
    ratio: list[Estimate]
    massive: list[Estimate]
    on_prefix: list[Estimate]


def tap_estimates(taps: Sequence[TapSums], level: float) -> TapEstimates:
    """Return the means over the images of all ranks, with intervals of a coverage ``level``."""
    n_means = len(TapEstimates._fields)
    means = estimates([getattr(tap, name) for tap in taps for name in TapEstimates._fields], level)
    return TapEstimates(*(means[place::n_means] for place in range(n_means)))


class TapFacts(NamedTuple):
    """What all images have in common at one tap.

    Attributes:
        shape: (C, h, w) of its maps; zeros where no rank has seen one.
        n_prefix: Number of its prefix tokens.
        zero_medians: Number of images whose median magnitude is zero.
    """

    shape: tuple[int, ...]
    n_prefix: int
    zero_medians: int


def tap_facts(taps: Sequence[TapSums]) -> list[TapFacts]:
    """Return the facts about each tap from the images of all ranks, some of which may have seen none."""
    gathered = distributed.gather_objects([(tap.shape, tap.n_prefix, tap.zero_medians) for tap in taps])
    facts = []
    for states in zip(*gathered):  # those of one tap, by rank
        shapes, prefix_counts, zero_counts = zip(*states)
        shape = next((shape for shape in shapes if shape is not None), (0, 0, 0))
        facts.append(TapFacts(shape, max(prefix_counts), sum(zero_counts)))
    return facts


class TapSums:
    """Values that are kept of one tap: norms of tokens, and means over images.

    Attributes:
        shape: (C, h, w) of its maps; None before the first.
        n_prefix: Number of its prefix tokens.
        patch: Norms of its patch tokens or positions, kept.
        prefix: Norms of its prefix tokens, kept.
        norm: Mean norm of an image's patch tokens.
        prefix_norm: Norm of each prefix token, mean over images.
        channel: Root mean square of each channel over positions.
        peak: Largest magnitude of each channel over all tokens.
        largest: Largest magnitude of an image.
        ratio: The largest magnitude over the median magnitude.
        massive: Whether an image has a massive activation.
        on_prefix: Whether the largest magnitude is one of a prefix token.
        zero_medians: Number of images whose median magnitude is zero.
    """

    def __init__(self, norm_images: int | None, positions: int | None) -> None:
        self.positions = positions
        self.shape: tuple[int, ...] | None = None
        self.n_prefix = 0
        self.patch, self.prefix = KeptRows(norm_images), KeptRows(norm_images)
        self.norm, self.prefix_norm, self.channel, self.peak = (RunningMean() for _ in range(4))
        self.largest, self.ratio = RunningMean(), RunningMean()
        self.massive, self.on_prefix = RunningMean(answers=True), RunningMean(answers=True)
        self.zero_medians = 0

    def read(self, tap: Tap, x: Tensor, prefix: Tensor | None) -> None:
        """Take maps ``(B, C, h, w)`` and the prefix tokens ``(B, n_prefix, C)`` in front of them."""
        shape = tuple(x.shape[1:])
        if self.shape is None:
            self.shape, self.n_prefix = shape, 0 if prefix is None else prefix.shape[1]
        if self.shape != shape:
            raise ValueError(f"Expected maps of one shape at {tap.name}, received {self.shape} and {shape}.")
        norms = token_squares(x).sqrt()  # (B, n)
        self.patch.add(norms)
        self.norm.add(norms.double().mean(1))
        flat = flat_map(x)  # (B, C, n)
        self.channel.add((channel_squares(x) / flat.shape[2]).sqrt())
        peak = squared_map(x).amax(2)  # (B, C)
        on_prefix = torch.zeros(len(x), device=x.device)
        if prefix is not None:
            prefix_square = prefix.to(flat.dtype).square()  # (B, n_prefix, C)
            prefix_norms = prefix_square.sum(2).sqrt()
            self.prefix.add(prefix_norms)
            self.prefix_norm.add(prefix_norms)
            prefix_peak = prefix_square.amax(1)
            on_prefix = (prefix_peak.amax(1) > peak.amax(1)).double()
            peak = torch.maximum(peak, prefix_peak)
        peak = peak.sqrt()
        self._add_largest(peak, median_magnitude(flat, self.positions), on_prefix)

    def _add_largest(self, peak: Tensor, median: Tensor, on_prefix: Tensor) -> None:
        largest = peak.amax(1)  # (B,)
        self.peak.add(peak)
        self.largest.add(largest)
        self.ratio.add(largest.double() / median.double())
        is_massive = (largest > MASSIVE_MAGNITUDE) & (largest >= MASSIVE_RATIO * median)
        self.massive.add(torch.where(largest.isfinite(), is_massive.double(), torch.nan))
        self.on_prefix.add(on_prefix)
        self.zero_medians += int((median == 0).sum())

    def close(self, number: int) -> None:
        """Note the number of the batch that was read."""
        self.patch.close(number)
        self.prefix.close(number)


def median_magnitude(x: Tensor, positions: int | None) -> Tensor:
    """Return the median magnitude of the activations of each image's map ``(B, C, n)``: ``(B,)``, the lower of two.

    Args:
        x: The maps.
        positions: Largest number of positions of a map, the same for every image; None for all.
    """
    n = x.shape[2]
    if positions is not None and positions < n:
        # drawn once and for all: equal strides would fall on a few columns of the map
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:positions]
        x = x[:, :, drawn.to(x.device)]
    magnitudes = x.abs().flatten(1)
    if magnitudes.device.type != "cpu":
        return magnitudes.median(1).values
    middle = (magnitudes.shape[1] - 1) // 2
    # NumPy's partition of float32 takes a tenth of the time of torch's median on a CPU
    return torch.from_numpy(np.partition(magnitudes.numpy(), middle, axis=1)[:, middle].copy())
