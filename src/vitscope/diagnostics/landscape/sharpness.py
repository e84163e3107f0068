"""Rise of the loss at stated distances from a model, with intervals over random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from vitscope.core.cost.image_passes import EVALUATION, GRADIENT, evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.weight_space import BatchNormPolicy, evaluation_dtype
from vitscope.diagnostics.landscape._adaptive_sharpness import (
    AdaptiveMeasure,
    AdaptiveOptions,
    AdaptiveRises,
    adaptive_rises,
)
from vitscope.diagnostics.landscape._direction_options import Source
from vitscope.diagnostics.landscape._lines import measure_lines
from vitscope.diagnostics.landscape._worst_case import worst_rises
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.runtime.dtypes import DtypeName, parse_float_dtype
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveFloat, PositiveInt, Seed
from vitscope.stats.intervals import t_half_width_of_rows

#: from here on every model tried was near chance: such radii are marked, never compared
SATURATED_RADIUS = 0.5

#: a radius is saturated too where this share of the accuracy above chance is left, or less
SATURATED_SHARE = 0.1


@dataclass(frozen=True)
class SharpnessResult(Result, coordinates={"radius": "radii"}):
    """Rises of the NLL (nats) above the model's own, at distances relative to the filters' norms.

    Attributes:
        radii: (n_radii,) distances: 0.1 moves each filter by a tenth of its norm.
        rise: (n_radii,) mean rise over direction pairs, each the mean over both directions and both signs.
        rise_low: (n_radii,) lower end of the 95% t-interval over pairs; NaN with fewer than two pairs.
        rise_high: (n_radii,) its upper end.
        rise_by_pair: (n_radii, n_pairs) each pair's rise.
        l2_half_sq_rise_by_pair: (n_radii, n_pairs) the rise of wd/2 * the sum of squares at the same points, exact.
        l2_sum_norm_rise_by_pair: (n_radii, n_pairs) the rise of wd * the sum of the tensors' norms.
        accuracy: (n_radii,) mean accuracy at that distance.
        saturated: (n_radii,) whether the radius is at least 0.5, or at most a tenth of the accuracy above chance is left
            there: such a rise says how wrong a broken model is, not how flat the minimum.
        worst_rise: (n_radii,) the largest rise found in the ball of that radius; NaN at saturated radii.
        worst_rise_by_start: (n_radii, n_starts) the largest rise found from each start.
        nll_center: The model's own nll.
        accuracy_center: The model's own accuracy.
        n_nonfinite: The number of points whose nll is NaN or infinite.
        adaptive_measures: (n_adaptive,) adaptive measures, one name for each measured radius.
        adaptive_radii: (n_adaptive,) their radii, relative to the scales of the weights.
        adaptive_rise: (n_adaptive,) mean rise of the loss over groups of ``m_images`` images, nats. Of a worst case it is a lower
            bound: the largest rise that the ascents met.
        adaptive_rise_low: (n_adaptive,) lower end of the 95% t-interval over groups; NaN with fewer than two groups. It holds
            the mean over images of what the ascent finds, and not what the ascent misses.
        adaptive_rise_high: (n_adaptive,) its upper end.
        adaptive_rise_by_group: (n_adaptive, n_groups) each group's rise.
        adaptive_late_share: (n_adaptive,) the share of the rise that the last quarter of the steps added: near 0 where the
            ascent has converged; NaN for averages.
        card: The objective card.
    """

    radii: np.ndarray
    rise: np.ndarray
    rise_low: np.ndarray
    rise_high: np.ndarray
    rise_by_pair: np.ndarray
    l2_half_sq_rise_by_pair: np.ndarray
    l2_sum_norm_rise_by_pair: np.ndarray
    accuracy: np.ndarray
    saturated: np.ndarray
    worst_rise: np.ndarray
    worst_rise_by_start: np.ndarray
    nll_center: float
    accuracy_center: float
    n_nonfinite: int
    adaptive_measures: tuple[str, ...] = ()
    adaptive_radii: np.ndarray = field(default_factory=lambda: np.empty(0))
    adaptive_rise: np.ndarray = field(default_factory=lambda: np.empty(0))
    adaptive_rise_low: np.ndarray = field(default_factory=lambda: np.empty(0))
    adaptive_rise_high: np.ndarray = field(default_factory=lambda: np.empty(0))
    adaptive_rise_by_group: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    adaptive_late_share: np.ndarray = field(default_factory=lambda: np.empty(0))
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return rises with intervals, those of the L2 terms, and worst rises, at the radii that are not saturated.

        Adaptive rises go by their measure and radius (``elementwise_linf_r0.001``).
        """
        scalars = {"nll_center": self.nll_center, "nonfinite_points": float(self.n_nonfinite)}
        for i in np.flatnonzero(~self.saturated):
            radius = f"r{self.radii[i]:g}"
            scalars |= {
                f"rise_{radius}": float(self.rise[i]),
                f"l2_half_sq_rise_{radius}": float(self.l2_half_sq_rise_by_pair[i].mean()),
                f"l2_sum_norm_rise_{radius}": float(self.l2_sum_norm_rise_by_pair[i].mean()),
            }
            optional = {"rise_low": self.rise_low[i], "rise_high": self.rise_high[i], "worst_rise": self.worst_rise[i]}
            # not there with one pair, or without ascent; a rise that is no number stays and shows
            scalars |= {f"{key}_{radius}": float(value) for key, value in optional.items() if not np.isnan(value)}
        names = [f"{m}_r{r:g}" for m, r in zip(self.adaptive_measures, self.adaptive_radii)]
        scalars |= dict(zip(names, map(float, self.adaptive_rise)))
        late = zip(names, map(float, self.adaptive_late_share))
        return scalars | {f"{name}_late_share": share for name, share in late if not np.isnan(share)}


