"""Forms of targets: class indices, soft targets and values, and which of them count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: the class index of an image or pixel without a label, as `torch.nn.functional.cross_entropy` has it: it counts in no mean
IGNORED_LABEL = -100


def are_indices(y: Tensor) -> bool:
    """Return whether targets are one integer an image ``(B,)``."""
    return y.ndim == 1 and not y.is_floating_point() and y.dtype != torch.bool


def labeled(y: Tensor) -> Tensor:
    """Return which images' targets count ``(B,)``, booleans: every target, but class indices ``(B,)`` of ``IGNORED_LABEL``."""
    return y != IGNORED_LABEL if are_indices(y) else torch.ones(len(y), dtype=torch.bool, device=y.device)


def n_labeled(y: Tensor) -> int:
    """Return the number of images whose targets count: what a mean over images divides by."""
    return int(labeled(y).sum()) if are_indices(y) else len(y)


def hard_targets(y: Tensor) -> Tensor:
    """Return class indices ``(B,)``: ``y`` itself, or the most probable class of soft targets ``(B, C)``."""
    return y.argmax(dim=1) if y.ndim == 2 else y


def target_entropy(y: Tensor) -> Tensor:
    """Return the entropy in nats of each image's target ``(B,)``; 0 for class indices.

    It is the least value that the cross entropy on ``y`` can take.
    """
    if y.ndim == 1:
        return torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
    return torch.special.entr(y.double()).sum(dim=1)


def distributions(y: Tensor, n_classes: int, dtype: torch.dtype, smoothing: float) -> Tensor:
    """Return soft targets ``(B, n_classes)``: ``y`` itself, or one-hot class indices, smoothed; 0 for an image without a label.

    Args:
        y: Class indices ``(B,)`` or soft targets ``(B, n_classes)``.
        n_classes: Number of classes.
        dtype: Type of the result.
        smoothing: Share of the mass of an index target that is spread over all classes.
    """
    if y.ndim == 2:
        return y.to(dtype)
    counts = labeled(y)
    smoothed = F.one_hot(y.where(counts, 0), n_classes).to(dtype) * (1 - smoothing) + smoothing / n_classes
    return smoothed * counts[:, None]  # without a label: no mass at all


def values_for(outputs: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the values that ``outputs`` are compared with, of the outputs' shape.

    Class indices ``(B,)`` for outputs ``(B, K)`` become one-hot rows, smoothed; other targets have the outputs' shape already.

    Raises:
        ValueError: Shapes that differ, or smoothing of targets that are no class indices.
    """
    if are_indices(y) and outputs.ndim == 2 and outputs.shape[1] > 1 and len(y) == len(outputs):
        return distributions(y, outputs.shape[1], outputs.dtype, smoothing)
    if y.shape != outputs.shape:
        fix = "give targets of the outputs' shape"
        if y.ndim == 1 and outputs.shape == (len(y), 1):
            fix = "give y[:, None].float()"
        raise ValueError(
            f"Expected targets of the shape of the outputs {tuple(outputs.shape)}, received {tuple(y.shape)}: {fix}."
        )
    if smoothing > 0:
        raise ValueError(
            f"Expected class indices (B,) with label_smoothing={smoothing}, received values {tuple(y.shape)}: "
            "set label_smoothing=0."
        )
    return y.to(outputs.dtype)
