"""Error rate under one plane wave at a time: "A Fourier Perspective on Model Robustness" (Yin et al., NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import changed_evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes, check_images
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.frequency_noise._perturbed_evaluation import Means, perturbed
from vitscope.diagnostics.frequency_noise._scale import pixel_std
from vitscope.runtime.distributed import failing_together
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveFloat, PositiveInt, Seed
from vitscope.stats.intervals import check_level


@dataclass(frozen=True)
class FourierHeatmapResult(Result, coordinates={"vertical": "vertical", "horizontal": "horizontal"}):
    """Error rates (shares in [0, 1]) under plane waves; the lowest frequency stands in the center.

    A real wave has the frequencies (k, l) and (-k, -l), so the map is symmetric about its center, ``[h // 2, w // 2]``.

    Attributes:
        error_rate: (h, w), or (n, n) where only the lowest frequencies were asked for.
        error_rate_half_width: (h, w) half the t-intervals over images; NaN where fewer than 10 are right, or wrong.
        vertical: (h,) frequency of each row in units of pi, from -1 (or above) to 1.
        horizontal: (w,) frequency of each column.
        clean_error_rate: Error rate without a wave.
        rms: Root mean square of the wave in each channel, in pixels of [0, 1].
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    error_rate: np.ndarray
    error_rate_half_width: np.ndarray
    vertical: np.ndarray
    horizontal: np.ndarray
    clean_error_rate: float
    rms: float
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the clean error rate, and the mean error rate below and above half of pi (larger axis)."""
        rho = np.maximum(np.abs(self.vertical)[:, None], np.abs(self.horizontal))  # (h, 1) and (w,) to (h, w)
        values = {"clean_error_rate": self.clean_error_rate}
        for name, part in (("low", (rho > 0) & (rho <= 0.5)), ("high", rho > 0.5)):
            if part.any():
                values[f"error_rate_{name}"] = float(self.error_rate[part].mean())
        return values


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return an evaluation of the clean images and of each wave; a wave and its mirror image are one."""
    (h, w), n = workload.image_size, options.get("n")
    rows, columns = _lowest(h, n), _lowest(w, n)
    waves, _ = _waves(rows, columns, h, w)
    works = [changed_evaluations(workload, len(waves)), *guard_checks(workload)]
    n_bins = len(rows) * len(columns)
    return MeasureCost(works, result_bytes=ENTRY * (2 * n_bins + len(rows) + len(columns)))


@declares_cost(_cost)
@record_options
def fourier_heatmap(
    probe: Probe,
    *,
    rms: PositiveFloat = 0.1,
    n: PositiveInt | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    level: OpenUnitInterval = 0.95,
    seed: Seed = 0,
    partial: ResumableRows | None = None,
) -> FourierHeatmapResult:
    """Measure the error rate under each plane wave that the image size can hold.

    The wave of bin (k, l) is cos(2 pi (k m / h + l n / w)), scaled to the same rms, its sign drawn for each image and
    channel, added in pixel space before normalization, not clamped. Yin et al. state its l2 norm a channel: 4 on 32x32
    images is an rms of .125, 15.7 on 224x224 one of .070.

    Args:
        probe: Model and images; about h w / 2 forward passes each.
        rms: Root mean square a channel, pixels in [0, 1].
        n: Number of frequencies of each axis: the n by n lowest ones (Yin et al. show 63 on ImageNet); all of them by default.
        mean: Not needed; accepted so that both values of a normalization can be passed.
        std: Standard deviation of each channel, as for `frequency_noise_robustness`.
        level: Coverage of the intervals.
        seed: Seed of the signs.
        partial: Finished rows of an interrupted measurement.

    Raises:
        ValueError: An rms that is not above 0, n below 1, a level outside (0, 1), another loss than the cross entropy, or
            batches of more than images and targets.
    """
    check_classes(probe, "fourier_heatmap")
    check_images(probe, "fourier_heatmap")
    del mean
    check_level(level)
    if not 0 < rms < float("inf") or (n is not None and n < 1):
        raise ValueError(f"Expected rms above 0 and n at least 1 (or None), received rms={rms} and n={n}.")
    deviation = pixel_std(probe, std, "fourier_heatmap")
    x, _ = next(iter(probe.batches))
    h, w = int(x.shape[-2]), int(x.shape[-1])
    rows, columns = _lowest(h, n), _lowest(w, n)
    waves, wave_of_bin = _waves(rows, columns, h, w)

    def add_wave(images: Tensor, batch: int, number: int) -> Tensor:
        wave = rms * plane_wave(h, w, *waves[number]) / deviation  # (C or 1, h, w)
        entropy = np.random.SeedSequence([seed, batch, number])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        signs = torch.randint(0, 2, (*images.shape[:2], 1, 1), generator=generator) * 2 - 1
        return images + (signs * wave).to(images)

    means = Means(answers=("wrong",))
    names = [f"{k},{l}-rms-{rms:g}-seed-{seed}" for k, l in waves]
    with failing_together():
        for _, correct, _ in perturbed(probe, names, add_wave, "heat map", partial):
            means.add(wrong=1 - correct.T)
    wrong = means.finish(level)["wrong"]  # of clean images, and of each wave
    nulls = {
        f"the wave {wave}": "logits are not finite"
        for wave, error_rate in zip(waves, wrong.mean[1:])
        if not np.isfinite(error_rate)
    }
    if wrong.count == 1:
        nulls["the intervals"] = "a single image"
    warn_nulls("fourier_heatmap", nulls)
    return FourierHeatmapResult(
        # (1 + n_waves,) to (n_rows, n_columns)
        error_rate=wrong.mean[1:][wave_of_bin],
        error_rate_half_width=wrong.half_width[1:][wave_of_bin],
        vertical=2 * rows / h,
        horizontal=2 * columns / w,
        clean_error_rate=float(wrong.mean[0]),
        rms=rms,
        level=level,
        n_images=wrong.count,
        card=probe.card(solver={"rms": rms, "std": deviation.flatten().tolist(), "seed": seed}),
    )


def plane_wave(h: int, w: int, k: int, l: int) -> Tensor:
    """Return cos(2 pi (k m / h + l n / w)) scaled to rms 1, ``(h, w)`` float64."""
    # reduced modulo the size in integers, so that phases are exact
    rows, columns = (k * torch.arange(h) % h).double() / h, (l * torch.arange(w) % w).double() / w
    wave = torch.cos(2 * torch.pi * (rows[:, None] + columns))
    return wave / wave.square().mean().sqrt()


def _lowest(size: int, n: int | None) -> np.ndarray:
    """Return the bins -size//2 ... of an axis in ascending order, or the n lowest, 0 at index n // 2."""
    count = size if n is None else min(n, size)
    return np.arange(count) - count // 2


def _waves(rows: np.ndarray, columns: np.ndarray, h: int, w: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Return the bins of the different waves, and the number of its wave for each bin, ``(n_rows, n_columns)``.

    A wave and its mirror image are one; at even sizes the bin -h/2 is its own mirror image.
    """
    pairs = [[_canonical(int(k), int(l), h, w) for l in columns] for k in rows]
    waves = list(dict.fromkeys(pair for row in pairs for pair in row))
    numbers = {pair: number for number, pair in enumerate(waves)}
    return waves, np.array([[numbers[pair] for pair in row] for row in pairs])


def _canonical(k: int, l: int, h: int, w: int) -> tuple[int, int]:
    """Return the one of (k, l) and (-k, -l), both modulo the image size, that comes first."""
    return min((k % h, l % w), (-k % h, -l % w))