def _cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return the evaluations of the mean and, for radii that are not saturated, the gradients of the worst rise.

    Which radii are saturated is known only from the accuracies: expected are those below `SATURATED_RADIUS`. An ascent ends
    early where the loss is not finite. The adaptive measures have no formula.
    """
    if options.get("adaptive"):
        return None
    radii = [float(radius) for radius in options["radii"]]
    n_pairs, n_steps, n_starts = int(options["n_pairs"]), int(options["n_steps"]), int(options["n_starts"])
    n_searches = sum(radius < SATURATED_RADIUS for radius in radii) * n_starts if n_steps else 0
    n = workload.n_images
    works = [
        evaluations(workload, options, Count.exactly(1 + 4 * n_pairs * len(radii)), n_in_row=2 * len(radii)),
        Work(EVALUATION, Count.exactly(1), 1, is_divided=False),  # the number of classes
        Work(EVALUATION, Count(n_searches, 0, n_searches), n),
        Work(GRADIENT, Count(n_searches * (n_steps + 1), 0, n_searches * (n_steps + 1)), n),
        *guard_checks(workload, moves_weights=True),
    ]
    # six fields of a radius, three of each pair, one of each start, and a flag of one byte
    n_bytes = len(radii) * (ENTRY * (6 + 3 * n_pairs + n_starts) + 1)
    return MeasureCost(works, held_bytes=4.0 * workload.parameter_bytes, result_bytes=n_bytes)


@declares_cost(_cost)
@record_options
def sharpness(
    probe: Probe,
    *,
    radii: Sequence[PositiveFloat] = (0.05, 0.1, 0.2, 0.5, 1.0),
    n_pairs: PositiveInt = 20,
    normalization: Literal["filter", "layer"] = "filter",
    ignore: str | Sequence[str] = "bias_bn",
    n_steps: NonNegativeInt = 10,
    n_starts: PositiveInt = 2,
    seed: Seed = 0,
    bn: BatchNormPolicy = "eval",
    adaptive: Sequence[AdaptiveMeasure] = (),
    l2_radii: Sequence[PositiveFloat] = (0.25, 0.5, 1.0),
    linf_radii: Sequence[PositiveFloat] = (0.001, 0.002, 0.004),
    average_radii: Sequence[PositiveFloat] = (0.05, 0.1, 0.2),
    m_images: PositiveInt = 128,
    ascent_steps: PositiveInt = 20,
    logit_normalization: bool = False,
    dtype: DtypeName | torch.dtype | None = None,
    partial: ResumableRows | None = None,
) -> SharpnessResult:
    """Measure the mean rise of the NLL at given radii over random directions, and the worst rise in the ball.

    The mean: over ``n_pairs`` pairs of filter-normalized directions (Li et al., NeurIPS 2018), shared by models through the seed,
    ``nll(w + r d) - nll(w)`` averaged over both directions and both signs, which cancels the slope. The worst: projected
    gradient ascent on the NLL in the ball in which each filter moves by at most r times its norm, which contains those
    random points; from random points of its surface, in steps along the filter-normalized gradient that shrink from r to
    r / n_steps; the largest value met is a lower bound of the true one. It is no second opinion on the mean: where every
    filter turns towards its input at once, activations grow from layer to layer, and a briefly trained ResNet-18 met 1e5 nats
    at r = .05. The rise is the NLL's alone; that of either L2 term is given beside it.

    ``adaptive`` adds the measures of Andriushchenko et al. (ICML 2023), over all trainable parameters ``w`` with scales ``c``::

        l2, linf   mean over groups of m images of   max  L(w + d) - L(w)   over   ||d / c||_p <= rho
        average    mean over groups and normal z of       L(w + rho c z) - L(w)

    ``elementwise``: ``c = |w|``; no rescaling of single weights that leaves the function alone changes the measure, such as that
    of the layers around a ReLU, or of BatchNorm's scale and the layer after it. ``filter``: ``c`` is the root mean square of the
    weight's filter (1 / sqrt(size of the filter) of ASAM's, Kwon et al., ICML 2021) and ``|w|`` for parameters that are no
    filters; rescalings of whole filters do not change it, rescalings of input channels do. Weights that are zero do not move.
    The maximum is searched by APGD (Croce & Hein, ICML 2020) in ``d / c``, and is a lower bound; ``adaptive_late_share``
    says how far it had converged. ``logit_normalization`` centers each image's logits and divides them by their norm, before
    and after the move, so that the scale of the last layer does not count.

    Args:
        probe: The model and its frozen batches.
        radii: Distances, positive.
        n_pairs: Pairs of directions, at least 20 for a claim; and pairs of opposite normal points of the adaptive averages.
        normalization: ``filter`` or ``layer``.
        ignore: Parameters that stay (see `vitscope.linalg.weights.directions.moving`).
        n_steps: Number of steps of gradient ascent; 0 leaves the worst rise out.
        n_starts: Random starts of the ascent; of APGD the weights themselves are the first.
        seed: Seed of directions, starts and normal points.
        bn: ``eval`` or ``recalibrate``, for the mean; the ascent and the adaptive measures use running statistics.
        adaptive: Some of ``elementwise_l2``, ``elementwise_linf``, ``elementwise_average``, ``filter_l2``, ``filter_linf`` and
            ``filter_average``; none by default.
        l2_radii: Radii of the L2 balls; a few of those of the paper, as for the other balls.
        linf_radii: Radii of the Linf balls.
        average_radii: Standard deviations, in units of the scales.
        m_images: Images of each group, in the order of the batches; those beyond the last whole group are left out.
        ascent_steps: Steps of APGD (the paper's code takes 20).
        logit_normalization: Whether to normalize the logits in the adaptive measures.
        dtype: ``bfloat16``, ``float64``, or None for the model's own; the ascent and the adaptive measures never run in half
            precision.
        partial: Finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: An unknown option, no pair, or a radius that is not positive.
    """
    radii = tuple(float(r) for r in radii)
    if not radii or min(radii) <= 0 or n_pairs < 1 or n_steps < 0 or n_starts < 1:
        raise ValueError(
            f"Expected positive radii, at least one pair and one start, received radii={radii}, n_pairs={n_pairs}, "
            f"n_steps={n_steps}, n_starts={n_starts}."
        )
    if normalization not in ("filter", "layer"):
        raise ValueError(f"Expected normalization to be filter or layer, received {normalization!r}.")
    kind = parse_float_dtype(dtype)
    balls = {"l2": tuple(l2_radii), "linf": tuple(linf_radii), "average": tuple(average_radii)}
    options = AdaptiveOptions(
        tuple(adaptive), balls, m_images, ascent_steps, n_starts, n_pairs, logit_normalization, seed
    )
    source = Source("random", normalization, ignore, seed)
    keys = [(0, 0.0), *((d, s * r) for d in range(2 * n_pairs) for r in radii for s in (-1.0, 1.0))]
    center, *lines = measure_lines(probe, source, keys, dtype=kind, bn=bn, partial=partial, description="sharpness")
    # (pairs, two directions, radii, two signs)
    nll, accuracy, half_sq, sum_norm = (
        np.array([row[key] for row in lines]).reshape(n_pairs, 2, len(radii), 2)
        for key in ("nll", "accuracy", "l2_half_sq", "l2_sum_norm")
    )
    by_pair = nll.mean(axis=(1, 3)) - center["nll"]
    half_width = t_half_width_of_rows(by_pair)
    saturated = _saturated(probe, radii, accuracy.mean(axis=(0, 1, 3)), center["accuracy"])
    full_kind = kind if kind in (torch.float64, torch.float32) else None
    worst = worst_rises(probe, source, radii, ~saturated, n_steps, n_starts, full_kind, partial)
    rises = adaptive_rises(probe, options, full_kind, partial)
    facts = {**source.facts(), "radii": list(radii), "n_pairs": n_pairs, "n_steps": n_steps, "n_starts": n_starts}
    return SharpnessResult(
        radii=np.array(radii),
        rise=by_pair.mean(axis=0),
        rise_low=by_pair.mean(axis=0) - half_width,
        rise_high=by_pair.mean(axis=0) + half_width,
        rise_by_pair=by_pair.T,
        l2_half_sq_rise_by_pair=half_sq.mean(axis=(1, 3)).T - center["l2_half_sq"],
        l2_sum_norm_rise_by_pair=sum_norm.mean(axis=(1, 3)).T - center["l2_sum_norm"],
        accuracy=accuracy.mean(axis=(0, 1, 3)),
        saturated=saturated,
        worst_rise=worst.max(axis=1),
        worst_rise_by_start=worst,
        nll_center=center["nll"],
        accuracy_center=center["accuracy"],
        n_nonfinite=int((~np.isfinite(nll)).sum()),
        **_adaptive_fields(options, rises),
        card=probe.card(
            parameters=subset_name(probe.model), bn_policy=bn, solver=facts, dtype=evaluation_dtype(probe, kind)
        ),
    )


def _adaptive_fields(options: AdaptiveOptions, rises: AdaptiveRises) -> dict[str, Any]:
    """Return the adaptive fields of the result, without any where no adaptive measure was chosen."""
    if not options.cases:
        return {}
    with np.errstate(invalid="ignore"):  # rises that are not finite
        mean, late = rises.rise.mean(axis=1), rises.late_rise.mean(axis=1)
        half_width = t_half_width_of_rows(rises.rise.T)
    return {
        "adaptive_measures": tuple(measure for measure, _ in options.cases),
        "adaptive_radii": np.array([radius for _, radius in options.cases]),
        "adaptive_rise": mean,
        "adaptive_rise_low": mean - half_width,
        "adaptive_rise_high": mean + half_width,
        "adaptive_rise_by_group": rises.rise,
        # nothing was gained late where nothing was gained at all
        "adaptive_late_share": np.where(mean != 0, late / np.where(mean != 0, mean, 1.0), late),
    }


def _saturated(probe: Probe, radii: Sequence[float], accuracy: np.ndarray, center: float) -> np.ndarray:
    if np.isnan(center) and probe.objective.loss != "cross_entropy":  # no classes, so no chance
        return np.array(radii) >= SATURATED_RADIUS
    with probe.guard() as model:
        x, _ = next(iter(probe.iter_batches()))
        chance = 1.0 / model(x[:1]).shape[1]
    broken = accuracy - chance <= SATURATED_SHARE * max(center - chance, 0.0)
    return broken | (np.array(radii) >= SATURATED_RADIUS)
