"""Evaluation of a model at moved weights, and the checkpoints that a path through weight space visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.evaluation import Evaluation, RunningEvaluation, evaluate
from vitscope.core.guard.input_checks import check_weights
from vitscope.core.guard.probe_guard import refuse_unfit_weights
from vitscope.core.probe import Batch, Probe
from vitscope.core.sharding.sharded_parameters import is_sharded
from vitscope.core.undefined_values import warn_nulls
from vitscope.runtime import stop_flag
from vitscope.runtime.torch_internals import BatchNormBase

#: a label and the weights by name, as a state dict has them
Checkpoint = tuple[str, Mapping[str, Tensor]]
Checkpoints = Sequence[Checkpoint]

BatchNormPolicy = Literal["eval", "recalibrate"]
BN_POLICIES = get_args(BatchNormPolicy)
_HALF = (torch.bfloat16, torch.float16)

#: points that share a pass over batches which are decoded each time; an interruption loses at most so many
MOST_POINTS_A_PASS = 16


def select_checkpoints(checkpoints: Checkpoints | None, labels: Sequence[str] | None = None) -> Iterator[Checkpoint]:
    """Yield the checkpoints of those labels, in the labels' order and one at a time; all of them for None.

    Raises:
        ValueError: No checkpoint at all, or a label that none has.
    """
    if checkpoints is None or len(checkpoints) == 0:
        raise ValueError("Expected checkpoints (pairs of a label and a state dict), received none.")
    if labels is None:
        yield from checkpoints
        return
    # a lazy sequence has its labels at hand; asking for each item would read every file
    all_labels = list(getattr(checkpoints, "labels", None) or [label for label, _ in checkpoints])
    for label in labels:
        if label not in all_labels:
            raise ValueError(f"Expected one of the checkpoints {', '.join(all_labels)}, received {label!r}.")
        yield checkpoints[all_labels.index(label)]


def check_movable(probe: Probe) -> None:
    """Raise where the probe's weights cannot be moved or are not finite: before directions are made from them.

    Raises:
        NumericalError: Weights that are not finite.
        ValueError: Weights that are quantized, sparse, made in inference mode or without storage.
    """
    if is_sharded(probe.model):
        raise ValueError(
            "Expected whole weights to move, received weights that are sharded over ranks (fully_shard): measure its checkpoint, "
            "or a model with full_tensor() weights."
        )
    check_weights(probe.model)
    refuse_unfit_weights(probe.model, differentiated=True)


@contextmanager
def guarded_evaluation(
    probe: Probe, *, dtype: torch.dtype | None = None, bn: str = "eval"
) -> Iterator[tuple[nn.Module, WeightEvaluation]]:
    """Yield the guarded model and what measures it: called, with the weights that it has; with `WeightEvaluation.at`, at others.

    Both return nll, accuracy and ece over all batches of the probe (not this rank's share alone: ranks share out points, not
    batches), and poll for termination at each batch.

    Args:
        probe: The model, batches and objective.
        dtype: float64 and float32 cast the model for the time inside; bfloat16 and float16 keep its weights and run the forward
            passes under autocast. Weights in half precision become float32 in any case: they could not move by a share of
            themselves below 0.4 %.
        bn: ``eval`` uses BatchNorm's running statistics; ``recalibrate`` recomputes them at each call, as the average over
            the probe's batches of each batch's statistics.

    Raises:
        ValueError: An unknown BatchNorm policy.
    """
    if bn not in BN_POLICIES:
        raise ValueError(f"Expected bn to be one of {', '.join(BN_POLICIES)}, received {bn!r}.")
    half = dtype in _HALF
    weight_dtype = None if half else dtype
    if weight_dtype is None and probe.dtype in _HALF:
        weight_dtype = torch.float32
    with probe.guard(dtype=weight_dtype, moves_weights=True) as model:
        try:
            yield model, WeightEvaluation(probe, model, dtype if half else None, bn)
        finally:
            if half:
                torch.clear_autocast_cache()


def evaluation_dtype(probe: Probe, dtype: torch.dtype | None) -> str:
    """Return the name of the type in which `guarded_evaluation` runs forward passes, as a card states it."""
    weight_dtype = torch.float32 if probe.dtype in _HALF else probe.dtype
    return str(dtype or weight_dtype).removeprefix("torch.")


class WeightEvaluation:
    """Evaluation of a guarded model with the weights that it has, see `guarded_evaluation`.

    Args:
        probe: The probe, whose batches and objective are evaluated.
        model: The guarded model.
        autocast: Reduced precision of the forward passes; None for the model's own.
        bn: One of `BN_POLICIES`.
    """

    def __init__(self, probe: Probe, model: nn.Module, autocast: torch.dtype | None, bn: str) -> None:
        self._probe, self._model, self._autocast_dtype, self._bn = probe, model, autocast, bn
        self._warn_of_undefined = _OneWarning()

    def __call__(self) -> dict[str, float]:
        """Return nll, accuracy and ece with the model's current weights."""
        with self._autocast():
            if self._bn == "recalibrate":
                recalibrate(self._model, self._batches())
            evaluation = evaluate(self._model, self._batches(), self._probe.objective, reduce=False)
        return self._row(evaluation)

    @property
    def group_size(self) -> int:
        """Number of points that `at` should be given at once: several where each pass would decode the images again, else 1."""
        is_read_again = getattr(self._probe.batches, "is_read_again", False)
        return MOST_POINTS_A_PASS if is_read_again and self._bn == "eval" else 1

    @torch.no_grad()
    def at(self, moves: Sequence[Callable[[], None]]) -> list[dict[str, float]]:
        """Return nll, accuracy and ece at several points, bit for bit those of one call a point.

        With one pass over the batches: each stays while the weights change, and each point's sums are added in the order of
        batches. Recalibrated BatchNorm, whose statistics are needed before the first batch is evaluated, takes passes of its own.

        Args:
            moves: Functions that set the weights of the points.
        """
        if len(moves) == 1 or self._bn != "eval":
            return [self._moved(move) for move in moves]
        sums = [RunningEvaluation(self._probe.objective) for _ in moves]
        for x, y in self._batches():
            for move, point in zip(moves, sums):
                move()
                with self._autocast():
                    outputs = self._model(x)
                    point.add(outputs, y)
        return [self._row(point.result(reduce=False)) for point in sums]

    def _moved(self, move: Callable[[], None]) -> dict[str, float]:
        move()
        return self()

    def _batches(self) -> Iterator[Batch]:
        for batch in self._probe.iter_batches():
            stop_flag.check()
            yield batch

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        half = self._autocast_dtype is not None
        if half:  # autocast keeps cast weights until its outermost context ends, which may be the caller's
            torch.clear_autocast_cache()
        with torch.autocast(self._probe.device.type, dtype=self._autocast_dtype, enabled=half):
            yield

    def _row(self, evaluation: Evaluation) -> dict[str, float]:
        self._warn_of_undefined(self._probe, evaluation)
        return {"nll": evaluation.nll, "accuracy": evaluation.accuracy, "ece": evaluation.ece}


class _OneWarning:
    """Warns once of numbers that the probe's loss leaves undefined."""

    def __init__(self) -> None:
        self._is_given = False

    def __call__(self, probe: Probe, evaluation: Evaluation) -> None:
        if self._is_given or probe.objective.loss == "cross_entropy":
            return
        self._is_given = True
        reasons = {"ece": "outputs are no logits of one class per image"}
        if np.isnan(evaluation.accuracy) and np.isfinite(evaluation.nll):
            reasons["accuracy"] = "targets are no classes"
        warn_nulls(f"evaluation under {probe.card().loss}", reasons)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterator[Batch]) -> None:
    """Replace BatchNorm's running statistics by their average over ``batches`` (means, and unbiased variances).

    Modes and momenta are put back; the statistics stay. A model without BatchNorm is left alone.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.track_running_stats]
    if not norms:
        return
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.training = True  # of this layer alone: a dropout that it holds stays off
        for x, _ in batches:
            model(x)
    finally:
        for norm, momentum, training in before:
            norm.momentum = momentum
            norm.training = training
