"""Amplitude of each frequency in the feature maps, relative to the constant part (Park & Kim 2022, Figs 2a, 8, D.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import ENTRY, Options, Workload, declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.running_mean import RunningMean, estimate_lists
from vitscope.core.tap import tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.fourier._spectrum import EPS, Spectrum, SpectrumPath, frequencies, spectrum, varies
from vitscope.runtime.distributed import gather_objects
from vitscope.runtime.value_ranges import NonNegativeFloat, OpenUnitInterval
from vitscope.stats.intervals import Estimate, check_level, few_images


@dataclass(frozen=True)
class RelativeLogAmplitudeResult(Result, coordinates=TAP_COORDINATES | {"frequency": "normalized_frequency"}):
    """Spectra of the feature maps after each unit; natural logarithms, frequencies in units of pi.

    Tuples hold one array per tap, of ``n_bins`` entries, the constant part (frequency 0) first. NaN is null.

    Attributes:
        taps: (n_taps) names in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        map_sizes: (n_taps, 2) height and width.
        normalized_frequency: (n_taps, n_bins) true frequency of each bin.
        paper_frequency: (n_taps, n_bins) the official notebook's axis, which labels the last bin 1 whatever it is.
        log_amplitude: (n_taps, n_bins) the paper's curve: mean over images and channels of log(|F| + eps), minus its first bin.
        log_amplitude_half_width: (n_taps, n_bins) half its t-interval over images; NaN with fewer than 128, as the half widths
            that follow.
        log_amplitude_size_corrected: (n_taps, n_bins) the curve plus ln(sqrt(h w)) at frequencies above 0: the constant part
            grows with the map's area, white noise with the root of it, so only this may be compared between map sizes.
        log_amplitude_first_ac: (n_taps, n_bins) the mean log amplitude minus that of the first non-constant bin (NaN at
            frequency 0).
        high_frequency: (n_taps,) the paper's curve at its last bin (Fig 8).
        high_frequency_half_width: (n_taps,) half its t-interval.
        high_frequency_first_ac: (n_taps,) the same relative to the first non-constant bin.
        high_frequency_change: (n_taps,) ``high_frequency`` minus that of the tap before; NaN without an equal-sized one.
        high_frequency_change_half_width: (n_taps,) half its t-interval over images, paired.
        ac_high_share: (n_taps,) share of the power of all non-constant bins of the path that lies above half of pi.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    map_sizes: np.ndarray
    normalized_frequency: tuple[np.ndarray, ...]
    paper_frequency: tuple[np.ndarray, ...]
    log_amplitude: tuple[np.ndarray, ...]
    log_amplitude_half_width: tuple[np.ndarray, ...]
    log_amplitude_size_corrected: tuple[np.ndarray, ...]
    log_amplitude_first_ac: tuple[np.ndarray, ...]
    high_frequency: np.ndarray
    high_frequency_half_width: np.ndarray
    high_frequency_first_ac: np.ndarray
    high_frequency_change: np.ndarray
    high_frequency_change_half_width: np.ndarray
    ac_high_share: np.ndarray
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the last tap's values, and the mean change across the units of each kind where it is defined.

        The last tap is the last whose map has a frequency above 0: one of 2x2 (the end of a small Swin or PiT) has none.
        """
        last = max((i for i, bins in enumerate(self.normalized_frequency) if len(bins) > 1), default=-1)
        values = {
            "high_frequency_last": float(self.high_frequency[last]),
            "ac_high_share_last": float(self.ac_high_share[last]),
        }
        for kind in dict.fromkeys(self.kinds):
            change = self.high_frequency_change[np.array(self.kinds) == kind]
            if np.isfinite(change).any():
                values[f"high_frequency_change_{kind}"] = float(np.nanmean(change))
        return values


def accumulate(
    probe: Probe, *, path: SpectrumPath = "diagonal", level: OpenUnitInterval = 0.95, eps: NonNegativeFloat = EPS
) -> _Sums:
    """Return what `relative_log_amplitude` keeps between batches; arguments and errors are its own."""
    check_level(level)
    probe.check_kinds()
    probe.check_taps()
    return _Sums(probe, path, eps, level)


def _result_bytes(workload: Workload, options: Options) -> float | None:
    """Return the bytes of stages, depths, sizes, six numbers per tap and six curves over its bins."""
    if workload.map_sizes is None:
        return None
    n_bins = [len(frequencies(size, str(options["path"]))) for size in workload.map_sizes]
    return ENTRY * (10 * len(n_bins) + 6 * sum(n_bins))


@declares_cost(feature_pass_cost(accumulate, _result_bytes))
@shares_pass(accumulate)
@record_options
def relative_log_amplitude(
    probe: Probe, *, path: SpectrumPath = "diagonal", level: OpenUnitInterval = 0.95, eps: NonNegativeFloat = EPS
) -> RelativeLogAmplitudeResult:
    """Measure the relative log amplitude of the feature maps at every tap, in one forward pass per batch.

    The paper's definition (section 2 and its official notebook): log(|FFT2| + eps) of each map, mean over images and
    channels after the logarithm, along the half diagonal of the centered spectrum, minus its value at frequency 0.
    Only running sums are kept; the corrections that comparisons between map sizes need are given beside the curve.

    Args:
        probe: Model and images.
        path: ``diagonal`` (the paper's; square maps) or ``radial`` (mean over rings one bin wide; any map).
        level: Coverage of the t-intervals over images.
        eps: A constant that is added to the amplitudes.

    Raises:
        ValueError: No tap, maps that are not square on the diagonal, maps whose size changes between batches, or a
            level or path that does not exist.
    """
    sums = accumulate(probe, path=path, level=level, eps=eps)
    run_feature_pass(probe, [sums], "Fourier")
    return sums.result()


class _Sums:
    """Values that are kept between batches: sums over images for each tap, its map size, and whether it varied at all."""

    def __init__(self, probe: Probe, path: str, eps: float, level: float) -> None:
        self.probe, self.path, self.eps, self.level = probe, path, eps, level
        self.curves, self.powers, self.changes = ([RunningMean() for _ in probe.taps] for _ in range(3))
        self.sizes: dict[int, tuple[int, int]] = {}
        self.varying: set[int] = set()
        self._batch: dict[int, Spectrum] = {}

    def read(self, index: int, tap: Any, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        if self.sizes.setdefault(index, size) != size:
            raise ValueError(f"Expected maps of one size at {tap.name}, received {self.sizes[index]} and {size}.")
        try:
            amplitudes = spectrum(x, self.path, self.eps)
        except ValueError as error:
            raise ValueError(f"At tap {tap.name}: {error}") from None
        if index not in self.varying and varies(x, amplitudes.power):
            self.varying.add(index)
        self._batch[index] = amplitudes

    def close_batch(self, number: int, n_images: int) -> None:
        """Add the batch's spectra to the sums."""
        before: tuple[tuple[int, int], Tensor] | None = None
        for index, amplitudes in sorted(self._batch.items()):
            curve = amplitudes.log_amplitude - amplitudes.log_amplitude[:, :1]  # (B, n_bins)
            self.curves[index].add(curve)
            self.powers[index].add(amplitudes.power)
            if before is not None and before[0] == self.sizes[index]:
                self.changes[index].add(curve[:, -1] - before[1])
            before = self.sizes[index], curve[:, -1]
        self._batch.clear()

    def result(self) -> RelativeLogAmplitudeResult:
        """Return the curves and their intervals."""
        taps = self.probe.taps
        curves, powers, changes = estimate_lists([self.curves, self.powers, self.changes], self.level)
        sizes, varying = self._gathered()
        reasons = [_null_reason(i, sizes, curve, varying) for i, curve in enumerate(curves)]
        n_images = max(curve.count for curve in curves)
        warn_nulls("relative_log_amplitude", {tap.name: reason for tap, reason in zip(taps, reasons) if reason})
        warn_nulls("relative_log_amplitude", few_images(n_images))
        map_sizes = [sizes.get(i, (0, 0)) for i in range(len(taps))]
        frequency = [frequencies(size, self.path) if size[0] else np.empty(0) for size in map_sizes]
        is_null = np.array([bool(reason) for reason in reasons])
        is_null_change = is_null | np.append(True, is_null[:-1])  # this tap is null, or the one before
        rows = [_curves(*row) for row in zip(curves, map_sizes, is_null)]
        columns = {key: tuple(row[key] for row in rows) for key in rows[0]}
        return RelativeLogAmplitudeResult(
            **tap_fields(taps),
            map_sizes=np.array(map_sizes),
            normalized_frequency=tuple(frequency),
            paper_frequency=tuple(np.linspace(0, 1, len(f)) for f in frequency),
            **columns,
            high_frequency=_last_bins(columns["log_amplitude"]),
            high_frequency_half_width=_last_bins(columns["log_amplitude_half_width"]),
            high_frequency_first_ac=_last_bins(columns["log_amplitude_first_ac"]),
            high_frequency_change=_scalars([change.mean for change in changes], is_null_change),
            high_frequency_change_half_width=_scalars([change.half_width for change in changes], is_null_change),
            ac_high_share=_scalars([_high_share(power.mean, f) for power, f in zip(powers, frequency)], is_null),
            level=self.level,
            n_images=n_images,
            card=self.probe.card(solver={"path": self.path, "eps": self.eps}),
        )

    def _gathered(self) -> tuple[dict[int, tuple[int, int]], set[int]]:
        """Return the sizes of the maps by tap, and the taps that varied, of all ranks."""
        sizes: dict[int, tuple[int, int]] = {}
        varying: set[int] = set()
        for rank_sizes, rank_varying in gather_objects((self.sizes, self.varying)):
            sizes.update(rank_sizes)
            varying |= rank_varying
        return sizes, varying


def _curves(curve: Estimate, size: tuple[int, int], is_null: bool) -> Mapping[str, np.ndarray]:
    """Return the curves of a tap ``(n_bins,)`` by the names of the result's fields."""
    mean, half_width = np.atleast_1d(curve.mean).copy(), np.atleast_1d(curve.half_width).copy()
    if is_null:
        mean[1:] = half_width[1:] = np.nan
    corrected = mean.copy()
    corrected[1:] += 0.5 * np.log(max(size[0] * size[1], 1))
    first_ac = mean - (mean[1] if mean.size > 1 else np.nan)
    first_ac[0] = np.nan
    return {
        "log_amplitude": mean,
        "log_amplitude_half_width": half_width,
        "log_amplitude_size_corrected": corrected,
        "log_amplitude_first_ac": first_ac,
    }


def _high_share(power: np.ndarray, frequency: np.ndarray) -> float:
    total = power[1:].sum() if power.ndim else 0.0
    return float(power[frequency > 0.5].sum() / total) if total > 0 else float("nan")


def _last_bins(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Return the value of each curve at its highest frequency; NaN where it has none but 0."""
    return np.array([curve[-1] if curve.size > 1 else np.nan for curve in curves])


def _scalars(values: Sequence[Any], is_null: np.ndarray) -> np.ndarray:
    return np.where(is_null, np.nan, np.array([float(value) for value in values]))


def _null_reason(index: int, sizes: Mapping[int, tuple[int, int]], curve: Estimate, varying: set[int]) -> str:
    if index not in sizes:
        return "not reached by the forward pass"
    if curve.mean.size < 2:
        return f"{sizes[index][0]}x{sizes[index][1]} map, no frequency but 0"
    if not np.isfinite(curve.mean).all():
        return "activations are not finite"
    return "" if index in varying else "constant over all positions"
