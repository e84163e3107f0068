"""The loss on the straight line between two sets of weights (Goodfellow et al., ICLR 2015)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows, RunCheckpoints
from vitscope.core.weight_space import (
    BatchNormPolicy,
    Checkpoints,
    check_movable,
    evaluation_dtype,
    guarded_evaluation,
    select_checkpoints,
)
from vitscope.diagnostics.landscape._alignment import Alignment, aligned_weights, check_alignment
from vitscope.linalg.weights.directions import norm, wide_dtype
from vitscope.linalg.weights.weight_space_walk import points_on_segment, squared_norms
from vitscope.models.state_dicts import with_default_keys
from vitscope.runtime.dtypes import DtypeName, parse_float_dtype
from vitscope.runtime.resumable_map import Partial, Row, map_resumably
from vitscope.runtime.value_ranges import IntAboveOne

#: the name under which the probe's own weights are an end
MODEL = "model"


@dataclass(frozen=True)
class LinearInterpolationResult(Result, coordinates={"t": "t"}):
    """Loss, accuracy and calibration at ``(1 - t) * start + t * end``.

    Attributes:
        t: (n,) positions, 0 at the start and 1 at the end.
        nll: (n,) mean cross entropy in nats.
        l2_half_sq: (n,) wd/2 * the sum of squares of all parameters.
        l2_sum_norm: (n,) wd * the sum of the tensors' norms.
        accuracy: (n,) share of images classified correctly.
        ece: (n,) expected calibration error.
        start: Label of the weights at t = 0.
        end: Label of the weights at t = 1; ``model`` for the probe's own.
        distance: Euclidean distance between the ends.
        n_nonfinite: The number of points whose nll is NaN or infinite.
        alignment: Rule by which the start's units were matched to the end's: ``none``, ``weights`` or ``activations``.
        card: The objective card.
    """

    t: np.ndarray
    nll: np.ndarray
    l2_half_sq: np.ndarray
    l2_sum_norm: np.ndarray
    accuracy: np.ndarray
    ece: np.ndarray
    start: str
    end: str
    distance: float
    n_nonfinite: int
    alignment: str = "none"
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the nll at both ends and its largest rise along the way (0 for a monotone descent)."""
        lowest_before = np.minimum.accumulate(self.nll)
        return {
            "nll_start": float(self.nll[0]),
            "nll_end": float(self.nll[-1]),
            "largest_rise": float((self.nll - lowest_before).max()),
            "nonfinite_points": float(self.n_nonfinite),
        }


def path_cost(workload: Workload, options: Options, *, n_curves: int) -> MeasureCost | None:
    """Return an evaluation for each point of the way; the alignment of one end with the other has no formula.

    Args:
        workload: The network and the images.
        options: Options of the measure.
        n_curves: Number of arrays of the result with an entry for each point.
    """
    if options.get("alignment", "none") != "none":
        return None
    n = int(options["n"])
    works = [evaluations(workload, options, Count.exactly(n)), *guard_checks(workload, moves_weights=True)]
    # both ends and the weights to go back to
    return MeasureCost(works, held_bytes=3.0 * workload.parameter_bytes, result_bytes=ENTRY * n_curves * n)


def _check_ends(n: int, t_min: float, t_max: float) -> None:
    if n < 2 or not t_min < t_max:
        raise ValueError(f"Expected t_min < t_max and at least 2 points, received {t_min=:g}, {t_max=:g}, {n=}.")


