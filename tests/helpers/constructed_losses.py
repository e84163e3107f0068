"""Losses whose gradient and Hessian are given by hand."""

from __future__ import annotations

import torch
from torch import nn


class Quartic(nn.Module):
    """Logits (u, -u) with u = w^T A w / 2 + g^T w + sum of c w^4: for label 1 the loss log(1 + exp(2 u)) has the gradient g
    and the Hessian A + g g^T / 2 at w = 0, whatever the image."""

    def __init__(self, a, gradient=0.0, quartic=0.0):
        super().__init__()
        self.register_buffer("a", torch.as_tensor(a, dtype=torch.float64))
        self.w = nn.Parameter(torch.zeros(len(a), dtype=torch.float64))
        self.gradient, self.quartic = torch.as_tensor(gradient, dtype=torch.float64), quartic

    def forward(self, x):
        u = (
            0.5 * self.w @ (torch.mv(self.get_buffer("a"), self.w))
            + (self.gradient * self.w).sum()
            + (self.quartic * self.w**4).sum()
        )
        return torch.stack([u, -u]).expand(len(x), 2)


def rotated(spectrum, seed=0):
    """Return a symmetric matrix with the given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return (q * torch.as_tensor(spectrum, dtype=torch.float64)) @ q.T
