"""Sums of a feature map and of its squares, which several measures of one pass need: each is computed once for a map."""

from __future__ import annotations

import torch
from torch import Tensor

from vitscope.core.shared_values.sharing import computed_once


@computed_once
def flat_map(x: Tensor) -> Tensor:
    """Return maps ``(B, C, h, w)`` as ``(B, C, n)`` in single precision at least."""
    return (x if x.dtype == torch.float64 else x.float()).flatten(2)


@computed_once
def squared_map(x: Tensor) -> Tensor:
    """Return the squares ``(B, C, n)`` of maps ``(B, C, h, w)``."""
    return flat_map(x).square()


@computed_once
def token_squares(x: Tensor) -> Tensor:
    """Return the squared norm of each position of maps ``(B, C, h, w)``: ``(B, n)``."""
    return squared_map(x).sum(1)


@computed_once
def channel_squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each channel of maps ``(B, C, h, w)`` over positions: ``(B, C)`` in float64."""
    flat = flat_map(x)
    if flat.stride(-1) == 1:
        return torch.linalg.vector_norm(flat, dim=-1).double().square()
    # over strided positions (channels last) the norm is eight times slower than square and sum
    return squared_map(x).sum(-1).double()


@computed_once
def channel_sums(x: Tensor) -> Tensor:
    """Return the sum of each channel of maps ``(B, C, h, w)``: ``(B, C)`` in float64, added up in single precision at least."""
    return flat_map(x).sum(-1).double()
