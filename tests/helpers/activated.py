"""A network with an activation of the test's choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vitscope as vs


class Activated(nn.Module):
    """Two linear layers and an activation between them."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.last = nn.Linear(25, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x.flatten(1))))


def activated(activation: Any, dtype: torch.dtype = torch.float64) -> vs.Probe:
    """Return a probe of such a network with random weights, eight random images and labels of three classes."""
    torch.manual_seed(0)
    model = Activated(activation).double()
    x, y = torch.randn(8, 1, 5, 5, dtype=torch.float64), torch.randint(3, (8,))
    return vs.Probe(model.to(dtype), [(x.to(dtype), y)])
