"""Images in pixel space and their probes, for tests of attacks."""

from __future__ import annotations

import torch
from torch import nn

from vitscope import Probe

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def images(n: int = 24, margin: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return margin + (1 - 2 * margin) * torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return (pixels - mean) / std


def probe_of(model: nn.Module, pixels: torch.Tensor, size: int = 8, labels: torch.Tensor | None = None) -> Probe:
    y = torch.arange(len(pixels)) % 3 if labels is None else labels
    batches = list(zip(normalized(pixels).split(size), y.split(size)))
    return Probe(model, batches, about={"mean": MEAN, "std": STD})


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(96, 3)
    )
    return layers.double()
