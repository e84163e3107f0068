"""Spatial variance of the feature maps at every depth (Park & Kim 2022, Figs 9, D.1), and what each unit does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import ENTRY, Options, Workload, declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.running_mean import RunningMean, estimate_lists
from vitscope.core.shared_values.feature_squares import channel_squares, channel_sums, flat_map
from vitscope.core.tap import tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.value_ranges import OpenUnitInterval
from vitscope.stats.intervals import Estimate, check_level, few_images

#: variance below this share of the mean square: single precision sums cancel, so the map is measured again in double
_CANCELLED = 1e-2


@dataclass(frozen=True)
class FeatureMapVarianceResult(Result, coordinates=TAP_COORDINATES):
    """Spatial variance after each unit; NaN is null.

    By Parseval it is the power of the non-constant frequencies: no evidence independent of the spectra.

    Attributes:
        taps: (n_taps) names in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        map_sizes: (n_taps, 2) height and width.
        variance: (n_taps,) the paper's: unbiased variance over positions, mean over images and channels.
        variance_half_width: (n_taps,) half its t-interval over images; NaN with fewer than 128.
        log_variance_ratio: (n_taps,) log(variance after / before a unit), mean over images, in nats: what claims use, as
            raw values follow the stream's scale. NaN unless the tap before has maps of the same shape (C, h, w).
        log_variance_ratio_half_width: (n_taps,) half its t-interval over images; NaN with fewer than 128.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    map_sizes: np.ndarray
    variance: np.ndarray
    variance_half_width: np.ndarray
    log_variance_ratio: np.ndarray
    log_variance_ratio_half_width: np.ndarray
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the last tap's variance and the mean log variance ratio of each kind where it is defined."""
        values = {"variance_last": float(self.variance[-1])}
        for kind in dict.fromkeys(self.kinds):
            ratios = self.log_variance_ratio[np.array(self.kinds) == kind]
            if np.isfinite(ratios).any():
                values[f"log_variance_ratio_{kind}"] = float(np.nanmean(ratios))
        return values


def accumulate(probe: Probe, *, level: OpenUnitInterval = 0.95) -> _Sums:
    """Return what `feature_map_variance` keeps between batches; arguments and errors are its own."""
    check_level(level)
    probe.check_kinds()
    probe.check_taps()
    return _Sums(probe, level)


def _result_bytes(workload: Workload, options: Options) -> float | None:
    """Return the bytes of stages, depths, sizes of the maps and four numbers per tap."""
    return None if workload.map_sizes is None else ENTRY * 8 * len(workload.map_sizes)


@declares_cost(feature_pass_cost(accumulate, _result_bytes))
@shares_pass(accumulate)
@record_options
def feature_map_variance(probe: Probe, *, level: OpenUnitInterval = 0.95) -> FeatureMapVarianceResult:
    """Measure the spatial variance of the feature maps at every tap, in one forward pass per batch.

    The official code's ``latent.var(dim=(-1, -2))`` (unbiased), mean over images and channels, prefix tokens dropped.
    Only running sums are kept.

    Args:
        probe: Model and images.
        level: Coverage of the t-intervals over images.

    Raises:
        ValueError: No tap, or a level outside (0, 1).
    """
    sums = accumulate(probe, level=level)
    run_feature_pass(probe, [sums], "variance")
    return sums.result()


def spatial_variance(x: Tensor) -> Tensor:
    """Return the unbiased variance over positions of ``x (B, C, h, w)``, mean over channels: ``(B,)`` in float64.

    Two fast sums; maps whose variance is small beside their mean square are measured again in double precision.
    """
    flat = flat_map(x)  # (B, C, n)
    n = flat.shape[-1]
    if flat.is_cuda:
        return flat.var(-1).double().mean(1)
    square = channel_squares(x)  # (B, C)
    centered = square - channel_sums(x).square() / n
    cancelled = (centered < _CANCELLED * square).nonzero(as_tuple=True)
    if len(cancelled[0]):
        centered[cancelled] = flat[cancelled].double().var(-1, correction=0) * n
    return (centered / (n - 1)).mean(1) if n > 1 else torch.full((len(flat),), float("nan"), dtype=torch.float64)


