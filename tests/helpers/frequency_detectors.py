"""A network that answers by the power in chosen frequency bins, with images and probes for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import vitscope as vs

PIXELS = {"mean": [0.0], "std": [1.0]}
SIZES = [(8, 8), (9, 9), (32, 32), (7, 12), (12, 9), (15, 4)]


class Detector(nn.Module):
    """Answers class 1 where the images hold power in given bins (and their mirror images) above ``threshold``."""

    def __init__(self, where: np.ndarray, threshold: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("where", torch.from_numpy(where))
        self.threshold = threshold

    def forward(self, x):
        power = (torch.fft.fft2(x).abs().square() * self.where).sum((1, 2, 3)) / x[0].numel()
        return torch.stack([torch.full_like(power, self.threshold), power], dim=1) * 1e9


def counted(model: nn.Module) -> list[int]:
    """Return a list that grows by one at every pass of the model."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def mirrored(h: int, w: int, *bins: tuple[int, int]) -> np.ndarray:
    where = np.zeros((h, w))
    for k, l in bins:
        where[k % h, l % w] = where[-k % h, -l % w] = 1
    return where


def flat(n: int, h: int, w: int) -> torch.Tensor:
    """Images of one gray each: no frequency but 0."""
    return torch.linspace(0.2, 0.8, n, dtype=torch.float64)[:, None, None, None].expand(n, 3, h, w).clone()


def probe_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None, batches: int = 2, **about) -> vs.Probe:
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    return vs.Probe(model, list(zip(x.chunk(batches), y.chunk(batches))), about=about or PIXELS)


def rho_of(h: int, w: int) -> np.ndarray:
    return np.maximum(2 * np.abs(np.fft.fftfreq(h))[:, None], 2 * np.abs(np.fft.fftfreq(w)))
