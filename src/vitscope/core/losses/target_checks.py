"""Check of the targets of one batch against the loss, before anything expensive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitscope.core.losses.targets import IGNORED_LABEL, are_indices

_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def as_indices(loss: str | Callable[..., Any], y: Tensor) -> Tensor:
    """Return class indices as int64, and any other targets as they are."""
    n_axes = y.ndim if loss == "dense_cross_entropy" else 1
    return y.long() if y.ndim == n_axes and y.dtype in _INTEGERS else y


def check_targets(loss: str | Callable[..., Any], index: int, n_images: int, y: Tensor) -> int:
    """Check the targets of one batch.

    Args:
        loss: The objective's.
        index: Number of the batch, for the error.
        n_images: Images in the batch.
        y: Targets of the batch, class indices as int64.

    Returns:
        The highest class index, -1 for other targets.

    Raises:
        ValueError: See `vitscope.core.guard.input_checks`.
    """
    received = f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
    if loss == "cross_entropy":
        expected = f"Expected class indices (B,) or soft targets (B, K) in batch {index}, received {received}"
        if y.ndim not in (1, 2):
            raise ValueError(
                f"{expected}: give one class index per image, or use loss='dense_cross_entropy' for one per pixel."
            )
    else:
        expected = f"Expected targets of loss={loss!r} in batch {index}, received {received}"
    if not y.ndim or n_images != len(y):
        n_targets = len(y) if y.ndim else "a scalar"
        raise ValueError(f"Expected as many targets as images in batch {index}, received {n_images} and {n_targets}.")
    if callable(loss):
        return -1
    if loss == "dense_cross_entropy":
        return _check_dense(expected, index, y)
    if loss == "cross_entropy" and y.ndim == 2:
        _check_soft(expected, y)
        return -1
    if are_indices(y) or loss == "cross_entropy":
        return _check_indices(expected, index, y)
    _check_values(loss, expected, y)
    return -1


def _check_indices(expected: str, index: int, y: Tensor) -> int:
    if y.dtype not in _INTEGERS:
        fix = "y.long() if these are class indices" if y.is_floating_point() else "y.long() for classes 0 and 1"
        values = ", loss='mse' if they are values to predict" if y.is_floating_point() else ""
        raise ValueError(f"{expected}: use {fix}{values}.")
    if bool(((y < 0) & (y != IGNORED_LABEL)).any()):
        low = int(y[(y < 0) & (y != IGNORED_LABEL)].min())
        raise ValueError(
            f"Expected class indices of at least 0 in batch {index}, received {low}: number the classes from 0 (-100 leaves "
            "an image out of the loss)."
        )
    return int(y.max())


def _check_dense(expected: str, index: int, y: Tensor) -> int:
    if y.ndim < 2 or y.dtype not in _INTEGERS:
        fix = "y.argmax(1) of one-hot maps" if y.ndim > 1 else "loss='cross_entropy' takes one per image"
        raise ValueError(f"{expected}: give one class index per pixel (B, H, W); {fix}.")
    return _check_indices(expected, index, y.reshape(-1))


def _check_soft(expected: str, y: Tensor) -> None:
    """Check that rows are distributions: non-negative, with a sum of 1 to within the rounding of their type."""
    if y.shape[1] == 1:
        raise ValueError(f"{expected}: use y[:, 0].long() for class indices, or loss='mse' or 'bce' for values.")
    if not y.is_floating_point():
        raise ValueError(
            f"{expected}: one-hot targets become class indices by y.argmax(1), or soft targets by y.float(); several classes "
            "an image need loss='bce'."
        )
    others = "use loss='mse' for values to predict, or loss='bce' for several classes per image"
    if not bool((y >= 0).all()) or not bool(y.isfinite().all()):
        raise ValueError(
            f"{expected} with negative or infinite values or NaN: each row is a distribution, at least 0; {others}."
        )
    error = float((y.double().sum(1) - 1).abs().max())
    # entries rounded to their type a few times (softmax, mixing, smoothing), divided by a float32 sum of K terms
    if not error <= 8 * torch.finfo(y.dtype).eps + y.shape[1] * torch.finfo(torch.float32).eps:
        raise ValueError(
            f"{expected} whose rows sum to 1 with an error of {error:.2g}: divide each row by its sum; {others}."
        )


def _check_values(loss: str, expected: str, y: Tensor) -> None:
    if y.is_complex() or (loss == "mse" and y.dtype == torch.bool):
        raise ValueError(f"{expected}: give real numbers, y.float().")
    if not bool(y.isfinite().all()):
        raise ValueError(f"{expected} with infinite values or NaN: give finite ones.")
    if loss == "bce" and not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError(
            f"{expected} with values from {float(y.min()):.3g} to {float(y.max()):.3g}: give probabilities or 0 and 1, or use "
            "loss='mse' for values to predict."
        )
