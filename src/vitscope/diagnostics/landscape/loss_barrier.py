"""The barrier between two sets of weights (Frankle et al., ICML 2020; Entezari et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows, RunCheckpoints
from vitscope.core.weight_space import BatchNormPolicy
from vitscope.diagnostics.landscape.linear_interpolation import linear_interpolation
from vitscope.runtime.dtypes import DtypeName
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class LossBarrierResult(Result, coordinates={"t": "t"}):
    """How far the straight way lies above the chord between its ends.

    Attributes:
        t: (n,) positions, 0 at the start and 1 at the end.
        nll: (n,) mean cross entropy in nats on the way.
        chord: (n,) ``(1 - t) * nll(0) + t * nll(1)``.
        accuracy: (n,) accuracy on the way.
        accuracy_chord: (n,) likewise for the accuracy.
        barrier: the largest ``nll - chord``, at least 0; infinite where a point of the way is not finite.
        t_barrier: where it is reached.
        accuracy_barrier: the largest ``accuracy_chord - accuracy``, at least 0.
        start: label of the weights at t = 0.
        end: label of the weights at t = 1.
        distance: Euclidean distance between the ends.
        n_nonfinite: the number of points whose nll is NaN or infinite.
        card: the objective card.
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
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return both barriers and where the loss's lies."""
        return {
            "barrier": self.barrier,
            "t_barrier": self.t_barrier,
            "accuracy_barrier": self.accuracy_barrier,
            "nonfinite_points": float(self.n_nonfinite),
        }


@record_options
def loss_barrier(
    probe: Probe,
    *,
    checkpoints: RunCheckpoints,
    start: str | None = None,
    end: str | None = None,
    n: PositiveInt = 21,
    bn: BatchNormPolicy = "eval",
    dtype: DtypeName | torch.dtype | None = None,
    partial: ResumableRows | None = None,
) -> LossBarrierResult:
    """Measure the largest excess of the loss over the chord between two checkpoints; see `linear_interpolation`.

    Networks with BatchNorm from independent runs show a barrier that is largely their statistics' doing: compare with
    ``bn="recalibrate"``.

    Args:
        probe: the model and its frozen batches.
        checkpoints: pairs of a label and a state dict.
        start: label of the weights at t = 0.
        end: label of the weights at t = 1, or ``model``.
        n: points, ends included.
        bn: ``eval`` or ``recalibrate``.
        dtype: ``bfloat16``, ``float64``, or None for the model's own.
        partial: finished points; new ones are stored as soon as they are measured.

    Raises:
        ValueError: as `linear_interpolation`.
    """
    way = linear_interpolation(
        probe, checkpoints=checkpoints, start=start, end=end, n=n, bn=bn, dtype=dtype, partial=partial
    )
    chord = (1 - way.t) * way.nll[0] + way.t * way.nll[-1]
    accuracy_chord = (1 - way.t) * way.accuracy[0] + way.t * way.accuracy[-1]
    with np.errstate(invalid="ignore"):  # an infinite end
        excess = np.where(np.isfinite(way.nll), way.nll - chord, np.inf)
    excess[[0, -1]] = np.where(np.isfinite(way.nll[[0, -1]]), 0.0, np.inf)  # free of rounding
    highest = int(np.nan_to_num(excess, nan=np.inf).argmax())
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
        card=way.card,
    )