@declares_cost(functools.partial(path_cost, n_curves=6))  # t and five curves
@record_options
@checks_options(_check_ends)
def linear_interpolation(
    probe: Probe,
    *,
    checkpoints: RunCheckpoints,
    start: str | None = None,
    end: str | None = None,
    n: IntAboveOne = 21,
    t_min: float = 0.0,
    t_max: float = 1.0,
    bn: BatchNormPolicy = "eval",
    alignment: Alignment = "none",
    dtype: DtypeName | torch.dtype | None = None,
    partial: ResumableRows | None = None,
) -> LinearInterpolationResult:
    """Measure a model on the straight line between two checkpoints, or between one and the model itself.

    All parameters and floating-point buffers are interpolated, so that at both ends the network is exactly the one that was
    saved. Everything is back bit for bit afterwards.

    Args:
        probe: The model and its frozen batches.
        checkpoints: Pairs of a label and a state dict.
        start: Label of the weights at t = 0; by default the first checkpoint.
        end: Label of the weights at t = 1, or ``model`` for the probe's own; by default the last of several
            checkpoints, and the probe's own where there is one checkpoint.
        n: Points.
        t_min: First position on the line; below 0 extrapolates.
        t_max: Last position on the line; above 1 extrapolates.
        bn: ``eval``: running statistics, interpolated like the weights; ``recalibrate``: recomputed at each point, as networks
            with BatchNorm need between independent solutions.
        alignment: ``none``; ``weights`` or ``activations``: the start's units are permuted to match the end's before, which
            leaves its function as it is (`vitscope.align_weights`; activations over the probe's images).
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        partial: Finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: An unknown option or label, fewer than two points, a checkpoint of another model, or a network whose units
            cannot be followed, with alignment.
    """
    kind = parse_float_dtype(dtype)
    check_movable(probe)
    (first, a), (last, b) = _ends(probe, checkpoints, start, end)
    aligned = check_alignment(alignment)
    alignment_facts = {}
    if aligned:
        a, alignment_facts = aligned_weights(probe, a, b, alignment)
    t = np.linspace(t_min, t_max, n)
    # not in the type of the files: one of the checkpoints may have been saved in half precision
    at_start = {name: a[name].to(wide_dtype(p)) for name, p in probe.model.named_parameters()}
    way = {name: b[name].to(w) - w for name, w in at_start.items()}
    norms = squared_norms(at_start, None, way)
    way_name = f"{first} to {last}" + (f", aligned by {alignment}" if aligned else "")
    rows = _measure(probe, a, b, t, way_name, kind, bn, partial)
    values = {key: np.array([row[key] for row in rows]) for key in ("nll", "accuracy", "ece")}
    decay, zero = probe.objective.weight_decay, np.zeros(())
    facts = {"start": first, "end": last, "t_min": t_min, "t_max": t_max, "n": n, **alignment_facts}
    return LinearInterpolationResult(
        t=t,
        **values,
        l2_half_sq=norms.half_sq(decay, zero, t),
        l2_sum_norm=norms.sum_norm(decay, zero, t),
        start=first,
        end=last,
        distance=norm(way),
        n_nonfinite=int((~np.isfinite(values["nll"])).sum()),
        alignment=alignment,
        card=probe.card(bn_policy=bn, solver=facts, dtype=evaluation_dtype(probe, kind)),
    )


def _measure(
    probe: Probe,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    t: np.ndarray,
    way: str,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
) -> list[Row]:
    with guarded_evaluation(probe, dtype=dtype, bn=bn) as (model, evaluate_current_weights):
        tensors = dict(model.named_parameters()) | {name: v for name, v in model.named_buffers() if name in a}
        with points_on_segment(tensors, a, b) as move:

            def compute(point: float) -> Row:
                move(point)
                return evaluate_current_weights()

            def name(point: float) -> str:
                return f"{way}: {point!r}"

            points = [float(point) for point in t]
            return map_resumably(points, compute, name=name, partial=partial, description="linear interpolation")


def _ends(
    probe: Probe, checkpoints: Checkpoints, start: str | None, end: str | None
) -> tuple[tuple[str, Mapping[str, Tensor]], tuple[str, Mapping[str, Tensor]]]:
    if checkpoints is None or len(checkpoints) == 0:
        raise ValueError("Expected checkpoints (pairs of a label and a state dict), received none.")
    several = len(checkpoints) > 1
    first = checkpoints[0] if start is None else _one(probe, checkpoints, start)
    last = checkpoints[-1] if end is None and several else _one(probe, checkpoints, end or MODEL)
    return _checked(probe, first), _checked(probe, last)


def _one(probe: Probe, checkpoints: Checkpoints, label: str) -> tuple[str, Mapping[str, Tensor]]:
    if label == MODEL:
        return MODEL, {name: value.detach().clone() for name, value in probe.model.state_dict().items()}
    return next(select_checkpoints(checkpoints, [label]))


def _checked(probe: Probe, checkpoint: tuple[str, Mapping[str, Tensor]]) -> tuple[str, Mapping[str, Tensor]]:
    """Return the checkpoint with its values on the probe's device.

    Raises:
        ValueError: A name that it lacks, or a shape that differs.
    """
    label, state = checkpoint[0], with_default_keys(probe.model, checkpoint[1])
    for name, value in probe.model.state_dict().items():
        if name not in state:
            raise ValueError(f"Expected {name!r} in checkpoint {label!r}, received none: is it this model's?")
        if state[name].shape != value.shape:
            expected, received = tuple(value.shape), tuple(state[name].shape)
            raise ValueError(f"Expected {name!r} of shape {expected} in checkpoint {label!r}, received {received}.")
    return label, {name: value.to(probe.device) for name, value in state.items()}