class _Sums:
    """Values that are kept between batches: sums over images of each tap's variance and log ratio, and its map's shape."""

    def __init__(self, probe: Probe, level: float) -> None:
        self.probe, self.level = probe, level
        self.variances, self.ratios = ([RunningMean() for _ in probe.taps] for _ in range(2))
        self.shapes: dict[int, tuple[int, ...]] = {}
        self._batch: dict[int, Tensor] = {}

    def read(self, index: int, tap: Any, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        shape = tuple(x.shape[1:])
        if self.shapes.setdefault(index, shape) != shape:
            raise ValueError(f"Expected maps of one shape at {tap.name}, received {self.shapes[index]} and {shape}.")
        self._batch[index] = spatial_variance(x)

    def close_batch(self, number: int, n_images: int) -> None:
        """Add the batch's variances to the sums."""
        before: tuple[tuple[int, ...], Tensor] | None = None
        for index, variance in sorted(self._batch.items()):
            self.variances[index].add(variance)
            if before is not None and before[0] == self.shapes[index]:
                self.ratios[index].add((variance / before[1]).log())
            before = self.shapes[index], variance
        self._batch.clear()

    def result(self) -> FeatureMapVarianceResult:
        """Return the variances, the log ratios and their intervals."""
        return _result(self.probe.taps, self, self.level, self.probe.card())


def _result(taps: Sequence[Any], sums: _Sums, level: float, card: ObjectiveCard) -> FeatureMapVarianceResult:
    n = len(taps)
    variances, ratios = estimate_lists([sums.variances, sums.ratios], level)
    shapes: dict[int, tuple[int, ...]] = {}
    for share in gather_objects(sums.shapes):
        shapes.update(share)
    reasons = [_null_reason(i, shapes, variances[i]) for i in range(n)]
    n_images = max(v.count for v in variances)
    null_reasons = {tap.name: reason for tap, reason in zip(taps, reasons) if reason}
    is_null = np.array([bool(reason) for reason in reasons])
    is_null_ratio = is_null | np.append(True, is_null[:-1])  # this tap is null, or the one before
    has_flat_image = ~is_null_ratio & np.array([ratio.count > 0 and not np.isfinite(ratio.mean) for ratio in ratios])
    for index in np.flatnonzero(has_flat_image):
        null_reasons[f"the ratio at {taps[int(index)].name}"] = "an image without variance there or before"
    warn_nulls("feature_map_variance", null_reasons)
    warn_nulls("feature_map_variance", few_images(n_images))
    is_null_ratio |= has_flat_image
    return FeatureMapVarianceResult(
        **tap_fields(taps),
        map_sizes=np.array([shapes.get(i, (0, 0, 0))[1:] for i in range(n)]),
        variance=np.where(is_null, np.nan, [float(v.mean) for v in variances]),
        variance_half_width=np.where(is_null, np.nan, [float(v.half_width) for v in variances]),
        log_variance_ratio=np.where(is_null_ratio, np.nan, [float(r.mean) for r in ratios]),
        log_variance_ratio_half_width=np.where(is_null_ratio, np.nan, [float(r.half_width) for r in ratios]),
        level=level,
        n_images=n_images,
        card=card,
    )


def _null_reason(index: int, shapes: Mapping[int, tuple[int, ...]], variance: Estimate) -> str:
    if index not in shapes:
        return "not reached by the forward pass"
    if shapes[index][1:] == (1, 1):
        return "1x1 map"
    if not np.isfinite(variance.mean):
        return "activations are not finite"
    return "constant over all positions" if variance.mean == 0 else ""
