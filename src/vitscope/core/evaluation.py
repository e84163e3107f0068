"""Loss, accuracy and calibration of a model over batches: what every other measure shares.

All sums are made in float64 over images, never over batches, so that batch sizes do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.objective import Objective, hard_targets, labeled
from vitscope.runtime import distributed

#: equal-width confidence bins of the expected calibration error
ECE_BINS = 10


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples that have a label: images, or pixels for dense targets.

    Attributes:
        nll: The objective's data term, mean over examples: for the cross entropy in nats, for other losses the loss itself.
        accuracy: Share of examples whose most probable class is the (most probable) target; NaN where logits are not finite, and
            for targets that are no classes (`Objective.right_counts`).
        ece: Expected calibration error, ten equal-width bins (a, b], see `confidence_bins`; NaN for other losses than the cross
            entropy of images.
        n_images: The number of examples with a label on all ranks.
        losses: (n_images,) each image's loss, where asked for; else empty. In batch order of this rank.
        correct: (n_images,) booleans, likewise; for other losses than the cross entropy shares in float64, NaN without classes.
    """

    nll: float
    accuracy: float
    ece: float
    n_images: int
    losses: np.ndarray
    correct: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """1 or 0 for each image ``(n_images,)``, right or wrong; NaN where the loss is not finite, which is no answer."""
        return np.where(np.isfinite(self.losses), self.correct.astype(np.float64), np.nan)


@torch.no_grad()
def evaluate(
    forward: Callable[[Any], Any],
    batches: Iterable[tuple[Inputs, Tensor]],
    objective: Objective | None = None,
    *,
    per_image: bool = False,
    reduce: bool = True,
    device: torch.device | None = None,
) -> Evaluation:
    """Evaluate ``forward`` on ``batches``.

    Args:
        forward: A model, or any function from images ``(B, C, H, W)`` to the outputs that the loss takes (logits ``(B, K)`` for
            the cross entropy); its mode is the caller's.
        batches: ``(x, y)`` pairs, ``y`` class indices (-100: no label, the image counts nowhere), soft targets, or what the
            loss takes.
        objective: Objective that gives the data term; plain cross entropy by default.
        per_image: Whether to also return the loss and correctness of each image that has a label.
        reduce: Under ``torch.distributed`` add the ranks' sums up (each rank then passes its own share of batches).
        device: The model's, for a rank without a batch of its own, whose zeros must lie where the others' sums do.

    Raises:
        ValueError: No image that has a label; ``per_image`` with a loss that gives a mean alone.
    """
    sums = RunningEvaluation(objective, per_image=per_image)
    with distributed.failing_together(reduce):
        for x, y in batches:
            sums.add(forward(x), y)
    return sums.result(reduce=reduce, device=device)


class RunningEvaluation:
    """Sums of an evaluation over batches, which are added in order.

    Args:
        objective: Objective that gives the data term; plain cross entropy by default.
        per_image: Whether to also keep the loss and correctness of each image that has a label.
    """

    def __init__(self, objective: Objective | None = None, *, per_image: bool = False) -> None:
        self._objective = objective or Objective()
        self._measure = _classified if self._objective.loss == "cross_entropy" else _measured
        self._per_image = per_image
        self._sums: Tensor | None = None
        self._losses: list[np.ndarray] = []
        self._correct: list[np.ndarray] = []

    @torch.no_grad()
    def add(self, outputs: Any, y: Tensor) -> None:
        """Add a batch's outputs and targets."""
        batch, image_losses, right = self._measure(self._objective, outputs, y, self._per_image)
        self._sums = batch if self._sums is None else self._sums + batch
        if self._per_image:
            self._losses.append(image_losses.cpu().numpy())
            self._correct.append(right.cpu().numpy())

    def result(self, *, reduce: bool = True, device: torch.device | None = None) -> Evaluation:
        """Return the means; see `evaluate` for the arguments.

        Raises:
            ValueError: No image that has a label.
        """
        sums = self._sums
        if sums is None:
            sums = torch.zeros(3 + 3 * ECE_BINS, dtype=torch.float64, device=device)
        totals = (distributed.all_reduce_sum(sums) if reduce else sums).cpu().numpy()
        if totals[0] == 0:
            raise ValueError("Expected at least one image with a label to evaluate, received none.")
        return Evaluation(
            nll=float(totals[1] / totals[0]),
            accuracy=float(totals[2] / totals[0]),
            ece=float(calibration_error(torch.from_numpy(totals[3:].reshape(3, ECE_BINS)))),
            n_images=int(totals[0]),
            losses=np.concatenate(self._losses) if self._losses else np.empty(0),
            correct=np.concatenate(self._correct) if self._correct else np.empty(0, dtype=bool),
        )


