"""Spectral gain of each residual unit: its branch's output against its branch's normalized input.

The cleaner test of "attention is a low-pass filter" (docs/definitions.md sections 5 and 10): unlike the relative log
amplitude it needs no constant part, compares maps of one size only, and is not diluted by the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import trained_and_untrained_passes
from vitscope.core.cost.measure_cost import MeasureCost, Options, Workload, WorkUnit, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import UNIT_COORDINATES, Result
from vitscope.core.run_inputs import UntrainedModel
from vitscope.core.running_mean import RunningMean, estimates
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.fourier._bootstrap import by_kind, half_width_over_images
from vitscope.diagnostics.fourier._spectrum import EPS, SpectrumPath, frequencies, spectrum, varies
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
        level: coverage of the intervals.
        seed: seed of the resampling.
        n_images: number of images.
        card: conditions of the measurement.
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
            ValueError: other units, another seed, or another number of images.
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
    sums = _Sums(len(units), options["path"], options["eps"], int(options["n_resamples"]), int(options["seed"]))
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
        probe: model and images.
        initial: the model at initialization; its values on the same images are subtracted (a run supplies it).
        units: the residual units of the probe's model, for one that vitscope does not know.
        path: ``radial`` (rings of the whole transform; also serves 4x4 and non-square maps) or ``diagonal``.
        level: coverage of the intervals.
        n_resamples: bootstrap replicates, kept as running sums: each image weighs a Poisson(1) number of times.
        seed: seed of the resampling.
        eps: added to the amplitudes before the logarithm.

    Units that change the class token alone, or whose branch's input no module returns, are null, with one warning.

    Raises:
        ValueError: a model without residual units, fewer than one replicate, or a level outside (0, 1).
    """
    check_level(level)
    if n_resamples < 1:
        raise ValueError(f"Expected n_resamples to be at least 1, received {n_resamples}.")
    residual_units = list(units) if units is not None else _units(probe)
    result = _measured(probe, residual_units, path, level, n_resamples, seed, eps)
    if initial is None:
        return result
    if any(p.device != probe.device for p in initial.parameters()):
        initial = copy.deepcopy(initial).to(probe.device)  # the caller's stays where it is
    start = Probe(initial, probe.batches, probe.objective, about=probe.about)
    return result.minus(_measured(start, _units(start), path, level, n_resamples, seed, eps))


def _units(probe: Probe) -> list[Unit]:
    with probe.calling():
        return units_of(probe.model, probe.first_images())


