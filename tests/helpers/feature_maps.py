"""Maps that taps read in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitscope.core.tap import Tap
from vitscope.models.structure.taps import reading, taps


def maps(model: nn.Module, x: Tensor, found: list[Tap] | None = None) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    chosen = taps(model) if found is None else found
    with torch.no_grad(), reading(model, chosen, lambda i, tap, value: read.update({tap.name: value.clone()})):
        model(x)
    return read


def image(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, dtype=torch.float64)


def as_map(tokens: Tensor, prefix: int, h: int, w: int) -> Tensor:
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
