"""Gradients of the central position of maps with respect to the images, summed over all images of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.independent_images import refuse_dependent_images
from vitscope.core.guard.probe_guard import refuse_unfit_weights
from vitscope.core.probe import Probe
from vitscope.core.structure_lookup import structure_reader
from vitscope.core.tap import Tap
from vitscope.diagnostics.receptive_field._extents import (
    Distances,
    GroupSums,
    area_ratios,
    centroid,
    distances,
    gathered,
    image_groups,
    radii,
)
from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import failing_together, gather_objects, world_size
from vitscope.runtime.progress import track
from vitscope.stats.jackknife import N_GROUPS

#: shares of the field whose radius is given
RADIUS_SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class FieldsOfTaps:
    """Fields of the taps of one model and their extents, last axis or axes as in the result.

    Attributes:
        map_sizes: (n_taps, 2).
        cells: (n_taps, 2) row and column of the center of the central position's cell.
        centroid: (n_taps, 2) center of mass.
        centers: (n_taps, 2) points around which extents are measured.
        field: (n_taps, H, W) sums to 1.
        radius: (n_taps, n_radius_shares) pixels.
        area: (n_taps, n_area_shares) share of the image.
        radius_without: (n_groups, n_taps, n_radius_shares) without the images of a group.
        area_without: (n_groups, n_taps, n_area_shares) likewise.
        coherence: (n_taps,) coherence of the channels' gradients in the first batch, NaN where it is not measured.
        reasons: Why taps are null, by name.
        n_images: Number of images.
        dtype: Type of the gradients.
    """

    map_sizes: np.ndarray
    cells: np.ndarray
    centroid: np.ndarray
    centers: np.ndarray
    field: np.ndarray
    radius: np.ndarray
    area: np.ndarray
    radius_without: np.ndarray
    area_without: np.ndarray
    coherence: np.ndarray
    reasons: dict[str, str]
    n_images: int
    dtype: str


def measure_fields(
    probe: Probe, taps: Sequence[Tap], contribution: str, center: str, area_shares: np.ndarray
) -> FieldsOfTaps:
    """Return the fields of taps; arguments are those of `effective_receptive_field`.

    Raises:
        ValueError: Images or maps whose size changes, or weights that cannot be differentiated.
    """
    refuse_unfit_weights(probe.model, differentiated=True)
    sums = _Sums(taps, contribution)
    half = probe.dtype in (torch.bfloat16, torch.float16)
    with probe.guard(logits=False, dtype=torch.float32 if half else None) as model:
        dtype = str(probe.dtype).removeprefix("torch.")
        for p in model.parameters():
            p.requires_grad_(False)  # only images are differentiated; the guard gives the flags back
        refuse_dependent_images(model, next(probe.iter_batches())[0][:2], 1, "effective_receptive_field")
        batches = track(probe.local_batches(), "receptive field", -(-probe.n_batches // world_size()))
        with structure_reader().reading(model, taps, sums.read), failing_together():
            for number, (x, _) in batches:
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    model(x)
                    sums.close_batch(number, x)
    return _fields_of_taps(taps, sums, center, area_shares, dtype)


@contextmanager
def field_pass(
    probe: Probe, taps: Sequence[Tap], contribution: str, number: int
) -> Iterator[tuple[Callable[[], None], Callable[[str, np.ndarray], FieldsOfTaps]]]:
    """Yield the functions that read the fields of one batch and evaluate them, as `measure_fields` does, to time them.

    Args:
        probe: A probe of one batch.
        taps: Those of `measure_fields`.
        contribution: That of `measure_fields`.
        number: Number of the batch: the first one, 0, has further gradients.
    """
    sums = _Sums(taps, contribution)
    half = probe.dtype in (torch.bfloat16, torch.float16)
    with probe.guard(logits=False, dtype=torch.float32 if half else None) as model:
        for p in model.parameters():
            p.requires_grad_(False)  # the guard gives the flags back
        images, _ = next(probe.iter_batches())
        x = images.detach().requires_grad_()

        def read_batch() -> None:
            with torch.enable_grad():
                model(x)
                sums.close_batch(number, x)

        def evaluate_extents(center: str, area_shares: np.ndarray) -> FieldsOfTaps:
            return _fields_of_taps(taps, sums, center, area_shares, "float32")

        with structure_reader().reading(model, taps, sums.read):
            yield read_batch, evaluate_extents


class _Sums:
    """Sums of each tap's field, which are kept between batches."""

    def __init__(self, taps: Sequence[Tap], contribution: str) -> None:
        self.taps, self.contribution = taps, contribution
        self.sums = {i: GroupSums() for i in range(len(taps))}
        self.map_sizes: dict[int, tuple[int, int]] = {}
        self.image_size: tuple[int, int] | None = None
        self.n_images = 0
        #: coherence of the channels at each tap, of the first batch
        self.coherence: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's map ``(B, C, h, w)``: its central position is kept with its graph."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if self.map_sizes.setdefault(index, size) != size:
            raise ValueError(f"Expected maps of one size at {tap.name}, received {self.map_sizes[index]} and {size}.")
        # a copy, as the model may change the map in place afterwards
        self._features[index] = x[:, :, size[0] // 2, size[1] // 2].clone()

    def close_batch(self, number: int, x: Tensor) -> None:
        """Differentiate each tap's position with respect to the images ``x (B, c, H, W)`` and add the contributions."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        self.image_size = self.image_size or size
        if self.image_size != size:
            raise ValueError(f"Expected images of one size, received {self.image_size} and {size}.")
        groups = image_groups(number, len(x))
        self.n_images += len(x)
        features, self._features = self._features, {}
        while features:
            stop_flag.check()
            index = next(iter(features))
            values = features.pop(index)  # (B, C)
            has_more, is_first = len(features) > 0, number == 0 and self.contribution == "squared"
            gradient = _gradient(self._differentiated(values, number), x, retain_graph=has_more or is_first)
            if is_first:
                self.coherence[index] = _coherence(gradient, values, x, retain_graph=has_more)
            self.sums[index].add(self._contributions(gradient), groups)

    def _differentiated(self, values: Tensor, number: int) -> Tensor:
        """Return the number that is differentiated for the values ``(B, C)`` of a position."""
        if self.contribution == "positive":
            return values.relu().sum()
        return (values * _signs(values, number)).sum() if self.contribution == "channels" else values.sum()

    def _contributions(self, gradient: Tensor) -> Tensor:
        """Return each pixel's contribution ``(B, H, W)`` in float64."""
        gradient = gradient.double()
        return gradient.relu().sum(1) if self.contribution == "positive" else gradient.square().sum(1)


def _gradient(value: Tensor, x: Tensor, retain_graph: bool) -> Tensor:
    """Return the gradient ``(B, c, H, W)`` of a number with respect to the images; zeros where it does not depend on them."""
    if not value.requires_grad:  # does not depend on the images, or is read where gradients are cut off
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, x, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()


def _signs(values: Tensor, number: int) -> Tensor:
    """Return random signs ``(B, C)`` that follow from the number of the batch, on whatever rank and device."""
    generator = torch.Generator().manual_seed(number)
    signs = torch.randint(0, 2, tuple(values.shape), generator=generator)
    return (2 * signs - 1).to(values)


def _coherence(of_sum: Tensor, values: Tensor, x: Tensor, retain_graph: bool) -> Tensor:
    """Return the squared gradient of the channels' sum over the sum of the channels' squared gradients.

    It is about 1 for independent channels and 0 where their gradients cancel. The denominator is estimated by random signs: its
    mean is that of the squared gradient of the signed sum.
    """
    of_signs = _gradient((values * _signs(values, 0)).sum(), x, retain_graph)
    return of_sum.double().square().sum() / of_signs.double().square().sum()  # NaN of two zeros


def _fields_of_taps(taps: Sequence[Tap], sums: _Sums, center: str, area_shares: np.ndarray, dtype: str) -> FieldsOfTaps:
    size, map_sizes, n_images = _sizes(sums)
    n = len(taps)
    cells = _central_cells(size, map_sizes)
    field, centroids, centers = np.full((n, *size), np.nan), np.full((n, 2), np.nan), np.full((n, 2), np.nan)
    # all images first, then without each group
    radius = np.full((1 + N_GROUPS, n, len(RADIUS_SHARES)), np.nan)
    area = np.full((1 + N_GROUPS, n, len(area_shares)), np.nan)
    reasons: dict[str, str] = {}
    for i, tap in enumerate(taps):
        groups = gathered(sums.sums[i])  # (n_groups, H, W)
        mass = None if groups is None else groups.sum(axis=0)
        reason = _null_reason(mass)
        if groups is None or mass is None or reason:
            reasons[tap.name] = reason
            continue
        field[i], centroids[i] = mass / mass.sum(), centroid(mass)
        centers[i] = _half_pixels(centroids[i]) if center == "mass" else cells[i]
        parts = [mass, *(mass - group for group in groups)]
        places = [centers[i] for _ in parts]
        if center == "mass":
            # of the mass without a group as well, so that the interval knows of a center that other images would round elsewhere
            places = [_half_pixels(centroid(part)) if part.sum() > 0 else centers[i] for part in parts]
        radius[:, i], area[:, i] = _extents(parts, places, area_shares)
    return FieldsOfTaps(
        map_sizes,
        cells,
        centroids,
        centers,
        field,
        radius[0],
        area[0],
        radius[1:],
        area[1:],
        _coherences(sums),
        reasons,
        n_images,
        dtype,
    )


def _central_cells(size: tuple[int, int], map_sizes: np.ndarray) -> np.ndarray:
    """Return the center in the image of each map's position (h // 2, w // 2), ``(n_taps, 2)``.

    Whole numbers are centers of pixels; NaN for a tap that was not reached.
    """
    scale = np.divide(size, map_sizes, out=np.full(map_sizes.shape, np.nan), where=map_sizes > 0)
    return (map_sizes // 2 + 0.5) * scale - 0.5


def _extents(
    masses: Sequence[np.ndarray], places: Sequence[np.ndarray], area_shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the radii ``(n, n_radius_shares)`` and areas ``(n, n_area_shares)`` of masses ``(H, W)`` around places."""
    shares = np.array(RADIUS_SHARES)
    around_place: dict[tuple[float, ...], tuple[Distances, Distances]] = {}
    radius, area = [], []
    for mass, place in zip(masses, places):
        key = tuple(place)
        if key not in around_place:
            around_place[key] = distances((mass.shape[0], mass.shape[1]), place)
        euclidean, square = around_place[key]
        radius.append(radii(mass.ravel(), euclidean, shares))
        area.append(area_ratios(mass.ravel(), square, area_shares))
    return np.stack(radius), np.stack(area)


def _coherences(sums: _Sums) -> np.ndarray:
    """Return the coherence at each tap ``(n_taps,)``, which the rank that read the first batch has."""
    coherence = np.full(len(sums.taps), np.nan)
    of_this_rank = {index: float(value) for index, value in sums.coherence.items()}
    for of_rank in gather_objects(of_this_rank):
        coherence[list(of_rank)] = list(of_rank.values())
    return coherence


def _half_pixels(place: np.ndarray) -> np.ndarray:
    """Return a place in half pixels, so that rounding errors do not tell pixels at one distance from it apart."""
    return np.round(2 * place) / 2


def _sizes(sums: _Sums) -> tuple[tuple[int, int], np.ndarray, int]:
    """Return the size of the images, that of each map ``(n_taps, 2)``, 0 where it was not reached, and the number of images."""
    facts = gather_objects((sums.image_size, sums.map_sizes, sums.n_images))
    image_sizes = {image_size for image_size, _, _ in facts} - {None}
    if len(image_sizes) > 1:
        raise ValueError(f"Expected images of one size, received {' and '.join(map(str, sorted(image_sizes)))}.")
    map_sizes: dict[int, tuple[int, int]] = {}
    for _, rank_sizes, _ in facts:
        map_sizes.update(rank_sizes)
    rows = np.array([map_sizes.get(i, (0, 0)) for i in range(len(sums.taps))])
    return image_sizes.pop(), rows, sum(count for _, _, count in facts)


def _null_reason(mass: np.ndarray | None) -> str:
    if mass is None:
        return "not reached by the forward pass"
    if not np.isfinite(mass).all():
        return "gradients are not finite"
    return "" if mass.any() else "no gradient with respect to the images"
