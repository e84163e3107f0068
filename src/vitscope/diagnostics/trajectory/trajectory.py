"""Path of training through weight space relative to its end: in polar form, and in its principal plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import evaluations, guard_checks
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, UnknownCost, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows, RunCheckpoints
from vitscope.core.weight_space import BatchNormPolicy, check_movable, evaluation_dtype, select_checkpoints
from vitscope.diagnostics.trajectory._checkpoint_rows import checkpoint_rows
from vitscope.linalg.weights.checkpoint_pca import difference, gram, principal_directions
from vitscope.linalg.weights.directions import Direction, inner, norm, orthogonalize, random_direction, scale
from vitscope.linalg.weights.effective_weights import canonical_names
from vitscope.linalg.weights.plane_evaluation import plane_rows
from vitscope.runtime.dtypes import DtypeName, parse_float_dtype
from vitscope.runtime.resumable_map import Row
from vitscope.runtime.value_ranges import IntAboveOneOrNone, NonNegativeFloat, Seed


@dataclass(frozen=True)
class TrajectoryResult(Result, coordinates={"checkpoint": "labels", "x": "x", "y": "y"}):
    """Checkpoints seen from the final weights w_end; a difference is ``w_t - w_end`` over all parameters.

    Attributes:
        labels: (T,) of the checkpoints, in order.
        radius: (T,) distance from the final weights over that of the first checkpoint (polar r).
        angle: (T,) angle in radians between a checkpoint's difference and the first one's (polar theta); NaN where the
            difference is zero.
        coordinates: (T, 2) projections on the two principal directions, in units of weights.
        explained_variance: (2,) share of the squared distances that each direction holds.
        projection_error: (T,) distance from the plane over distance from the final weights, 0 to 1; 0 where it is below
            sqrt(8 eps) of the type of the weights, 1e-3 in float32, which rounding of the plane's directions can make.
        nll: (T,) mean cross entropy (nats) of each checkpoint itself, with its own buffers.
        in_plane_nll: (T,) that of its projection on the plane, with the final model's buffers.
        accuracy: (T,) of each checkpoint itself.
        in_plane_accuracy: (T,) of its projection.
        straightness: The first checkpoint's distance over the length of the way through all; 1 for a straight way.
        x: (n_x,) coordinates of the surface along the first direction, in units of weights; empty without one.
        y: (n_y,) along the second.
        plane_nll: (n_x, n_y) nll over the plane, first index x.
        plane_accuracy: (n_x, n_y) accuracy over the plane.
        n_nonfinite: The number of measured points whose nll is NaN or infinite.
        batchnorm: Whether the model has running statistics, which are the final model's everywhere in the plane.
        card: The objective card.
    """

    labels: tuple[str, ...]
    radius: np.ndarray
    angle: np.ndarray
    coordinates: np.ndarray
    explained_variance: np.ndarray
    projection_error: np.ndarray
    nll: np.ndarray
    in_plane_nll: np.ndarray
    accuracy: np.ndarray
    in_plane_accuracy: np.ndarray
    straightness: float
    x: np.ndarray
    y: np.ndarray
    plane_nll: np.ndarray
    plane_accuracy: np.ndarray
    n_nonfinite: int
    batchnorm: bool = False
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return how far the plane can be trusted, and how straight the way is."""
        gap = np.abs(self.nll - self.in_plane_nll)
        return {
            "explained_variance": float(self.explained_variance.sum()),
            "largest_projection_error": float(self.projection_error.max()),
            "largest_nll_gap": float(gap.max()),
            "straightness": self.straightness,
            "nonfinite_points": float(self.n_nonfinite),
        }


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return two evaluations for each checkpoint, as it was saved and projected, and those of the grid."""
    n_checkpoints = len(options["labels"] or ()) or workload.input_size(options, "checkpoints")
    if not n_checkpoints:
        raise UnknownCost("it depends on the number of checkpoints")
    n = int(options["n"])
    n_grid = n**2
    works = [
        evaluations(workload, options, Count.exactly(2 * n_checkpoints)),
        evaluations(workload, options, Count.exactly(n_grid), n_in_row=max(n, 1)),
        *guard_checks(workload, moves_weights=True),
    ]
    # nine numbers of a checkpoint, the two shares, the sides and both surfaces; differences, axes and the weights to go back to
    return MeasureCost(
        works,
        held_bytes=(n_checkpoints + 3.0) * workload.parameter_bytes,
        result_bytes=ENTRY * (9 * n_checkpoints + 2 + 2 * n + 2 * n_grid),
    )


@declares_cost(_cost)
@record_options
def trajectory(
    probe: Probe,
    *,
    checkpoints: RunCheckpoints,
    labels: Sequence[str] | None = None,
    n: IntAboveOneOrNone = 0,
    margin: NonNegativeFloat = 0.2,
    seed: Seed = 0,
    bn: BatchNormPolicy = "eval",
    dtype: DtypeName | torch.dtype | None = None,
    partial: ResumableRows | None = None,
) -> TrajectoryResult:
    """Describe the path from the first checkpoint to the model, and measure its points and their plane.

    The polar form is Fig 1b of Park & Kim (ICLR 2022): ``r = |w_t - w_end| / |w_first - w_end|`` and theta, the angle
    between ``w_t - w_end`` and ``w_first - w_end``. **The paper's author asked readers to ignore that figure.** It keeps two
    numbers of a way through millions of dimensions and no measure of what is lost; near the end theta is the direction of
    the last few steps, mostly noise; and checkpoints with equal (r, theta) may be far apart. The principal plane is safer
    because it states its own error: the share of the squared distances that it holds, how far each checkpoint lies off
    it, and each checkpoint's loss beside the loss of its projection. Where those differ, the path on the contours is not the
    path that was taken.

    The plane passes through the final weights; its directions are the first two right singular vectors of the differences
    (Li et al., NeurIPS 2018, section 7). With fewer than two independent differences the second is random and orthogonal.
    Memory: the model and one set of weights for each checkpoint.

    Args:
        probe: The final model and its frozen batches.
        checkpoints: Pairs of a label and a state dict, in the order of training; the final weights may be among them.
        labels: Labels of the checkpoints to use; all by default.
        n: Points on a side of the surface behind the path; 0 for none.
        margin: Reach of the surface beyond the path, as a share of the path's extent.
        seed: Seed of a random second direction.
        bn: ``eval``: a checkpoint's own running statistics, and the final model's in the plane; ``recalibrate``: recomputed at
            every point.
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        partial: Finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: No checkpoint, one of another model, or none that differs from the final weights.
    """
    if n < 0 or n == 1 or margin < 0:
        raise ValueError(f"Expected n of 0 or at least 2 and a margin of at least 0, received n={n}, margin={margin}.")
    kind = parse_float_dtype(dtype)
    check_movable(probe)
    parameters = dict(probe.model.named_parameters())
    names, differences = [], []
    for label, state in select_checkpoints(checkpoints, labels):
        names.append(label)
        differences.append(difference(state, parameters, label))
    products = gram(differences)
    if products[0, 0] == 0:
        raise ValueError(f"Expected a first checkpoint that differs from the model, received {names[0]!r}.")
    first, second, squares = _plane(differences, parameters, canonical_names(probe.model), seed)
    coordinates = np.array([[inner(d, first), inner(d, second)] for d in differences])
    radius, angle = _polar(products)
    rows = checkpoint_rows(probe, names, checkpoints, kind, bn, partial)
    sides = _sides(coordinates, n, margin)
    grid = [(float(a), float(b)) for a in sides[0] for b in sides[1]]
    places = [(float(a), float(b)) for a, b in coordinates]
    plane = plane_rows(
        probe, first, second, [*places, *grid], dtype=kind, bn=bn, partial=partial,
        row_prefix="plane ", description="trajectory's plane",
    )  # fmt: skip
    projected, surface = plane[: len(places)], plane[len(places) :]
    facts = {"labels": names, "n": n, "margin": margin, "seed": seed}
    return TrajectoryResult(
        labels=tuple(names),
        radius=radius,
        angle=angle,
        coordinates=coordinates,
        explained_variance=np.pad(squares[:2], (0, max(0, 2 - len(squares)))) / squares.sum(),
        projection_error=_off_plane(products, coordinates, max(torch.finfo(d.dtype).eps for d in first.values())),
        nll=_column(rows, "nll"),
        in_plane_nll=_column(projected, "nll"),
        accuracy=_column(rows, "accuracy"),
        in_plane_accuracy=_column(projected, "accuracy"),
        straightness=_straightness(products),
        x=sides[0],
        y=sides[1],
        plane_nll=_column(surface, "nll").reshape(n, n),  # (n * n,) to (n, n), first index x
        plane_accuracy=_column(surface, "accuracy").reshape(n, n),
        batchnorm=any(getattr(m, "running_mean", None) is not None for m in probe.model.modules()),
        n_nonfinite=int(sum(not np.isfinite(row["nll"]) for row in [*rows, *plane])),
        card=probe.card(bn_policy=bn, solver=facts, dtype=evaluation_dtype(probe, kind)),
    )


def _plane(
    differences: Sequence[Direction], parameters: Mapping[str, Tensor], names: Mapping[str, str], seed: int
) -> tuple[Direction, Direction, np.ndarray]:
    components, squares = principal_directions(differences)
    if len(components) == 1:
        filler = orthogonalize(random_direction(parameters, seed, names=names), components[0])
        components.append(scale(filler, 1 / norm(filler)))
    return components[0], components[1], squares


def _polar(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore"):  # the final weights themselves
        cosines = products[0] / (lengths[0] * lengths)
    return lengths / lengths[0], np.arccos(np.clip(cosines, -1, 1))


def _off_plane(products: np.ndarray, coordinates: np.ndarray, eps: float) -> np.ndarray:
    squares = np.diag(products)
    squared_distance = np.maximum(squares - (coordinates**2).sum(axis=1), 0.0)
    # directions are rounded to the type of the weights: below some eps of the square the difference is rounding
    share = np.divide(squared_distance, squares, out=np.zeros_like(squared_distance), where=squares > 0)
    return np.sqrt(np.where(share < 8 * eps, 0.0, share))


def _straightness(products: np.ndarray) -> float:
    """Return the first distance over the length of the polygon through all checkpoints to the final weights."""
    squares = np.diag(products)
    steps = squares[:-1] + squares[1:] - 2 * np.diag(products, 1)
    return float(np.sqrt(squares[0]) / (np.sqrt(np.maximum(steps, 0.0)).sum() + np.sqrt(squares[-1])))


def _sides(coordinates: np.ndarray, n: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Return both coordinates of the surface: the path and the final weights, with a margin of the longer extent."""
    low, high = np.minimum(coordinates.min(axis=0), 0.0), np.maximum(coordinates.max(axis=0), 0.0)
    border = margin * (high - low).max()
    x, y = (np.linspace(low[axis] - border, high[axis] + border, n) for axis in (0, 1))
    return x, y


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], dtype=np.float64)
