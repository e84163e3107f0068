"""The loss along lines of weight space through a model: the one-dimensional case of `loss_landscape`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from vitscope.diagnostics.landscape._axes import Checkpoints, Source, direction
from vitscope.linalg.directions import OFFICIAL_IGNORE, Direction, difference, norm
from vitscope.linalg.plane import squared_norms, walked
from vitscope.points import Partial, Row, as_dtype, rows, standing
from vitscope.probe import ObjectiveCard, Probe


@dataclass(frozen=True)
class LossSliceResult:
    """What was found along ``w + x * d``, averaged over the directions d.

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
        directions: where they come from.
        normalization: of the directions.
        direction_norms: (n_directions,) Euclidean norms.
        n_nonfinite: the number of points, over all directions, whose nll is NaN or infinite.
        card: the objective card.
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
            return {"nonfinite_points": float(self.n_nonfinite)}
        lowest = int(np.where(finite, self.nll, np.inf).argmin())
        found = {
            "nll_minimum": float(self.nll[lowest]),
            "minimum_distance": float(abs(self.x[lowest])),
            "nonfinite_points": float(self.n_nonfinite),
        }
        center = int(np.abs(self.x).argmin())
        if self.x[center] == 0:
            found["nll_center"] = float(self.nll[center])
            found["nll_rise_at_ends"] = float((self.nll[0] + self.nll[-1]) / 2 - self.nll[center])
        return found


def loss_slice(
    probe: Probe,
    *,
    directions: str | Sequence[Any] = "random",
    normalization: str | None = None,
    ignore: str | Sequence[str] | None = None,
    span: float = 1.0,
    n: int = 21,
    n_directions: int = 1,
    seed: int = 0,
    bn: str = "eval",
    dtype: str | torch.dtype | None = None,
    preset: str | None = None,
    eigenvectors: Sequence[Any] | np.ndarray | str | PathLike[str] | None = None,
    checkpoints: Checkpoints | None = None,
    partial: Partial | None = None,
) -> LossSliceResult:
    """Measure a model along one or more lines through its weights, in place.

    The options are those of `loss_landscape`; direction number k is its direction number k under the same seed.

    Args:
        probe: the model, its frozen batches, and the objective whose factor scales the L2 curves.
        directions: where the lines lead.
        normalization: scaling of the directions.
        ignore: parameters that stay.
        span: half the length of the lines, in units of the directions.
        n: points on each line.
        n_directions: lines; from two on the mean nll has an interval.
        seed: of random directions.
        bn: ``eval`` or ``recalibrate``.
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        preset: ``official``.
        eigenvectors: for directions of that kind.
        checkpoints: for directions of that kind.
        partial: finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: an unknown option, too few points or directions, or directions that do not fit the model.
    """
    if preset is not None:
        if preset != "official":
            raise ValueError(f"Expected preset to be official, received {preset!r}.")
        directions, normalization, ignore = "random", "filter_official", OFFICIAL_IGNORE
    if n < 2 or n_directions < 1 or not 0 < span < float("inf"):
        raise ValueError(
            f"Expected n of at least 2, a direction and a positive span, received n={n}, n_directions={n_directions} "
            f"and span={span}."
        )
    kind = as_dtype(dtype)
    source = Source(directions, normalization, ignore, seed, eigenvectors, checkpoints)
    x = np.linspace(-span, span, n)
    found, lengths, half_sq, sum_norm = _all_lines(probe, source, x, n_directions, kind, bn, partial)
    nll, accuracy, ece = (
        np.array([[row[key] for row in line] for line in found]) for key in ("nll", "accuracy", "ece")
    )
    half_width = _half_width(nll)
    facts = {**source.facts(), "span": span, "n": n, "n_directions": n_directions, "preset": preset}
    return LossSliceResult(
        x=x,
        nll=nll.mean(axis=0),
        nll_low=nll.mean(axis=0) - half_width,
        nll_high=nll.mean(axis=0) + half_width,
        l2_half_sq=half_sq,
        l2_sum_norm=sum_norm,
        accuracy=accuracy.mean(axis=0),
        ece=ece.mean(axis=0),
        nll_by_direction=nll,
        accuracy_by_direction=accuracy,
        directions=source.kind,
        normalization=source.scaling,
        direction_norms=lengths,
        n_nonfinite=int((~np.isfinite(nll)).sum()),
        card=probe.card(bn_policy=bn, solver=facts, **({"dtype": str(kind).removeprefix("torch.")} if kind else {})),
    )


def _all_lines(
    probe: Probe,
    source: Source,
    x: np.ndarray,
    n_directions: int,
    dtype: torch.dtype | None,
    bn: str,
    partial: Partial | None,
) -> tuple[list[list[Row]], np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of each line, the directions' norms, and both L2 curves averaged over the lines."""
    differences: list[Direction] = []
    if source.kind in ("pca", "checkpoints"):
        differences = [difference(state, probe.parameters(), label) for label, state in source.checkpoints or ()]
    everything: dict[str, Tensor] = dict(probe.model.named_parameters())
    found, lengths, half_sq, sum_norm = [], [], [], []
    other: Direction | None = None
    for index in range(n_directions):
        d = direction(probe, source, index, differences, other)
        other = d if source.kind == "gradient" and index == 0 else other
        norms = squared_norms(everything, None, d)
        lengths.append(norm(d))
        half_sq.append(norms.half_sq(probe.objective.weight_decay, np.zeros(()), x))
        sum_norm.append(norms.sum_norm(probe.objective.weight_decay, np.zeros(()), x))
        found.append(_line(probe, d, index, x, dtype, bn, partial))
    return found, np.array(lengths), np.mean(half_sq, axis=0), np.mean(sum_norm, axis=0)


def _line(
    probe: Probe, d: Direction, index: int, x: np.ndarray, dtype: torch.dtype | None, bn: str, partial: Partial | None
) -> list[Row]:
    with standing(probe, dtype=dtype, bn=bn) as (_, here), walked(probe.parameters(), None, d) as move:

        def compute(point: float) -> Row:
            move(0.0, point)
            return here()

        def name(point: float) -> str:
            return f"direction {index}: {point!r}"

        points = [float(point) for point in x]
        return rows(points, compute, name=name, partial=partial, description=f"loss slice {index + 1}")


def _half_width(nll: np.ndarray) -> np.ndarray:
    """Return half the 95% t-interval of the mean over directions (n_directions, n); NaN with fewer than two."""
    count = len(nll)
    if count < 2:
        return np.full(nll.shape[1], np.nan)
    with np.errstate(invalid="ignore"):
        return stdtrit(count - 1, 0.975) * nll.std(axis=0, ddof=1) / np.sqrt(count)
