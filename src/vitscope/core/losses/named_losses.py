"""The named losses beside the cross entropy: mean squared error, binary cross entropy, and the cross entropy of pixels.

A loss is a mean over examples, and PyTorch's ``reduction="mean"`` is its value on one batch:

- ``mse``: an image's loss is the mean over its outputs of ``(z - t)^2``.
- ``bce``: an image's loss is the mean over its outputs of ``softplus(z) - t z``, the binary cross entropy of ``sigmoid(z)``.
- ``dense_cross_entropy``: each labeled pixel is an example; its loss is the cross entropy of its logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.core.losses.targets import IGNORED_LABEL, are_indices, labeled, values_for

#: names that `vitscope.Objective` takes for ``loss``
LOSSES = ("cross_entropy", "mse", "bce", "dense_cross_entropy")

#: the losses of this module as a card states them
DESCRIPTIONS = {
    "mse": "mean squared error over outputs",
    "bce": "binary cross entropy over outputs",
    "dense_cross_entropy": "cross entropy of pixels",
}


def example_counts(loss: str, y: Tensor) -> Tensor:
    """Return the number of examples in each image's targets ``(B,)``: labeled pixels for dense targets, else 1 or 0."""
    if loss == "dense_cross_entropy":
        return (y != IGNORED_LABEL).flatten(1).sum(1)
    return labeled(y).long()


def image_sums(loss: str, outputs: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the sum of the losses of each image's examples ``(B,)``; 0 for an image without a label.

    Args:
        loss: One of `DESCRIPTIONS`.
        outputs: ``(B, ...)``; ``(B, C, ...)`` for dense targets.
        y: Targets of the outputs' shape; class indices ``(B,)`` for outputs ``(B, K)``; ``(B, ...)`` for dense targets.
        smoothing: Label smoothing of class indices.

    Raises:
        ValueError: Shapes that do not match.
    """
    if loss == "dense_cross_entropy":
        _check_dense(outputs, y)
        pixels = F.cross_entropy(outputs, y, label_smoothing=smoothing, reduction="none", ignore_index=IGNORED_LABEL)
        return pixels.flatten(1).sum(1)
    targets = values_for(outputs, y, smoothing)
    if loss == "mse":
        values = (outputs - targets).square()
    else:
        values = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    means = values.reshape(len(values), -1).mean(1)
    return torch.where(labeled(y), means, torch.zeros_like(means))


def right_counts(loss: str, outputs: Tensor, y: Tensor) -> Tensor | None:
    """Return how many of each image's examples are classified rightly ``(B,)`` in float64; None where there are no classes.

    An example is right where its largest output is that of its class, for dense targets and for class indices. Outputs that
    are not finite have no largest one: NaN.
    """
    if loss == "dense_cross_entropy":
        right = (outputs.argmax(1) == y).double().masked_fill(~outputs.isfinite().all(1), torch.nan)
        return right.where(y != IGNORED_LABEL, 0.0).flatten(1).sum(1)
    if not are_indices(y) or outputs.ndim != 2 or outputs.shape[1] < 2:
        return None
    right = (outputs.argmax(1) == y).double().masked_fill(~outputs.isfinite().all(1), torch.nan)
    return right.where(labeled(y), 0.0)


def _check_dense(outputs: Tensor, y: Tensor) -> None:
    if outputs.ndim < 3 or y.shape != (outputs.shape[0], *outputs.shape[2:]):
        raise ValueError(
            f"Expected outputs (B, C, H, W) and targets (B, H, W) with loss='dense_cross_entropy', received "
            f"{tuple(outputs.shape)} and {tuple(y.shape)}: resize one to the other, e.g. Probe(..., output=lambda out: "
            "F.interpolate(out.logits, size=(H, W), mode='bilinear')), or use loss='cross_entropy'."
        )
