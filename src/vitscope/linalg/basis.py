"""An orthonormal basis in one block of memory, with blocked products that accumulate in float64.

A float32 dot product over 11 million entries is off by 1e-4 to 4e-4; here each block of columns is summed in the vectors'
precision and the blocks in float64, so the error is that of one block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: columns summed at once: few enough for an unbiased float32 sum, enough to hide the loop
CPU_BLOCK = 1 << 16
#: on a GPU sums are trees already, and each block is a kernel launch
GPU_BLOCK = 1 << 22


class Basis:
    """Rows ``(capacity, size)`` of which the first ``count`` are orthonormal.

    Attributes:
        rows: the memory; on a CPU pages are taken only when a row is first written.
        count: rows in use.
    """

    def __init__(self, capacity: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.empty(capacity, size, dtype=dtype, device=device)
        self.count = 0
        block = GPU_BLOCK if device.type == "cuda" else CPU_BLOCK
        self.blocks = [slice(a, min(a + block, size)) for a in range(0, size, block)]

    def append(self, w: Tensor, norm: float) -> None:
        """Add ``w / norm`` as the next row; ``w`` may be that row's own memory."""
        torch.mul(w, 1.0 / norm, out=self.rows[self.count])
        self.count += 1

    def coefficients(self, w: Tensor, rows: slice = slice(None)) -> np.ndarray:
        """Return the inner products of ``w (size,)`` with the rows in use, float64."""
        basis = self.rows[: self.count][rows]
        total = torch.zeros(len(basis), dtype=torch.float64, device=w.device)
        for block in self.blocks:
            total += basis[:, block] @ w[block]
        return total.cpu().numpy()

    def subtract(self, w: Tensor, coefficients: np.ndarray, rows: slice = slice(None)) -> float:
        """Take ``coefficients @ rows`` from ``w`` in place; return the norm of what is left."""
        basis = self.rows[: self.count][rows]
        c = torch.from_numpy(np.ascontiguousarray(coefficients)).to(w)
        square = torch.zeros((), dtype=torch.float64, device=w.device)
        for block in self.blocks:
            piece = w[block]
            piece.addmv_(basis[:, block].T, c, alpha=-1)
            square += torch.dot(piece, piece)
        return float(square.sqrt())

    def combine(self, weights: np.ndarray) -> Tensor:
        """Return ``weights (k, count) @ rows``: new vectors ``(k, size)``."""
        w = torch.from_numpy(np.ascontiguousarray(weights)).to(self.rows)
        out = torch.empty(len(weights), self.rows.shape[1], dtype=self.rows.dtype, device=self.rows.device)
        for block in self.blocks:
            torch.mm(w, self.rows[: self.count, block], out=out[:, block])
        return out

    def compress(self, weights: np.ndarray) -> None:
        """Replace the rows in use by ``weights (k, count) @ rows`` in place."""
        w = torch.from_numpy(np.ascontiguousarray(weights)).to(self.rows)
        for block in self.blocks:
            self.rows[: len(weights), block] = w @ self.rows[: self.count, block]
        self.count = len(weights)


def norm(w: Tensor, block: int = CPU_BLOCK) -> float:
    """Return the Euclidean norm of ``w (size,)``, blocks accumulated in float64."""
    if w.device.type == "cuda" or w.dtype == torch.float64:
        return float(w.double().norm())
    return float(sum(torch.dot(p, p).double() for p in w.split(block)) ** 0.5)
