"""The barrier between two sets of weights (Frankle et al., ICML 2020; Entezari et al., ICLR 2022)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows, RunCheckpoints
from vitscope.core.weight_space import BatchNormPolicy
from vitscope.diagnostics.landscape._alignment import Alignment
from vitscope.diagnostics.landscape.linear_interpolation import (
    LinearInterpolationResult,
    linear_interpolation,
    path_cost,
)
from vitscope.runtime.dtypes import DtypeName
from vitscope.runtime.value_ranges import IntAboveOne


@dataclass(frozen=True)
class LossBarrierResult(Result, coordinates={"t": "t"}):
    """Excess of the loss on the straight way over the chord between its ends.

    Attributes:
        t: (n,) positions, 0 at the start and 1 at the end.
        nll: (n,) mean cross entropy in nats on the way.
        chord: (n,) ``(1 - t) * nll(0) + t * nll(1)``.
        accuracy: (n,) accuracy on the way.
        accuracy_chord: (n,) likewise for the accuracy.
        barrier: The largest ``nll - chord``, at least 0; infinite where a point of the way is not finite.
        t_barrier: Position at which it is reached.
        accuracy_barrier: The largest ``accuracy_chord - accuracy``, at least 0.
        start: Label of the weights at t = 0.
        end: Label of the weights at t = 1.
        distance: Euclidean distance between the ends.
        n_nonfinite: The number of points whose nll is NaN or infinite.
        alignment: Rule by which the start's units were matched to the end's: ``none``, ``weights`` or ``activations``.
        nll_unaligned: (n,) the nll on the way without alignment; NaN where there is no alignment.
        accuracy_unaligned: (n,) the accuracy there.
        barrier_unaligned: The barrier there.
        distance_unaligned: Euclidean distance between the ends there.
        card: The objective card.
    """

    t: np.ndarray
    nll: np.ndarray
    chord: np.ndarray
    accuracy: np.ndarray
    accuracy_chord: np.ndarray
    barrier: float
    t_barrier: float
    accuracy_barrier: float
    start: str
    end: str
    distance: float
    n_nonfinite: int
    alignment: str = "none"
    nll_unaligned: np.ndarray = field(default_factory=lambda: np.empty(0))
    accuracy_unaligned: np.ndarray = field(default_factory=lambda: np.empty(0))
    barrier_unaligned: float = float("nan")
    distance_unaligned: float = float("nan")
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return both barriers, where the loss's lies, and with alignment the loss's barrier without it."""
        unaligned = {"barrier_unaligned": self.barrier_unaligned} if self.alignment != "none" else {}
        return {
            **unaligned,
            "barrier": self.barrier,
            "t_barrier": self.t_barrier,
            "accuracy_barrier": self.accuracy_barrier,
            "nonfinite_points": float(self.n_nonfinite),
        }


@declares_cost(functools.partial(path_cost, n_curves=7))  # t, nll, accuracy, both chords, both curves without alignment
@record_options
def loss_barrier(
    probe: Probe,
    *,
    checkpoints: RunCheckpoints,
    start: str | None = None,
    end: str | None = None,
    n: IntAboveOne = 21,
    bn: BatchNormPolicy = "eval",
    alignment: Alignment = "none",
    dtype: DtypeName | torch.dtype | None = None,
    partial: ResumableRows | None = None,
) -> LossBarrierResult:
    """Measure the largest excess of the loss over the chord between two checkpoints; see `linear_interpolation`.

    Networks with BatchNorm from independent runs show a barrier that is largely their statistics' doing: compare with
    ``bn="recalibrate"``. Networks from independent runs also differ by permutations of their units, which leave the function as
    it is: ``alignment`` undoes them as far as it can be done by matching (Ainsworth et al., ICLR 2023), and the way without it is
    measured too. The result is an upper bound of the barrier modulo permutation: the matching is a local optimum.

    Args:
        probe: The model and its frozen batches.
        checkpoints: Pairs of a label and a state dict.
        start: Label of the weights at t = 0.
        end: Label of the weights at t = 1, or ``model``.
        n: Points, ends included.
        bn: ``eval`` or ``recalibrate``.
        alignment: ``none``, ``weights`` or ``activations``, see `linear_interpolation`.
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        partial: Finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: As `linear_interpolation`.
    """

    def along(alignment: Alignment) -> LinearInterpolationResult:
        return linear_interpolation(
            probe,
            checkpoints=checkpoints,
            start=start,
            end=end,
            n=n,
            bn=bn,
            alignment=alignment,
            dtype=dtype,
            partial=partial,
        )

    way = along(alignment)
    chord, excess = _excess(way)
    highest = int(np.nan_to_num(excess, nan=np.inf).argmax())
    accuracy_chord = (1 - way.t) * way.accuracy[0] + way.t * way.accuracy[-1]
    nans = np.full(n, np.nan)
    unaligned: dict[str, Any] = {"nll_unaligned": nans, "accuracy_unaligned": nans}
    if alignment != "none":
        plain = along("none")
        unaligned = {
            "nll_unaligned": plain.nll,
            "accuracy_unaligned": plain.accuracy,
            "barrier_unaligned": float(np.nan_to_num(_excess(plain)[1], nan=np.inf).max()),
            "distance_unaligned": plain.distance,
        }
    return LossBarrierResult(
        t=way.t,
        nll=way.nll,
        chord=chord,
        accuracy=way.accuracy,
        accuracy_chord=accuracy_chord,
        barrier=float(excess[highest]),
        t_barrier=float(way.t[highest]),
        accuracy_barrier=float(np.maximum(0.0, (accuracy_chord - way.accuracy).max())),  # NaN without accuracies
        start=way.start,
        end=way.end,
        distance=way.distance,
        n_nonfinite=way.n_nonfinite,
        alignment=alignment,
        **unaligned,
        card=way.card,
    )


def _excess(way: LinearInterpolationResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the chord and how far the nll lies above it, infinite where the nll is not finite."""
    chord = (1 - way.t) * way.nll[0] + way.t * way.nll[-1]
    with np.errstate(invalid="ignore"):  # an infinite end
        excess = np.where(np.isfinite(way.nll), way.nll - chord, np.inf)
    excess[[0, -1]] = np.where(np.isfinite(way.nll[[0, -1]]), 0.0, np.inf)  # free of rounding
    return chord, excess
