"""Spectral gain of each residual unit: its branch's output against its branch's normalized input.

The cleaner test of "attention is a low-pass filter" (docs/definitions.md sections 5 and 10): unlike the relative log
amplitude it needs no constant part, compares maps of one size only, and is not diluted by the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from vitscope.core.cost.image_passes import trained_and_untrained_passes
from vitscope.core.cost.measure_cost import MeasureCost, Options, Workload, WorkUnit, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import UNIT_COORDINATES, Result
from vitscope.core.run_inputs import UntrainedModel
from vitscope.core.running_mean import estimates
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.fourier._bootstrap import by_kind, half_width_over_images
from vitscope.diagnostics.fourier._branch_sums import BranchSums, TransferSettings
from vitscope.diagnostics.fourier._spectrum import EPS, SpectrumPath, frequencies
from vitscope.models.structure.residual_units import Unit, reading_branches
from vitscope.models.structure.residual_units import units as units_of
from vitscope.runtime.distributed import failing_together, gather_objects, world_size
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import NonNegativeFloat, OpenUnitInterval, PositiveInt, Seed
from vitscope.stats.intervals import check_level, few_images


@dataclass(frozen=True)
class BranchTransferResult(
    Result,
    coordinates=UNIT_COORDINATES | {"kind": ("kinds", "kind_names"), "frequency": "normalized_frequency"},
    untabulated=("replicates",),
):
    """Transfer of each residual unit, in natural logarithms; NaN is null.

    Tuples hold one array a unit of ``n_bins`` entries, frequency 0 first (empty for units that change the map's size).

    Attributes:
        units: (n_units) names in the order of the model.
        kinds: (n_units) ``conv msa mlp pool``.
        stages: (n_units,) stage numbers.
        depths: (n_units,) normalized depth in [0, 1].
        normalized_frequency: (n_units, n_bins) true frequency of each bin in units of pi.
        transfer: (n_units, n_bins) mean over images of log|F(branch output)| - log|F(normalized branch input)|, each averaged
            over channels.
        contrast: (n_units,) mean transfer in the highest third of the non-constant bins minus that in the lowest third;
            negative: a low-pass filter.
        contrast_half_width: (n_units,) half its t-interval over images; NaN with fewer than 128, as the intervals by kind.
        contrast_own: (n_units,) the model's own contrast, before anything was subtracted.
        contrast_initial: (n_units,) the initial model's; NaN without one.
        replicates: (n_resamples, n_units) the contrast with images resampled, the same images for every unit.
        kind_names: (n_kinds) the kinds with at least one contrast.
        kind_contrast: (n_kinds,) mean contrast over the units of a kind.
        kind_low: (n_kinds,) lower end of its interval over units and images (over images alone for a single unit).
        kind_high: (n_kinds,) upper end.
        reference: ``none``; or ``initial``, where an initial model's values were subtracted.
        level: Coverage of the intervals.
        seed: Seed of the resampling.
        n_images: Number of images.
        card: Conditions of the measurement.
    """

    units: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    normalized_frequency: tuple[np.ndarray, ...]
    transfer: tuple[np.ndarray, ...]
    contrast: np.ndarray
    contrast_half_width: np.ndarray
    contrast_own: np.ndarray
    contrast_initial: np.ndarray
    replicates: np.ndarray
    kind_names: tuple[str, ...]
    kind_contrast: np.ndarray
    kind_low: np.ndarray
    kind_high: np.ndarray
    reference: str
    level: float
    seed: int
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the mean contrast of each kind and the ends of its interval."""
        values: dict[str, float] = {}
        for i, kind in enumerate(self.kind_names):
            values[f"contrast_{kind}"] = float(self.kind_contrast[i])
            values[f"contrast_{kind}_low"] = float(self.kind_low[i])
            values[f"contrast_{kind}_high"] = float(self.kind_high[i])
        return values

    def minus(self, initial: BranchTransferResult) -> BranchTransferResult:
        """Return this (trained) result minus that of the same architecture at initialization, on the same images.

        Intervals are those of the paired differences: both results resampled the same images. The per-unit t-intervals
        are replaced by those of the standard errors over paired replicates.

        Raises:
            ValueError: Other units, another seed, or another number of images.
        """
        for name in ("units", "seed", "n_images", "level"):
            if getattr(self, name) != getattr(initial, name):
                raise ValueError(
                    f"Expected two results of one architecture on the same images, received {name} "
                    f"{getattr(self, name)} and {getattr(initial, name)}."
                )
        replicates = self.replicates - initial.replicates
        contrast = self.contrast - initial.contrast
        difference = replace(
            self,
            transfer=tuple(a - b for a, b in zip(self.transfer, initial.transfer)),
            contrast=contrast,
            contrast_half_width=half_width_over_images(replicates, self.n_images, self.level),
            contrast_own=self.contrast,
            contrast_initial=initial.contrast,
            replicates=replicates,
            reference="initial",
        )
        return replace(difference, **by_kind(contrast, replicates, self.kinds, self.level, self.n_images))


@contextmanager
def _reading_pass(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    own_units = options.get("units")
    units = list(own_units) if own_units is not None else _units(probe)
    read = [i for i, unit in enumerate(units) if _unread_reason(unit) is None]
    settings = TransferSettings(options["path"], int(options["n_resamples"]), int(options["seed"]), options["eps"])
    sums = BranchSums(len(units), settings)
    with (
        probe.guard(logits=False) as model,
        reading_branches(model, [units[i] for i in read], lambda i, *value: sums.read(read[i], *value)),
    ):
        x, _ = next(iter(probe.iter_batches()))

        def read_batch() -> None:
            model(x)
            sums.close_batch(0)

        yield read_batch


#: a forward pass in which the spectra before and after each residual unit are compared
_READING_PASS = WorkUnit("pass with residual branches", _reading_pass, ("path", "n_resamples"))


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a pass over all images, and another of the model before training."""
    return trained_and_untrained_passes(workload, options, _READING_PASS)


@declares_cost(_cost)
@record_options
def branch_transfer(
    probe: Probe,
    *,
    initial: UntrainedModel | None = None,
    units: Sequence[Unit] | None = None,
    path: SpectrumPath = "radial",
    level: OpenUnitInterval = 0.95,
    n_resamples: PositiveInt = 1000,
    seed: Seed = 0,
    eps: NonNegativeFloat = EPS,
) -> BranchTransferResult:
    """Measure the effect of each residual unit on the spatial frequencies of its input, by kind with bootstrap intervals.

    Args:
        probe: Model and images.
        initial: The model at initialization; its values on the same images are subtracted (a run supplies it).
        units: The residual units of the probe's model, for one that vitscope does not know.
        path: ``radial`` (rings of the whole transform; also serves 4x4 and non-square maps) or ``diagonal``.
        level: Coverage of the intervals.
        n_resamples: Bootstrap replicates, kept as running sums: each image weighs a Poisson(1) number of times.
        seed: Seed of the resampling.
        eps: A constant that is added to the amplitudes before the logarithm.

    Units that change the class token alone, or whose branch's input no module returns, are null, with one warning.

    Raises:
        ValueError: A model without residual units, fewer than one replicate, or a level outside (0, 1).
    """
    check_level(level)
    if n_resamples < 1:
        raise ValueError(f"Expected n_resamples to be at least 1, received {n_resamples}.")
    residual_units = list(units) if units is not None else _units(probe)
    settings = TransferSettings(path, n_resamples, seed, eps, level)
    result = _measured(probe, residual_units, settings)
    if initial is None:
        return result
    if any(p.device != probe.device for p in initial.parameters()):
        initial = copy.deepcopy(initial).to(probe.device)  # the caller's stays where it is
    start = Probe(initial, probe.batches, probe.objective, about=probe.about)
    return result.minus(_measured(start, _units(start), settings))


def _units(probe: Probe) -> list[Unit]:
    with probe.calling():
        return units_of(probe.model, probe.first_images())


def _measured(probe: Probe, units: Sequence[Unit], settings: TransferSettings) -> BranchTransferResult:
    """Measure the branches of one model."""
    level = settings.level
    unread = {i: reason for i, reason in enumerate(map(_unread_reason, units)) if reason is not None}
    sums = _read(probe, units, [i for i in range(len(units)) if i not in unread], settings)
    contrasts, *curves = estimates([sums.contrasts, *sums.curves], level)
    sizes = {i: size for rank_sizes in gather_objects(sums.sizes) for i, size in rank_sizes.items()}  # of the maps
    contrast = np.broadcast_to(contrasts.mean, len(units)).copy()
    half_width = np.broadcast_to(contrasts.half_width, len(units)).copy()
    replicates = sums.replicates()
    varying = set().union(*gather_objects(sums.varying))
    # of a unit whose input or output is constant over the positions the spectrum holds nothing but eps
    constant = [i for i in sizes if not {(i, "input"), (i, "output")} <= varying]
    contrast[constant] = half_width[constant] = replicates[:, constant] = np.nan
    undefined = [i for i in range(len(units)) if i in sizes and not np.isfinite(contrast[i])]
    reasons = {units[i].name: _null_reason(curves[i].mean, i in constant) for i in undefined}
    warn_nulls("branch_transfer", reasons | {units[i].name: reason for i, reason in unread.items()})
    warn_nulls("branch_transfer", few_images(contrasts.count))
    normalized_frequency = [np.empty(0) for _ in units]
    transfer = [np.empty(0) for _ in units]
    for i, size in sizes.items():
        normalized_frequency[i] = frequencies(size, settings.path)
        transfer[i] = np.where(i in constant, np.nan, np.atleast_1d(curves[i].mean))
    kinds = tuple(unit.kind for unit in units)
    return BranchTransferResult(
        units=tuple(unit.name for unit in units),
        kinds=kinds,
        stages=np.array([unit.stage for unit in units]),
        depths=np.array([unit.depth for unit in units], dtype=float),
        normalized_frequency=tuple(normalized_frequency),
        transfer=tuple(transfer),
        contrast=contrast,
        contrast_half_width=half_width,
        contrast_own=contrast,
        contrast_initial=np.full(len(units), np.nan),
        replicates=replicates,
        **by_kind(contrast, replicates, kinds, level, contrasts.count),
        reference="none",
        level=level,
        seed=settings.seed,
        n_images=contrasts.count,
        card=probe.card(solver=settings.solver()),
    )


def _read(probe: Probe, units: Sequence[Unit], read: Sequence[int], settings: TransferSettings) -> BranchSums:
    """Return the sums over this rank's batches; ``read`` are the indices of the units that can be read."""
    sums = BranchSums(len(units), settings)
    with (
        probe.guard(logits=False) as model,
        reading_branches(model, [units[i] for i in read], lambda i, *value: sums.read(read[i], *value)),
        failing_together(),
    ):
        for index, (x, _) in track(probe.local_batches(), "branch transfer", -(-probe.n_batches // world_size())):
            model(x)
            sums.close_batch(index)
    return sums


def _unread_reason(unit: Unit) -> str | None:
    """Return why the effect of a unit on the map is not defined or cannot be read; None where it can."""
    branch = unit.added or unit.branch_out
    if branch is not None and not branch.has_map:
        return "adds to the class token alone"
    if unit.branch_in is None:
        return "the input of its branch is no module's"
    return None


def _null_reason(curve: np.ndarray, flat: bool) -> str:
    if not np.isfinite(curve).all():
        return "activations are not finite"
    return "constant over all positions" if flat else "too small a map for two bands"