def _classified(objective: Objective, logits: Tensor, y: Tensor, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of `_batch_sums`, and loss and correctness of each labeled image, of a batch with one class per image."""
    counts = labeled(y)
    if not bool(counts.all()):
        logits, y = logits[counts], y[counts]
    loss = objective.data_loss(_full_precision(logits), y, "none")
    probabilities = logits.double().softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    right = predicted == hard_targets(y)
    # logits that are not finite have no most probable class: argmax would say the first one
    counted = right.double().masked_fill(confidence.isnan(), torch.nan)
    return _batch_sums(loss.double(), confidence, counted), loss.double(), right


def _measured(objective: Objective, outputs: Any, y: Tensor, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of a batch under another loss than the cross entropy; sums of confidence bins are 0."""
    outputs, counts = _full_precision(outputs), objective.example_counts(y)
    total = objective.data_loss(outputs, y, "sum").double()
    right = objective.right_counts(outputs, y)
    n_right = torch.full_like(total, torch.nan) if right is None else right.sum()
    head = torch.stack([counts.sum().double(), total, n_right])
    sums = torch.cat([head, head.new_zeros(3 * ECE_BINS)])
    if not per_image:
        return sums, head, head
    has_label = counts > 0
    losses = objective.data_loss(outputs, y, "none").double()
    shares = torch.full_like(losses, torch.nan) if right is None else right / counts
    return sums, losses[has_label], shares[has_label]


def _full_precision(outputs: Any) -> Any:
    half = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    return outputs.float() if half else outputs


def confidence_bins(confidence: Tensor, n_bins: int = ECE_BINS) -> Tensor:
    """Return the bin (0, 1/n], (1/n, 2/n], ..., (1 - 1/n, 1] of each confidence ``(B,)``, counted from 0; 0 is in the first.

    The edges are the floating-point numbers k / n, so that a confidence of 0.3 is on the edge 3/10. NaN goes to the last bin and
    shows in its sum.
    """
    return interval_of(confidence.double().nan_to_num(1.0), bin_edges(n_bins, confidence.device))


def bin_edges(n_bins: int, device: torch.device | None = None) -> Tensor:
    """Return the edges 0, 1 / n, ..., 1 of bins of equal width ``(n_bins + 1,)`` in float64."""
    return torch.arange(n_bins + 1, dtype=torch.float64, device=device) / n_bins


def interval_of(values: Tensor, edges: Tensor) -> Tensor:
    """Return the interval (edges[i], edges[i + 1]] of each value ``(B,)``, counted from 0; values outside are in the end ones."""
    return torch.bucketize(values, edges[1:-1])


def bin_sums(confidence: Tensor, right: Tensor, n_bins: int = ECE_BINS) -> Tensor:
    """Return images, confidence and right answers ``(3, n_bins)`` of each bin, from those of images ``(B,)`` in float64."""
    return sums_of_members(confidence_bins(confidence, n_bins), confidence.double(), right.double(), n_bins)


def sums_of_members(member: Tensor, confidence: Tensor, right: Tensor, n_bins: int) -> Tensor:
    """Return images, confidence and right answers ``(3, n_bins)`` of each bin in float64.

    Args:
        member: ``(B,)`` each image's bin, counted from 0.
        confidence: ``(B,)`` in float64.
        right: ``(B,)`` 1 or 0 in float64.
        n_bins: Number of bins.
    """
    if member.is_cuda:  # where bincount adds in an order that changes from call to call
        indicator = torch.nn.functional.one_hot(member, n_bins).double()  # (B, bins)
        return torch.stack([indicator.sum(0), confidence @ indicator, right @ indicator])
    # without images bincount returns integers
    sums = (torch.bincount(member, weights, n_bins).double() for weights in (None, confidence, right))
    return torch.stack(list(sums))


def calibration_error(sums: Tensor) -> Tensor:
    """Return the expected calibration error of the sums of `bin_sums`: the gap of each bin, averaged over images."""
    images, confidence, right = sums
    return (confidence - right).abs().sum() / images.sum()


def _batch_sums(loss: Tensor, confidence: Tensor, right: Tensor) -> Tensor:
    """Return [images, loss, right, then for each bin: images, confidence, right] as one float64 vector."""
    head = torch.stack([torch.full_like(loss.sum(), len(loss)), loss.sum(), right.sum()])
    return torch.cat([head, bin_sums(confidence, right).reshape(-1)])
