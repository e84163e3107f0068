"""Random images, probes with one tap, and receptive fields by one gradient an image in double precision."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import vitscope as vs


def images(n: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def probe_of(model: nn.Module, x: Tensor, batch: int = 4, tap: nn.Module | None = None) -> vs.Probe:
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(batch)]
    return vs.Probe(model, batches, taps=None if tap is None else [vs.Tap("last", "conv", 1, 1.0, tap)])


def oracle(model: nn.Module, module: nn.Module, x: Tensor) -> np.ndarray:
    """Return the mean field of a module's output ``(B, C, h, w)`` by one gradient an image of a copy in double precision."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
    total = np.zeros(x.shape[-2:])
    for image in x.double():
        leaf = image[None].requires_grad_()
        model(leaf)
        output = outputs.pop()
        output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
        assert leaf.grad is not None
        total += (leaf.grad[0] ** 2).sum(0).numpy()
    handle.remove()
    return total / total.sum()
