"""The loss over a plane of weight space around a model (Li et al., NeurIPS 2018; Park & Kim, ICLR 2022, Fig 1a)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from vitscope.diagnostics.landscape._axes import Axes, plane_axes
from vitscope.diagnostics.landscape._direction_options import Kind, Preset, Source, check_preset, preset_source
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.linalg.weights.directions import Normalization
from vitscope.linalg.weights.plane_evaluation import plane_rows
from vitscope.linalg.weights.weight_space_walk import SquaredNorms, squared_norms
from vitscope.runtime.dtypes import DtypeName, parse_float_dtype
from vitscope.runtime.resumable_map import Partial, Row
from vitscope.runtime.value_ranges import IntAboveOne, PositiveFloat, Seed


@dataclass(frozen=True)
class LossLandscapeResult(Result, coordinates={"x": "x", "y": "y", "checkpoint": "labels"}):
    """Loss and accuracy at each point of the plane ``w + x * d1 + y * d2``.

    Attributes:
        x: (n_x,) coordinates along the first direction, in units of that direction.
        y: (n_y,) coordinates along the second.
        nll: (n_x, n_y) mean cross entropy in nats, first index x; not finite where the model is not.
        l2_half_sq: (n_x, n_y) wd/2 * the sum of squares of all parameters, tied ones once.
        l2_sum_norm: (n_x, n_y) wd * the sum of the tensors' norms (the released code's L2).
        accuracy: (n_x, n_y) share of images classified correctly.
        ece: (n_x, n_y) expected calibration error, ten bins.
        directions: ``random``, ``eigenvectors``, ``pca``, ``gradient``, ``checkpoints`` or ``given``.
        normalization: Scaling of the directions.
        preset: ``official`` where the released code's settings were asked for, else empty.
        direction_norms: (2,) Euclidean norms of the directions.
        direction_cosine: The cosine between the directions.
        weight_norm: Euclidean norm of all parameters at the center.
        n_nonfinite: The number of points whose nll is NaN or infinite.
        dtype_error: Largest absolute difference in nll (nats) that the reduced precision made, over the center and the
            four corners; None in full precision.
        labels: (n_checkpoints,) of the checkpoints, for ``pca`` and ``checkpoints``.
        path: (n_checkpoints, 2) coordinates of the checkpoints, projected on the plane.
        projection_error: (n_checkpoints,) distance from the plane over distance from the center.
        card: The objective card.
    """

    x: np.ndarray
    y: np.ndarray
    nll: np.ndarray
    l2_half_sq: np.ndarray
    l2_sum_norm: np.ndarray
    accuracy: np.ndarray
    ece: np.ndarray
    directions: str
    normalization: str
    preset: str
    direction_norms: np.ndarray
    direction_cosine: float
    weight_norm: float
    n_nonfinite: int
    dtype_error: float | None
    labels: tuple[str, ...]
    path: np.ndarray
    projection_error: np.ndarray
    card: ObjectiveCard | None = None

    def minimum(self) -> tuple[float, float, float]:
        """Return x, y and nll of the lowest finite point; NaN where there is none."""
        if self.n_nonfinite == self.nll.size:
            return float("nan"), float("nan"), float("nan")
        finite = np.where(np.isfinite(self.nll), self.nll, np.inf)
        i, j = np.unravel_index(finite.argmin(), finite.shape)
        return float(self.x[i]), float(self.y[j]), float(self.nll[i, j])

    def rise_at_border(self, l2: np.ndarray | float = 0.0) -> float:
        """Return the mean of ``nll + l2`` over the border minus its lowest value, over points that are finite."""
        surface = self.nll + l2
        border = np.concatenate([surface[0], surface[-1], surface[1:-1, 0], surface[1:-1, -1]])
        border = border[np.isfinite(border)]
        return float(border.mean() - surface[np.isfinite(surface)].min()) if border.size else float("nan")

    def scalars(self) -> dict[str, float]:
        """Return the headline numbers: the lowest point, rises at the border, points that are not finite."""
        x, y, lowest = self.minimum()
        scalars = {
            "nll_minimum": lowest,
            "minimum_distance": float(np.hypot(x, y)),
            "nll_rise_at_border": self.rise_at_border(),
            "nll_l2_half_sq_rise_at_border": self.rise_at_border(self.l2_half_sq),
            "nll_l2_sum_norm_rise_at_border": self.rise_at_border(self.l2_sum_norm),
            "nonfinite_points": float(self.n_nonfinite),
        }
        i, j = np.abs(self.x).argmin(), np.abs(self.y).argmin()
        if self.x[i] == 0 and self.y[j] == 0:
            scalars |= {"nll_center": float(self.nll[i, j]), "accuracy_center": float(self.accuracy[i, j])}
        return scalars


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return n^2 evaluations; with reduced precision those of the corners and the center in both precisions too."""
    n, kind = int(options["n"]), parse_float_dtype(options.get("dtype"))
    is_reduced = kind in (torch.bfloat16, torch.float16)
    # finished points of the grid are not measured again where rows are stored
    repeats = Count(n * n + 5, n * n + 5, n * n + 10) if is_reduced else Count.exactly(n * n)
    works = [evaluations(workload, options, repeats, n_in_row=n), *guard_checks(workload, moves_weights=True)]
    if options.get("directions") == "gradient":
        works.append(Work(GRADIENT, Count.exactly(1), workload.n_images, is_divided=False))
        works += guard_checks(workload, second_order=True)
    # x, y; three measured surfaces and two of the L2 term; direction norms
    return MeasureCost(works, held_bytes=2.0 * workload.parameter_bytes, result_bytes=ENTRY * (2 * n + 5 * n * n + 2))


