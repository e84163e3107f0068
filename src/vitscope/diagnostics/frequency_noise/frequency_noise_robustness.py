"""Accuracy under noise of one frequency band (Park & Kim 2022, Fig 2b), with the same energy in every band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import changed_evaluations, guard_checks
from vitscope.core.cost.measure_cost import MeasureCost, Options, Workload, declares_cost
from vitscope.core.losses.requirements import check_classes, check_images
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.frequency_noise._bands import (
    band_noise,
    multiplicity,
    official_mask,
    official_noise,
    official_rms,
    rings,
    white_noise,
    widened,
)
from vitscope.diagnostics.frequency_noise._perturbed_evaluation import Means, perturbed
from vitscope.diagnostics.frequency_noise._scale import pixel_std
from vitscope.runtime.distributed import failing_together
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveFloat, PositiveInt, Seed
from vitscope.stats.intervals import LEAST_EVENTS, check_level, few_images, where_enough_wrong

Construction = Literal["equal_rms", "official"]
CONSTRUCTIONS: tuple[str, ...] = get_args(Construction)


@dataclass(frozen=True)
class FrequencyNoiseRobustnessResult(Result, coordinates={"frequency": "normalized_frequency", "rms": "curve_rms"}):
    """Change under noise of each frequency band; accuracies are shares in [0, 1], frequencies in units of pi.

    A band without a bin at this image size is NaN. Half widths are those of t-intervals over images, paired with the clean
    image.

    Attributes:
        normalized_frequency: (n_bands,) the bands' centers.
        band_edges: (n_bands, 2) lower and upper edge; bins on the upper one belong to the band.
        band_sizes: (n_bands,) number of bins in the whole plane.
        band_rms: (n_bands,) root mean square of the noise in pixels of [0, 1], expected for the official construction.
        accuracy_change: (n_bands,) noisy minus clean accuracy.
        accuracy_change_half_width: (n_bands,) of its interval; NaN where fewer than 10 answers change.
        nll_change: (n_bands,) noisy minus clean loss, nats.
        nll_change_half_width: (n_bands,) of its interval; NaN with fewer than 128 images, or where fewer than 10 are answered
            wrong before or after.
        relative_change: (n_bands,) ``accuracy_change`` divided by clean minus chance accuracy; NaN where that is not
            positive.
        high_minus_low: ``accuracy_change`` averaged over the highest third of the bands minus over the lowest third.
        high_minus_low_half_width: Half width of its interval; NaN with fewer than 128 images, or where it differs from 0 for
            fewer than 10.
        rms: The noise's scale: its rms (``equal_rms``), or the official eps.
        curve_rms: (n_rms,) all scales that were measured, ascending.
        curve_accuracy_change: (n_rms, n_bands) at each of them.
        construction: ``equal_rms`` or ``official``.
        clean_accuracy: Accuracy without noise.
        clean_nll: NLL without noise, in nats.
        chance: One over the number of classes.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    normalized_frequency: np.ndarray
    band_edges: np.ndarray
    band_sizes: np.ndarray
    band_rms: np.ndarray
    accuracy_change: np.ndarray
    accuracy_change_half_width: np.ndarray
    nll_change: np.ndarray
    nll_change_half_width: np.ndarray
    relative_change: np.ndarray
    high_minus_low: float
    high_minus_low_half_width: float
    rms: float
    curve_rms: np.ndarray
    curve_accuracy_change: np.ndarray
    construction: str
    clean_accuracy: float
    clean_nll: float
    chance: float
    level: float
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the clean accuracy, the worst band, and the contrast between high and low bands."""
        worst = np.nanargmin(self.accuracy_change) if np.isfinite(self.accuracy_change).any() else 0
        return {
            "clean_accuracy": self.clean_accuracy,
            "worst_accuracy_change": float(self.accuracy_change[worst]),
            "worst_frequency": float(self.normalized_frequency[worst]),
            "high_minus_low": self.high_minus_low,
        }


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return an evaluation of the clean images and of each band at each rms; bands without a frequency are left out."""
    bands = _Bands(*workload.image_size, int(options["n_bands"]), str(options["construction"]))
    n_scales = len({float(options["rms"]), *map(float, options["curve_rms"])})
    n_changes = n_scales * int((bands.sizes > 0).sum())
    return MeasureCost([changed_evaluations(workload, n_changes), *guard_checks(workload)])


