"""Effective receptive fields of feature maps (Luo et al. 2016; Ding et al. 2022): which pixels a central position depends on."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import trained_and_untrained_passes
from vitscope.core.cost.measure_cost import MeasureCost, Options, Workload, WorkUnit, declares_cost
from vitscope.core.losses.requirements import check_images
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.run_inputs import UntrainedModel
from vitscope.core.tap import Tap, chosen_taps, tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.receptive_field._gradients import RADIUS_SHARES, FieldsOfTaps, field_pass, measure_fields
from vitscope.runtime.text_layout import count_text
from vitscope.runtime.value_ranges import OpenUnitInterval
from vitscope.stats.intervals import LEAST_IMAGES, check_level, few_images
from vitscope.stats.jackknife import jackknife_half_width

_logger = logging.getLogger(__name__)

#: contributions of a pixel
Contribution = Literal["squared", "channels", "positive"]
CONTRIBUTIONS: tuple[str, ...] = get_args(Contribution)

#: coherence of channels below which their gradients cancel: networks with residual streams have 0.25 and more, those whose
#: stream is the output of a LayerNorm and small branches 0.01 and less
LEAST_COHERENCE = 0.05

#: points around which radii and squares lie
Center = Literal["mass", "cell"]
CENTERS: tuple[str, ...] = get_args(Center)


@dataclass(frozen=True)
class EffectiveReceptiveFieldResult(
    Result,
    coordinates=TAP_COORDINATES | {"share": ("radius_shares", "area_shares")},
    untabulated=("field", "initial_field"),
):
    """Effective receptive field of one position of each map; distances in pixels of the model's input; NaN is null.

    Attributes:
        taps: (n_taps) names in the order of the forward pass.
        kinds: (n_taps) ``stem conv msa mlp pool head``.
        stages: (n_taps,) stage numbers.
        depths: (n_taps,) normalized depth in [0, 1].
        map_sizes: (n_taps, 2) height and width of the map.
        positions: (n_taps, 2) row and column of the position that is differentiated: (h // 2, w // 2).
        cells: (n_taps, 2) row and column of the center of its cell, where the map is laid over the whole image.
        centroid: (n_taps, 2) row and column of the field's center of mass.
        centers: (n_taps, 2) row and column of the point around which radii and squares lie: the centroid in half pixels, or
            the center of the cell.
        field: (n_taps, H, W) contribution of each pixel, mean over images, divided by the sum: it sums to 1.
        radius_shares: (n_radius_shares,) 0.5, 0.9 and 0.99.
        radius_50: (n_taps,) radius around the center that holds 50 % of the field.
        radius_90: (n_taps,) the same for 90 %.
        radius_99: (n_taps,) the same for 99 %.
        radius_half_width: (n_taps, n_radius_shares) half the t-interval of each radius over images; NaN with fewer than 128.
        area_shares: (n_area_shares,) shares of the field.
        area_ratio: (n_taps, n_area_shares) share of the image's pixels in the smallest square around the center that holds a
            share of the field.
        area_ratio_half_width: (n_taps, n_area_shares) half its t-interval over images; NaN with fewer than 128.
        initial_field: (n_taps, H, W) the field before training; NaN without an initial model.
        initial_radius: (n_taps, n_radius_shares) its radii.
        radius_change: (n_taps, n_radius_shares) radius minus initial radius.
        radius_change_half_width: (n_taps, n_radius_shares) half its t-interval, both models with the same images.
        reference: ``initial`` where an initial model was measured, else ``none``.
        n_backward: Backward passes over all images.
        level: Coverage of the intervals.
        n_images: Number of images.
        card: Conditions of the measurement.
        channel_coherence: (n_taps,) squared gradient of the channels' sum over the sum of the channels' squared gradients, in the
            first batch: near 0 where the gradients of channels cancel. None for other contributions than ``squared``.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    map_sizes: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    centroid: np.ndarray
    centers: np.ndarray
    field: np.ndarray
    radius_shares: np.ndarray
    radius_50: np.ndarray
    radius_90: np.ndarray
    radius_99: np.ndarray
    radius_half_width: np.ndarray
    area_shares: np.ndarray
    area_ratio: np.ndarray
    area_ratio_half_width: np.ndarray
    initial_field: np.ndarray
    initial_radius: np.ndarray
    radius_change: np.ndarray
    radius_change_half_width: np.ndarray
    reference: str
    n_backward: int
    level: float
    n_images: int
    card: ObjectiveCard | None = None
    channel_coherence: np.ndarray | None = None

    def scalars(self) -> dict[str, float]:
        """Return the radii and area ratios at the last tap, and the changes of its radii."""
        values = {
            "radius_50_last": float(self.radius_50[-1]),
            "radius_90_last": float(self.radius_90[-1]),
            "radius_99_last": float(self.radius_99[-1]),
        }
        for share, ratio in zip(self.area_shares, self.area_ratio[-1]):
            values[f"area_ratio_{100 * share:g}_last"] = float(ratio)
        if self.reference == "initial":
            for share, change in zip(self.radius_shares, self.radius_change[-1]):
                values[f"radius_{100 * share:g}_change_last"] = float(change)
        return values


@contextmanager
def _field_pass(probe: Probe, options: Options, number: int) -> Iterator[Callable[[], object]]:
    with field_pass(probe, chosen_taps(probe.taps, options["taps"]), options["contribution"], number) as (
        read_fields,
        _,
    ):
        yield read_fields


@contextmanager
def _field_extents(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    taps = chosen_taps(probe.taps, options["taps"])
    with field_pass(probe, taps, options["contribution"], 1) as (read_fields, evaluate_extents):
        read_fields()
    yield lambda: evaluate_extents(options["center"], np.asarray(options["area_shares"], dtype=np.float64))


#: a forward pass and a backward pass for each tap
_FIELD_PASS = WorkUnit(
    "pass with a gradient for each tap", functools.partial(_field_pass, number=1), ("taps", "contribution")
)
#: that of the first batch, which tells by another backward pass whether the gradients of channels cancel
_FIRST_FIELD_PASS = WorkUnit(
    "pass with two gradients for each tap", functools.partial(_field_pass, number=0), ("taps", "contribution")
)
#: radii and squares of all taps and groups of images, whose time does not depend on the number of images
_EXTENTS = WorkUnit("extents of fields", _field_extents, ("taps", "contribution", "center", "area_shares"), forwards=0)


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a pass with the gradients of all taps over all images, and another of the model before training."""
    return trained_and_untrained_passes(
        workload, options, _FIELD_PASS, first_unit=_FIRST_FIELD_PASS, evaluation=_EXTENTS, tap_searches_a_model=False,
        takes_batches_apart=True,
    )  # fmt: skip


def _check(contribution: str, center: str, area_shares: Sequence[float], level: float) -> None:
    check_level(level)
    if contribution not in CONTRIBUTIONS:
        raise ValueError(f"Expected contribution to be one of {', '.join(CONTRIBUTIONS)}, received {contribution!r}.")
    if center not in CENTERS:
        raise ValueError(f"Expected center to be one of {', '.join(CENTERS)}, received {center!r}.")
    if any(not 0 < share < 1 for share in area_shares):
        raise ValueError(f"Expected area_shares in (0, 1), received {list(area_shares)}; pass area_shares=[0.5].")


@declares_cost(_cost)
@record_options
@checks_options(_check)
def effective_receptive_field(
    probe: Probe,
    *,
    taps: str | Sequence[str] = "stages",
    contribution: Contribution = "squared",
    center: Center = "mass",
    area_shares: Sequence[OpenUnitInterval] = (0.2, 0.3, 0.5, 0.99),
    initial: UntrainedModel | None = None,
    level: OpenUnitInterval = 0.95,
) -> EffectiveReceptiveFieldResult:
    """Measure which pixels the central position of a map depends on: one backward pass per batch and tap.

    With the map ``F (C, h, w)`` of an image ``x (c, H, W)``, the field is the mean over images of
    ``sum_c (d sum_k F[k, h // 2, w // 2] / d x[c])^2``, divided by its sum. Where h or w is even, the position is the lower or
    right one of the two in the middle, as in the code of Ding et al. (2022). Gradients are taken in eval mode in single
    precision (in double for a model in double) with respect to what the model takes, normalized images; no gradient of a
    parameter is computed.

    Where the map is the output of a LayerNorm and of small branches, as in the first stages of Swin and ConvNeXt, the sum of
    its channels hardly depends on the image: their gradients cancel, and the field is that of what is left. The first batch tells
    (``channel_coherence``), and a warning names such taps.

    The share of the field within a radius is known at the distances of pixel centers from the field's center, and taken as
    linear between them. Intervals are those of the jackknife over ten groups of images.

    Args:
        probe: Model, images and taps.
        taps: ``stages``, the last tap of each stage (one of a model without stages); ``last``; ``all``; or names of taps.
        contribution: Measure of a pixel's contribution: ``squared``, as above; ``channels``, ``sum_k sum_c (d F[k, h // 2, w //
            2] / d x[c])^2``, where gradients of channels cannot cancel, estimated without bias by one draw of random signs of
            the channels for each image; or ``positive``, that of Ding et al.: ``sum_c relu(d sum_k relu(F[k, h // 2, w // 2]) /
            d x[c])``.
        center: Center of radii and squares: ``mass``, the field's center of mass in half pixels; or ``cell``, the center of the
            position's cell, from which strided convolutions shift the field by up to half a cell.
        area_shares: Shares of the field for which the smallest square is sought; those of Ding et al.
        initial: The model before training, measured on the same images (a run supplies it).
        level: Coverage of the t-intervals over images.

    Raises:
        ValueError: No tap, an unknown one, a share outside of (0, 1), an unknown contribution or center, images of several
            sizes, batches of more than images, or an initial model of another architecture.
    """
    check_images(probe, "effective_receptive_field")
    probe.check_taps()
    read_taps = chosen_taps(probe.taps, taps)
    options = (contribution, center, np.asarray(area_shares, dtype=np.float64))
    n_models = 1 if initial is None else 2
    passes = count_text(n_models * len(read_taps), "backward pass", "backward passes")
    models = "" if initial is None else "; and before training"
    _logger.info(
        f"effective_receptive_field: {passes} over the images ({', '.join(tap.name for tap in read_taps)}{models})"
    )
    trained = measure_fields(probe, read_taps, *options)
    before = None if initial is None else measure_fields(*_initial_probe(probe, initial, read_taps), *options)
    warn_nulls("effective_receptive_field", trained.reasons)
    warn_nulls("effective_receptive_field", few_images(trained.n_images))
    _warn_of_cancellation(read_taps, trained, before)
    return _result(probe, read_taps, trained, before, options[-1], level)


def _warn_of_cancellation(taps: Sequence[Tap], trained: FieldsOfTaps, before: FieldsOfTaps | None) -> None:
    """Warn once, naming the taps at which the gradients of channels cancel."""
    names = [tap.name for tap, coherence in zip(taps, trained.coherence) if coherence < LEAST_COHERENCE]
    if before is not None:
        cancelled = [tap.name for tap, coherence in zip(taps, before.coherence) if coherence < LEAST_COHERENCE]
        names += [f"{name} before training" for name in cancelled]
    if names:
        warnings.warn(
            f"effective_receptive_field: the gradients of the channels cancel at {', '.join(names)}, as after a LayerNorm, so "
            "that the field shows only a small remainder; pass contribution=channels",
            stacklevel=3,
        )


def _initial_probe(probe: Probe, initial: nn.Module, taps: Sequence[Tap]) -> tuple[Probe, list[Tap]]:
    """Return a probe of the initial model with the same images, and the same places of it.

    Raises:
        ValueError: It has no module of a tap's name.
    """
    if any(p.device != probe.device for p in initial.parameters()):
        initial = copy.deepcopy(initial).to(probe.device)  # the caller's stays where it is
    names = {module: name for name, module in probe.model.named_modules()}
    modules: dict[str, nn.Module] = dict(initial.named_modules())
    places = []
    for tap in taps:
        name = names.get(tap.module)
        if name is None or type(modules.get(name)) is not type(tap.module):
            raise ValueError(
                f"Expected an initial model of the same architecture, received one without the module "
                f"{name!r} of tap {tap.name!r}."
            )
        places.append(replace(tap, module=modules[name]))
    return Probe(initial, probe.batches, probe.objective, taps=places, about=probe.about), places


def _result(
    probe: Probe,
    taps: Sequence[Tap],
    trained: FieldsOfTaps,
    before: FieldsOfTaps | None,
    area_shares: np.ndarray,
    level: float,
) -> EffectiveReceptiveFieldResult:
    n, shares = trained.n_images, np.array(RADIUS_SHARES)
    none: Any = np.full_like(trained.radius, np.nan)
    change, change_half = none, none
    if before is not None:
        change = trained.radius - before.radius
        change_half = _half_width(trained.radius_without - before.radius_without, n, level)
    return EffectiveReceptiveFieldResult(
        **tap_fields(taps),
        map_sizes=trained.map_sizes,
        positions=trained.map_sizes // 2,
        cells=trained.cells,
        centroid=trained.centroid,
        centers=trained.centers,
        field=trained.field,
        radius_shares=shares,
        **{f"radius_{100 * share:.0f}": trained.radius[:, i] for i, share in enumerate(shares)},
        radius_half_width=_half_width(trained.radius_without, n, level),
        area_shares=area_shares,
        area_ratio=trained.area,
        area_ratio_half_width=_half_width(trained.area_without, n, level),
        initial_field=np.full_like(trained.field, np.nan) if before is None else before.field,
        initial_radius=none if before is None else before.radius,
        radius_change=change,
        radius_change_half_width=change_half,
        reference="none" if before is None else "initial",
        n_backward=len(taps) * (1 if before is None else 2),
        level=level,
        n_images=n,
        card=probe.card(dtype=trained.dtype),
        channel_coherence=None if np.isnan(trained.coherence).all() else trained.coherence,
    )


def _half_width(without: np.ndarray, n_images: int, level: float) -> np.ndarray:
    """Return half the interval of numbers that were found without each group ``(n_groups, ...)``; NaN for few images."""
    half_width = jackknife_half_width(without, level)
    return half_width if n_images >= LEAST_IMAGES else np.full_like(half_width, np.nan)
