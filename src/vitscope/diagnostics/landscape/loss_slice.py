"""The loss along lines of weight space through a model: the one-dimensional case of `loss_landscape`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import GRADIENT, evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows, RunCheckpoints
from vitscope.core.weight_space import BatchNormPolicy, evaluation_dtype
from vitscope.diagnostics.landscape._direction_options import Kind, Preset, Source, check_preset, preset_source
from vitscope.diagnostics.landscape._lines import measure_lines
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.linalg.weights.directions import Normalization
from vitscope.runtime.dtypes import DtypeName, parse_float_dtype
from vitscope.runtime.value_ranges import IntAboveOne, PositiveFloat, PositiveInt, Seed
from vitscope.stats.intervals import t_half_width_of_rows


@dataclass(frozen=True)
class LossSliceResult(Result, coordinates={"x": "x"}):
    """Loss, accuracy and calibration along ``w + x * d``, averaged over the directions d.

    Attributes:
        x: (n,) coordinates, in units of the direction.
        nll: (n,) mean cross entropy in nats.
        nll_low: (n,) lower end of the 95% t-interval of that mean over directions; NaN with fewer than two directions.
        nll_high: (n,) its upper end.
        l2_half_sq: (n,) wd/2 * the sum of squares of all parameters.
        l2_sum_norm: (n,) wd * the sum of the tensors' norms.
        accuracy: (n,) share of images classified correctly.
        ece: (n,) expected calibration error.
        nll_by_direction: (n_directions, n) each direction's own curve.
        accuracy_by_direction: (n_directions, n) likewise.
        directions: Source of the directions.
        normalization: Scaling of the directions.
        direction_norms: (n_directions,) Euclidean norms.
        n_nonfinite: The number of points, over all directions, whose nll is NaN or infinite.
        card: The objective card.
    """

    x: np.ndarray
    nll: np.ndarray
    nll_low: np.ndarray
    nll_high: np.ndarray
    l2_half_sq: np.ndarray
    l2_sum_norm: np.ndarray
    accuracy: np.ndarray
    ece: np.ndarray
    nll_by_direction: np.ndarray
    accuracy_by_direction: np.ndarray
    directions: str
    normalization: str
    direction_norms: np.ndarray
    n_nonfinite: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the lowest point, the mean rise at both ends, and the points that are not finite."""
        finite = np.isfinite(self.nll)
        if not finite.any():
            return {"nll_center": float("nan"), "nonfinite_points": float(self.n_nonfinite)}
        lowest = int(np.where(finite, self.nll, np.inf).argmin())
        scalars = {
            "nll_minimum": float(self.nll[lowest]),
            "minimum_distance": float(abs(self.x[lowest])),
            "nonfinite_points": float(self.n_nonfinite),
        }
        center = int(np.abs(self.x).argmin())
        if self.x[center] == 0:
            scalars["nll_center"] = float(self.nll[center])
            scalars["nll_rise_at_ends"] = float((self.nll[0] + self.nll[-1]) / 2 - self.nll[center])
        return scalars


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return an evaluation for each point of each line."""
    n, n_lines = int(options["n"]), int(options["n_directions"])
    works = [
        evaluations(workload, options, Count.exactly(n * n_lines), n_in_row=n),
        *guard_checks(workload, moves_weights=True),
    ]
    if options.get("directions") == "gradient":
        works.append(Work(GRADIENT, Count.exactly(1), workload.n_images, is_divided=False))
        works += guard_checks(workload, second_order=True)
    # x, eight curves, nll and accuracy of each line, its direction's norm
    entries = 8 * n + 2 * n * n_lines + n_lines
    return MeasureCost(works, held_bytes=2.0 * workload.parameter_bytes, result_bytes=ENTRY * entries)


@declares_cost(_cost)
@record_options
@checks_options(check_preset)
def loss_slice(
    probe: Probe,
    *,
    directions: Kind | Sequence[Any] = "random",
    normalization: Normalization | None = None,
    ignore: str | Sequence[str] | None = None,
    span: PositiveFloat = 1.0,
    n: IntAboveOne = 21,
    n_directions: PositiveInt = 1,
    seed: Seed = 0,
    bn: BatchNormPolicy = "eval",
    dtype: DtypeName | torch.dtype | None = None,
    preset: Preset | None = None,
    eigenvectors: Sequence[Any] | np.ndarray | str | PathLike[str] | None = None,
    checkpoints: RunCheckpoints | None = None,
    labels: Sequence[str] | None = None,
    partial: ResumableRows | None = None,
) -> LossSliceResult:
    """Measure a model along one or more lines through its weights, in place.

    The options are those of `loss_landscape`; direction number k is its direction number k under the same seed.

    Args:
        probe: The model, its frozen batches, and the objective whose factor scales the L2 curves.
        directions: Directions of the lines.
        normalization: Scaling of the directions.
        ignore: Parameters that stay.
        span: Half the length of the lines, in units of the directions.
        n: Points on each line.
        n_directions: Lines; from two on the mean nll has an interval.
        seed: Seed of random directions.
        bn: ``eval`` or ``recalibrate``.
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        preset: ``official``.
        eigenvectors: Saved eigenvectors, for directions of that kind.
        checkpoints: Checkpoints of the run, for directions of that kind.
        labels: Labels of the checkpoints to use, in that order; all by default.
        partial: Finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: An unknown option, too few points or directions, or directions that do not fit the model.
    """
    if n < 2 or n_directions < 1 or not 0 < span < float("inf"):
        raise ValueError(
            f"Expected n of at least 2, a direction and a positive span, received n={n}, n_directions={n_directions} "
            f"and span={span}."
        )
    kind = parse_float_dtype(dtype)
    source = Source(directions, normalization, ignore, seed, eigenvectors, checkpoints, labels)
    source = preset_source(preset, source)
    x = np.linspace(-span, span, n)
    keys = [(index, float(point)) for index in range(n_directions) for point in x]
    rows = measure_lines(probe, source, keys, dtype=kind, bn=bn, partial=partial, description="loss slice")
    # rows to (n_directions, n)
    lines = {key: np.array([row[key] for row in rows]).reshape(n_directions, n) for key in rows[0]}
    mean = {key: lines[key].mean(axis=0) for key in ("nll", "accuracy", "ece", "l2_half_sq", "l2_sum_norm")}
    half_width = t_half_width_of_rows(lines["nll"])
    facts = {**source.facts(), "span": span, "n": n, "n_directions": n_directions, "preset": preset}
    return LossSliceResult(
        x=x,
        **mean,
        nll_low=mean["nll"] - half_width,
        nll_high=mean["nll"] + half_width,
        nll_by_direction=lines["nll"],
        accuracy_by_direction=lines["accuracy"],
        directions=source.kind,
        normalization=source.scaling,
        direction_norms=lines["direction_norm"][:, 0],
        n_nonfinite=int((~np.isfinite(lines["nll"])).sum()),
        card=probe.card(
            parameters=subset_name(probe.model), bn_policy=bn, solver=facts, dtype=evaluation_dtype(probe, kind)
        ),
    )