def _check(n_bands: int, rms: float, curve_rms: Sequence[float], construction: str) -> None:
    if construction not in CONSTRUCTIONS:
        raise ValueError(f"Expected construction to be one of {', '.join(CONSTRUCTIONS)}, received {construction!r}.")
    least = 2 if construction == "official" else 1
    if n_bands < least:
        raise ValueError(f"Expected n_bands to be at least {least}, received {n_bands}.")
    if not all(0 < scale < float("inf") for scale in (rms, *curve_rms)):
        raise ValueError(f"Expected every rms to be finite and above 0, received {[rms, *curve_rms]}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
def frequency_noise_robustness(
    probe: Probe,
    *,
    n_bands: PositiveInt = 10,
    rms: PositiveFloat = 0.1,
    curve_rms: Sequence[PositiveFloat] = (),
    construction: Construction = "equal_rms",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    level: OpenUnitInterval = 0.95,
    seed: Seed = 0,
    partial: ResumableRows | None = None,
) -> FrequencyNoiseRobustnessResult:
    """Measure how accuracy and loss change when the images carry noise of one frequency band.

    ``equal_rms`` (docs/definitions.md section 6): the non-constant bins are divided into ``n_bands`` square rings of equal width;
    white Gaussian noise is cut to a ring and scaled to the same root mean square in each image and band. The same white
    noise serves all bands. ``official``: the paper's released construction, whose rings of width 1/n_bands around 1/n_bands,
    2/n_bands, ... differ in energy and so favor a conclusion (signs of noise times eps, real part, no scaling). Noise is
    added in pixel space before normalization and nothing is clamped.

    Args:
        probe: Model and images.
        n_bands: Number of bands between 0 and pi; 10 gives the paper's width of 0.1 pi.
        rms: Root mean square over an image's channels and pixels, pixels in [0, 1]; the official eps.
        curve_rms: Further scales, for the curve over rms.
        construction: ``equal_rms`` or ``official``.
        mean: Not needed for noise; accepted so that both values of a normalization can be passed.
        std: Standard deviation of each channel that the images were divided by; that of ``probe.about`` by default. Without
            either, the images are taken for pixels, with a warning.
        level: Coverage of the intervals.
        seed: Seed of the noise.
        partial: Finished rows of an interrupted measurement.

    Raises:
        ValueError: No band, an rms that is not above 0, an unknown construction, a level outside (0, 1),
            another loss than the cross entropy, or batches of more than images and targets.
    """
    check_classes(probe, "frequency_noise_robustness")
    check_images(probe, "frequency_noise_robustness")
    del mean
    check_level(level)
    scales = sorted({float(rms), *map(float, curve_rms)})
    x, _ = next(iter(probe.batches))
    h, w = int(x.shape[-2]), int(x.shape[-1])
    bands = _Bands(h, w, n_bands, construction)
    deviation = pixel_std(probe, std, "frequency_noise_robustness")
    used = np.flatnonzero(bands.sizes > 0)
    if not len(used):
        raise ValueError(f"Expected images with at least one bin in a band, received {h}x{w} ones.")
    names = [f"{construction}-{j}-of-{n_bands}-rms-{scale:g}-seed-{seed}" for scale in scales for j in used]

    white: dict[int, Tensor] = {}

    def change(images: Tensor, batch: int, v: int) -> Tensor:
        if batch not in white:
            white.clear()
            white[batch] = white_noise(tuple(images.shape), seed, batch).to(widened(images))
        scale, band = scales[v // len(used)], int(used[v % len(used)])
        return (images + scale * bands.noise(white[batch], band) / deviation.to(white[batch])).to(images.dtype)

    means = Means("clean_nll", "nll", "contrast", answers=("clean_accuracy", "accuracy", "wrong", "contrasted"))
    with failing_together():
        for losses, correct, n_classes in perturbed(probe, names, change, "band noise", partial):
            difference = (correct[1:] - correct[0]).reshape(len(scales), len(used), -1)  # (n_rms, n_used, B)
            row = scales.index(float(rms))
            third = max(1, len(used) // 3)
            contrast = difference[row, -third:].mean(0) - difference[row, :third].mean(0)
            contrast = contrast if len(used) > 1 else np.full_like(contrast, np.nan)
            nll = (losses[1:] - losses[0]).reshape(len(scales), len(used), -1)[row]  # (n_used, B)
            means.n_classes = n_classes
            means.add(clean_nll=losses[0], clean_accuracy=correct[0], nll=nll.T, contrast=contrast)
            means.add(accuracy=np.moveaxis(difference, -1, 0))  # (B, n_rms, n_used)
            after = correct[1:].reshape(difference.shape)[row]  # (n_used, B)
            means.add(wrong=1 - (after * correct[0]).T, contrasted=np.where(np.isnan(contrast), np.nan, contrast != 0))
    solver = {"construction": construction, "n_bands": n_bands, "rms": rms, "std": deviation.flatten().tolist()}
    card = probe.card(solver={**solver, "seed": seed})
    return _result(means, bands, used, scales, float(rms), level, card)


class _Bands:
    """The bands of one construction at one image size."""

    def __init__(self, h: int, w: int, n_bands: int, construction: str) -> None:
        self.official = construction == "official"
        width = 1 / n_bands
        if self.official:
            self.centers = np.arange(1, n_bands) * width
            self.masks = [official_mask(h, w, center, width / 2) for center in self.centers]
            self.sizes = np.array([mask.sum() for mask in self.masks], dtype=int)
            self.unit_rms = np.array([official_rms(mask) for mask in self.masks])
        else:
            self.centers = (np.arange(n_bands) + 0.5) * width
            index, times = rings(h, w, n_bands), multiplicity(h, w)
            self.masks = [index == j for j in range(n_bands)]
            self.sizes = np.array([times[mask].sum() for mask in self.masks], dtype=int)
            self.unit_rms = np.ones(n_bands)
        self.edges = np.stack([self.centers - width / 2, self.centers + width / 2], axis=1)

    def noise(self, white: Tensor, band: int) -> Tensor:
        """Return the band's noise at scale 1."""
        return official_noise(white, self.masks[band]) if self.official else band_noise(white, self.masks[band])


def _result(
    means: Means, bands: _Bands, used: np.ndarray, scales: list[float], rms: float, level: float, card: ObjectiveCard
) -> FrequencyNoiseRobustnessResult:
    estimates = means.finish(level)
    row = scales.index(rms)
    n = len(bands.centers)

    def spread(values: np.ndarray) -> np.ndarray:
        full = np.full((*values.shape[:-1], n), np.nan)
        full[..., used] = values
        return full

    clean, chance = float(estimates["clean_accuracy"].mean), 1 / max(means.n_classes, 1)
    change = spread(estimates["accuracy"].mean)
    contrasted = np.rint(estimates["contrasted"].mean * estimates["contrasted"].count)  # NaN where there is no contrast
    has_contrast_interval = contrasted >= LEAST_EVENTS
    _warn(bands, change[row], clean, chance)
    warn_nulls("frequency_noise_robustness", few_images(estimates["nll"].count))
    return FrequencyNoiseRobustnessResult(
        normalized_frequency=bands.centers,
        band_edges=bands.edges,
        band_sizes=bands.sizes,
        band_rms=np.where(bands.sizes > 0, rms * bands.unit_rms, np.nan),
        accuracy_change=change[row],
        accuracy_change_half_width=spread(estimates["accuracy"].half_width)[row],
        nll_change=spread(estimates["nll"].mean),
        nll_change_half_width=spread(
            where_enough_wrong(estimates["nll"].half_width, estimates["wrong"].mean * estimates["wrong"].count)
        ),
        relative_change=change[row] / (clean - chance) if clean > chance else np.full(n, np.nan),
        high_minus_low=float(estimates["contrast"].mean),
        high_minus_low_half_width=float(estimates["contrast"].half_width) if has_contrast_interval else float("nan"),
        rms=rms,
        curve_rms=np.array(scales),
        curve_accuracy_change=change,
        construction="official" if bands.official else "equal_rms",
        clean_accuracy=clean,
        clean_nll=float(estimates["clean_nll"].mean),
        chance=chance,
        level=level,
        n_images=estimates["clean_accuracy"].count,
        card=card,
    )


def _warn(bands: _Bands, change: np.ndarray, clean: float, chance: float) -> None:
    reasons = {}
    for center, size, value in zip(bands.centers, bands.sizes, change):
        if size == 0:
            reasons[f"the band at {center:.3g} pi"] = "no bin at this image size"
        elif not np.isfinite(value):
            reasons[f"the band at {center:.3g} pi"] = "logits are not finite"
    if not clean > chance:
        reasons["relative_change"] = f"clean accuracy {clean:.3g} is not above chance {chance:.3g}"
    warn_nulls("frequency_noise_robustness", reasons)
