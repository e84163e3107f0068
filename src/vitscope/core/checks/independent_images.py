"""Check that the outputs for an image do not depend on the other images of its batch."""

from __future__ import annotations

import torch
from torch import nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.pass_comparison import compare_passes, output_tensors


@torch.no_grad()
def refuse_dependent_images(model: nn.Module, x: Inputs, n_part: int, what: str) -> None:
    """Check that a part of a batch has the outputs that it has in the batch, to half of the digits of their type.

    Args:
        model: The model inside a guard, in eval mode.
        x: Images (B, C, H, W), or the inputs of a batch.
        n_part: Images of the part, the first ones; nothing is checked where the batch has no more.
        what: What needs independent images, for the error.

    Raises:
        ValueError: The outputs differ, as with normalization by statistics of the batch, or experts of a limited capacity.
    """
    if n_part >= len(x):
        return
    whole, part = (output_tensors(model(images)) for images in (x, x[:n_part]))
    pairs = [(a[:n_part], b) for a, b in zip(whole, part) if a.ndim and len(a) == len(x) and len(b) == n_part]
    if not pairs:
        return
    difference, _ = compare_passes(model, [a for a, _ in pairs], [b for _, b in pairs], False, x)
    eps = max((torch.finfo(b.dtype).eps for _, b in pairs if b.is_floating_point()), default=0.0)
    if difference > eps**0.5:
        raise ValueError(
            f"Expected a network whose output for an image depends on that image alone for {what}, received one in which the "
            f"images of a batch influence each other: the outputs for {n_part} of {len(x)} images differ by {difference:.1g} of "
            "their size; leave out layers that use the whole batch."
        )
