"""Features of classes with different means."""

from __future__ import annotations

import numpy as np
import torch


def clusters(
    n: int, width: int, seed: int, n_classes: int = 4, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features ``(n, width)`` of classes with different means, and the classes."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(n_classes, width))
    labels = rng.integers(0, n_classes, n)
    return torch.from_numpy(centers[labels] + spread * rng.normal(size=(n, width))), torch.from_numpy(labels)