@declares_cost(_cost)
@record_options
@checks_options(check_preset)
def loss_landscape(
    probe: Probe,
    *,
    directions: Kind | Sequence[Any] = "random",
    normalization: Normalization | None = None,
    ignore: str | Sequence[str] | None = None,
    span: PositiveFloat = 1.0,
    n: IntAboveOne = 21,
    seed: Seed = 0,
    bn: BatchNormPolicy = "eval",
    dtype: DtypeName | torch.dtype | None = None,
    preset: Preset | None = None,
    eigenvectors: Sequence[Any] | np.ndarray | str | PathLike[str] | None = None,
    checkpoints: RunCheckpoints | None = None,
    labels: Sequence[str] | None = None,
    partial: ResumableRows | None = None,
) -> LossLandscapeResult:
    """Measure a model at the points of a plane through its weights, in place.

    The weights move; buffers do not. Memory: the model and two sets of tensors of its size. Weights and buffers are back
    bit for bit afterwards, also after an exception or a termination.

    Args:
        probe: The model, its frozen batches, and the objective whose factor scales the L2 surfaces.
        directions: ``random`` (seeded, shared by models with equal names and shapes); ``eigenvectors``; ``pca`` of the
            ``checkpoints`` about the model's weights, scaled so that the farthest coordinate is 1; ``gradient`` of the
            objective (uphill; unit length before normalization) and a random direction orthogonal to it; ``checkpoints``:
            the ways to the first two (x = 1 is the first one's weights); or two directions themselves.
        normalization: ``filter`` (Li et al., section 4), ``filter_official``, ``layer`` or ``none``; by default ``filter``
            for random directions and the gradient, ``none`` for the rest.
        ignore: Parameters that stay: ``bias_bn`` (one-dimensional parameters and position tables; the default for random
            directions and the gradient), ``one_dim``, ``positions``, or regular expressions on names; an empty list moves
            everything.
        span: Half the side of the square, in units of the directions.
        n: Points on a side; the center is one of them where n is odd.
        seed: Seed of random directions.
        bn: ``eval`` for BatchNorm's running statistics, ``recalibrate`` to recompute them at each point.
        dtype: ``bfloat16`` runs the forward passes under autocast (the result states the error); ``float64`` casts the model.
        preset: ``official``: the released code's directions (``filter_official``, position tables and one-dimensional
            parameters ignored); with the default span and n its grid; its surface is ``nll + l2_sum_norm``. That code drew
            augmentations anew at each point and moved some buffers; here both stay.
        eigenvectors: Arrays or mappings by parameter name, or the path of a saved result that holds them.
        checkpoints: Pairs of a label and a state dict.
        labels: Labels of the checkpoints to use, in that order; all by default.
        partial: Finished points, by coordinates; new ones are stored as soon as they are measured.

    Raises:
        ValueError: An unknown option, too few points, or directions that do not fit the model or do not span a plane.
    """
    if n < 2 or not 0 < span < float("inf"):
        raise ValueError(f"Expected n of at least 2 and a positive span, received n={n} and span={span}.")
    kind = parse_float_dtype(dtype)
    source = Source(directions, normalization, ignore, seed, eigenvectors, checkpoints, labels)
    source = preset_source(preset, source)
    axes = plane_axes(probe, source)
    side = np.linspace(-span, span, n)
    norms = squared_norms(dict(probe.model.named_parameters()), axes.first, axes.second)
    points = [(float(a), float(b)) for a in side for b in side]
    rows = _measure(probe, axes, points, kind, bn, partial)
    # (n * n,) to (n, n), first index x
    grids = {key: np.array([row[key] for row in rows]).reshape(n, n) for key in ("nll", "accuracy", "ece")}
    facts = {**source.facts(), "span": span, "n": n, "preset": preset}
    return LossLandscapeResult(
        x=side,
        y=side.copy(),
        **grids,
        **_l2(norms, probe.objective.weight_decay, side),
        directions=source.kind,
        normalization=source.scaling,
        preset=preset or "",
        direction_norms=axes.norms,
        direction_cosine=axes.cosine,
        weight_norm=float(np.sqrt(norms.at(np.zeros(()), np.zeros(())).sum())),
        n_nonfinite=int((~np.isfinite(grids["nll"])).sum()),
        dtype_error=_dtype_error(probe, axes, span, kind, bn, partial),
        labels=axes.labels,
        path=axes.path,
        projection_error=axes.projection_error,
        card=probe.card(
            parameters=subset_name(probe.model), bn_policy=bn, solver=facts, dtype=evaluation_dtype(probe, kind)
        ),
    )


