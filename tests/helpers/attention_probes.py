"""Probes of small networks with attention that differs between positions."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs


def filled(model: nn.Module, std: float = 0.3) -> Any:
    """Give a model large weights: attention of a new one is nearly equal everywhere."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.double().eval()


def vit(**options: Any) -> Any:
    return VisionTransformer(16, 4, **{"num_classes": 3, "embed_dim": 12, "depth": 2, "num_heads": 3, **options})


def images(side: int, n: int = 4) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def probe_of(model: nn.Module, x: Tensor, size: int = 2, **about: Any) -> vs.Probe:
    y = torch.zeros(len(x), dtype=torch.long)
    return vs.Probe(model, list(zip(x.split(size), y.split(size))), about=about)
