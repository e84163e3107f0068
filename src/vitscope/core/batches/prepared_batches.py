"""Batches as a probe gives them to a measure: on the model's device, in its dtype, counted."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import BatchInputs, tensors_of
from vitscope.core.objective import Objective

#: inputs and targets of one batch: images ``(B, C, H, W)``, or `BatchInputs` of more entries
Batch = tuple[Any, Tensor]


def prepare_batch(index: int, batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Return a batch whose floating-point tensors have a dtype, and that autograd may keep.

    Args:
        index: Number of the batch, for the error.
        batch: Inputs and targets.
        device: Device of the model.
        dtype: Floating-point type of the guard.

    Raises:
        ValueError: A tensor on another device.
    """
    x, y = batch
    for tensor in (*tensors_of(x), y):
        if tensor.device != device:
            raise ValueError(
                f"Expected batch {index} on the model's device {device}, received {tensor.device}: move it there first."
            )
    cast = partial(_cast, dtype=dtype)
    return (x.map(cast) if isinstance(x, BatchInputs) else cast(x)), cast(y)


def count_examples(
    sizes_and_targets: Iterable[tuple[int, Tensor]], objective: Objective
) -> tuple[tuple[int, ...], int]:
    """Return the images in each batch, and the examples with a label in all batches.

    Args:
        sizes_and_targets: Number of images and targets of each batch.
        objective: Objective that states which examples count.

    Raises:
        ValueError: No batch.
    """
    counts = [(size, objective.n_examples(y)) for size, y in sizes_and_targets]
    if not counts:
        raise ValueError("Expected at least one batch (x, y), received none.")
    return tuple(size for size, _ in counts), sum(labeled for _, labeled in counts)


def are_pairs(source: Any) -> bool:
    """Return whether batches are known to be pairs, without reading one of an iterable."""
    return type(source) in (list, tuple) and all(isinstance(batch, list | tuple) for batch in source)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_inference():  # made under inference mode: autograd may not save it
        tensor = tensor.clone()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