def _measure(
    probe: Probe,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
    prefix: str = "",
) -> list[Row]:
    return plane_rows(
        probe, axes.first, axes.second, points, dtype=dtype, bn=bn, partial=partial,
        row_prefix=prefix, description="loss landscape",
    )  # fmt: skip


def _dtype_error(
    probe: Probe, axes: Axes, span: float, dtype: torch.dtype | None, bn: str, partial: Partial | None
) -> float | None:
    """Return the largest difference in nll between reduced and full precision over the center and the corners."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    points = [(0.0, 0.0), *((a, b) for a in (-span, span) for b in (-span, span))]
    full = _measure(probe, axes, points, None, bn, partial, "full precision ")
    reduced = _measure(probe, axes, points, dtype, bn, partial)
    pairs = np.array([(f["nll"], r["nll"]) for f, r in zip(full, reduced)])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return float(np.abs(pairs[:, 0] - pairs[:, 1]).max()) if len(pairs) else float("nan")


def _l2(norms: SquaredNorms, weight_decay: float, side: np.ndarray) -> Mapping[str, np.ndarray]:
    a, b = side[:, None], side[None, :]  # (n, 1) and (1, n)
    return {
        "l2_half_sq": norms.half_sq(weight_decay, a, b),
        "l2_sum_norm": norms.sum_norm(weight_decay, a, b),
    }