def _measured(
    probe: Probe, units: Sequence[Unit], path: str, level: float, n_resamples: int, seed: int, eps: float
) -> BranchTransferResult:
    """Measure the branches of one model."""
    sums = _Sums(len(units), path, eps, n_resamples, seed)
    unread = {i: reason for i, unit in enumerate(units) if (reason := _unread_reason(unit)) is not None}
    read = [i for i in range(len(units)) if i not in unread]
    with (
        probe.guard(logits=False) as model,
        reading_branches(model, [units[i] for i in read], lambda i, *value: sums.read(read[i], *value)),
        failing_together(),
    ):
        for index, (x, _) in track(probe.local_batches(), "branch transfer", -(-probe.n_batches // world_size())):
            model(x)
            sums.close_batch(index)
    contrasts, *curves = estimates([sums.contrasts, *sums.curves], level)
    sizes = [size for rank in gather_objects(sums.sizes) for size in rank.items()]
    shape: dict[int, tuple[int, int]] = dict(sizes)
    contrast = np.broadcast_to(contrasts.mean, len(units)).copy()
    half_width = np.broadcast_to(contrasts.half_width, len(units)).copy()
    replicates = sums.replicates()
    varying = set().union(*gather_objects(sums.varying))
    flat = [i for i in shape if not {(i, "input"), (i, "output")} <= varying]  # all that is left of it is the eps
    contrast[flat] = half_width[flat] = replicates[:, flat] = np.nan
    undefined = [i for i in range(len(units)) if i in shape and not np.isfinite(contrast[i])]
    named = {units[i].name: _null_reason(curves[i].mean, i in flat) for i in undefined}
    warn_nulls("branch_transfer", named | {units[i].name: reason for i, reason in unread.items()})
    warn_nulls("branch_transfer", few_images(contrasts.count))
    kinds, every = tuple(unit.kind for unit in units), range(len(units))
    return BranchTransferResult(
        units=tuple(unit.name for unit in units),
        kinds=kinds,
        stages=np.array([unit.stage for unit in units]),
        depths=np.array([unit.depth for unit in units], dtype=float),
        normalized_frequency=tuple(frequencies(shape[i], path) if i in shape else np.empty(0) for i in every),
        transfer=tuple(
            np.where(i in flat, np.nan, np.atleast_1d(curves[i].mean)) if i in shape else np.empty(0) for i in every
        ),
        contrast=contrast,
        contrast_half_width=half_width,
        contrast_own=contrast,
        contrast_initial=np.full(len(units), np.nan),
        replicates=replicates,
        **by_kind(contrast, replicates, kinds, level, contrasts.count),
        reference="none",
        level=level,
        seed=seed,
        n_images=contrasts.count,
        card=probe.card(solver={"path": path, "eps": eps, "n_resamples": n_resamples, "seed": seed}),
    )


class _Sums:
    """Sums that are kept between batches: those of curves, of contrasts, and of contrasts weighted for each replicate."""

    def __init__(self, n_units: int, path: str, eps: float, n_resamples: int, seed: int) -> None:
        self.path, self.eps, self.n_resamples, self.seed = path, eps, n_resamples, seed
        self.curves = [RunningMean() for _ in range(n_units)]
        self.contrasts = RunningMean()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.varying: set[tuple[int, str]] = set()
        self._weighted: Tensor | None = None
        self._inputs: dict[int, tuple[tuple[int, int], Tensor]] = {}
        self._batch: dict[int, Tensor] = {}
        self._n_images = 0

    def read(self, index: int, unit: Any, side: str, x: Tensor) -> None:
        """Take one branch's input or output ``(B, C, h, w)``."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        try:
            amplitudes = spectrum(x, self.path, self.eps)
        except ValueError as error:
            raise ValueError(f"At unit {unit.name}: {error}") from None
        logs = amplitudes.log_amplitude  # (B, n_bins)
        if (index, side) not in self.varying and varies(x, amplitudes.power):
            self.varying.add((index, side))
        self._n_images = len(x)
        if side == "input":
            self._inputs[index] = size, logs
            return
        before = self._inputs.pop(index, None)
        if before is not None and before[0] == size:
            self.sizes[index] = size
            self._batch[index] = logs - before[1]

    def close_batch(self, batch: int) -> None:
        """Add one batch's transfers to the sums."""
        columns = []
        for index in range(len(self.curves)):
            transfer = self._batch.get(index)
            if transfer is not None:
                self.curves[index].add(transfer)
            columns.append(_contrast(transfer, self._n_images))
        device = next((c.device for c in columns), torch.device("cpu"))
        contrast = torch.stack([c.to(device) for c in columns], dim=1)  # (B, n_units)
        self.contrasts.add(contrast)
        # a function of (seed, batch) alone, so that a trained and an initial model resample the same images
        draws = np.random.default_rng([self.seed, batch]).poisson(1.0, (self.n_resamples, len(contrast)))
        weights = torch.from_numpy(draws).to(contrast)  # (n_resamples, B)
        sums = torch.cat([weights @ contrast, weights.sum(1, keepdim=True)], dim=1)
        self._weighted = sums if self._weighted is None else self._weighted + sums
        self._batch.clear()

    def replicates(self) -> np.ndarray:
        """Return the contrast of each replicate and unit over all ranks, ``(n_resamples, n_units)``."""
        shares = gather_objects(None if self._weighted is None else self._weighted.cpu().numpy())
        total = np.sum([share for share in shares if share is not None], axis=0)
        weight = total[:, -1:]
        return np.where(weight > 0, total[:, :-1], np.nan) / np.where(weight > 0, weight, 1.0)


def _contrast(transfer: Tensor | None, n_images: int) -> Tensor:
    """Return each image's mean over the highest third of the bins above 0 minus that over the lowest third."""
    n_ac = 0 if transfer is None else transfer.shape[1] - 1
    if transfer is None or n_ac < 2:
        return torch.full((n_images,), float("nan"), dtype=torch.float64)
    third = max(1, n_ac // 3)
    return transfer[:, -third:].mean(1) - transfer[:, 1 : 1 + third].mean(1)


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
