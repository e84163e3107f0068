"""Count, mean and scatter matrix of feature vectors in double precision, from batches of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: columns of a scatter matrix that are computed at once
_STRIP = 256


class FeatureMoments:
    """Count, mean and scatter matrix of feature vectors, merged part by part (Chan et al. 1979): no cancellation.

    Vectors wait until they are as many as their channels: one large product costs less than many small ones, and fewer
    vectors than that have fewer eigenvalues to be found.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None
        self.eps = 0.0  # of the features' own dtype
        self._waiting: list[Tensor] = []

    def add(self, samples: Tensor) -> None:
        """Add feature vectors ``(n, C)``."""
        self.eps = torch.finfo(samples.dtype).eps
        self._waiting.append(samples.double())
        if sum(map(len, self._waiting)) >= samples.shape[1]:
            self.merge(*moments_of(torch.cat(self._waiting)))
            self._waiting.clear()

    def merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Add the moments of n other feature vectors."""
        if self.mean is None or self.scatter is None:
            self.n, self.mean, self.scatter = n, mean, scatter
            return
        total, difference = self.n + n, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(difference, difference) * (self.n * n / total)
        self.mean = self.mean + difference * (n / total)
        self.n = total

    def merge_waiting(self) -> None:
        """Merge the vectors that wait."""
        if self._waiting:
            self.merge(*moments_of(torch.cat(self._waiting)))
            self._waiting.clear()

    def state(self) -> tuple[int, np.ndarray | None, np.ndarray | None, np.ndarray | None, float]:
        """Return count, mean and scatter, the vectors that wait, and the rounding, as plain arrays."""
        waiting = torch.cat(self._waiting) if self._waiting else None
        mean, scatter, vectors = (None if t is None else t.cpu().numpy() for t in (self.mean, self.scatter, waiting))
        return self.n, mean, scatter, vectors, self.eps


def moments_of(samples: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return count, mean ``(C,)`` and scatter matrix ``(C, C)`` of feature vectors ``(n, C)``."""
    mean = samples.mean(dim=0)
    return len(samples), mean, _scatter(samples - mean)


def _scatter(centered: Tensor) -> Tensor:
    """Return ``centered.T @ centered`` of ``(n, C)``; of wide matrices only what lies right of the diagonal is computed."""
    channels = centered.shape[1]
    scatter = centered.new_empty(channels, channels)
    for start in range(0, channels, _STRIP):
        strip = centered[:, start : start + _STRIP].T @ centered[:, start:]
        scatter[start : start + _STRIP, start:] = strip
        scatter[start:, start : start + _STRIP] = strip.T
    return scatter
