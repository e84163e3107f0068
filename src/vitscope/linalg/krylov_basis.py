"""An orthogonal basis in one block of memory, with blocked products that accumulate in float64.

A float32 dot product over 11 million entries is off by 1e-4 to 4e-4, and BLAS' matrix-vector products over 65,536 still by 1e-5;
here each block of columns is multiplied and summed pairwise in the vectors' precision and the blocks in float64, which leaves
1e-7 at no more time. A step of Lanczos passes over the basis twice: once for the coefficients, once to subtract; rows keep their
length, and their scale is applied to coefficients instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

#: columns at once on a CPU: few enough for the cache, enough to hide the loop
CPU_BLOCK = 1 << 18
#: entries of several rows at once on a CPU
CPU_ENTRIES = 1 << 21
#: a matrix product sums its columns one after the other: this much fewer at once
GRAM_SHARE = 64
#: on a GPU sums are trees already, and each block is a kernel launch
GPU_BLOCK = 1 << 22


class BasisBuffer:
    """Memory that one basis after another uses: taking pages from the operating system costs as much as filling them."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def rows(self, capacity: int, like: Tensor) -> Tensor:
        """Return ``(capacity, size)``, of the size, dtype and device of ``like (size,)``; the rows given before are lost."""
        buffer, kind = self._kept, (len(like), like.dtype, like.device)
        if buffer is None or len(buffer) < capacity or (buffer.shape[1], buffer.dtype, buffer.device) != kind:
            self._kept = None  # freed before its successor is made
            self._kept = buffer = torch.empty(capacity, len(like), dtype=like.dtype, device=like.device)
        return buffer[:capacity]


class Basis:
    """Rows ``(capacity, size)`` of which the first ``count`` are orthogonal; a row times its scale has length 1.

    Args:
        capacity: the most rows.
        like: a vector ``(size,)`` whose size, dtype and device are used.
        memory: where the rows are; None for a new place.

    Attributes:
        rows: the memory; on a CPU pages are taken only when a row is first written.
        scales: (capacity,) one over each row's length.
        count: rows in use.
    """

    def __init__(self, capacity: int, like: Tensor, memory: BasisBuffer | None = None) -> None:
        self.rows = (memory or BasisBuffer()).rows(capacity, like)
        self.scales = np.ones(capacity)
        self.count = 0
        self.block = GPU_BLOCK if like.device.type == "cuda" else CPU_BLOCK

    def coefficients(self, pieces: Sequence[Tensor], first: int = 0) -> np.ndarray:
        """Return the inner products of the unit rows from ``first`` on with the vector that ``pieces`` make up, float64."""
        total = torch.zeros(self.count - first, dtype=torch.float64, device=self.rows.device)
        at_once = self.block if self.rows.is_cuda else min(self.block, CPU_ENTRIES // max(1, self.count - first))
        for block, piece in self._blocks(pieces, at_once):
            rows = self.rows[first : self.count, block]
            total += torch.mv(rows, piece) if rows.is_cuda else (rows * piece).sum(1)
        return total.cpu().numpy() * self.scales[first : self.count]

    def write(self, pieces: Sequence[Tensor], factor: float, coefficients: np.ndarray, first: int = 0) -> float:
        """Write ``factor * vector - coefficients @ unit rows`` to the row after those in use; return its length.

        The row is in use from the next `accept` on. ``pieces`` may be that row itself; the unit rows are those from ``first``
        on.
        """
        target, device = self.rows[self.count], self.rows.device
        c = torch.from_numpy(coefficients * self.scales[first : self.count]).to(device, self.rows.dtype)
        square = torch.zeros((), dtype=torch.float64, device=device)
        for block, piece in self._blocks(pieces, self.block):
            out = target[block]
            if len(c):
                torch.addmv(piece, self.rows[first : self.count, block].T, c, beta=factor, alpha=-1, out=out)
            else:
                torch.mul(piece, factor, out=out)
            square += _inner(out, out)
        return float(square.sqrt())

    def accept(self, length: float) -> None:
        """Take the row that `write` wrote, of that length, into the basis."""
        self.scales[self.count] = 1.0 / length
        self.count += 1

    def gram(self) -> np.ndarray:
        """Return the inner products ``(count, count)`` of the unit rows in use, float64."""
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.rows.device)
        step = self.block // GRAM_SHARE
        for start in range(0, self.rows.shape[1], step):
            part = self.rows[: self.count, start : start + step]
            total += part @ part.T
        scales = self.scales[: self.count]
        return total.cpu().numpy() * np.outer(scales, scales)

    def combine(self, weights: np.ndarray) -> Tensor:
        """Return ``weights (k, m) @ the first m unit rows``: new vectors ``(k, size)``."""
        m = weights.shape[1]
        w = torch.from_numpy(weights * self.scales[:m]).to(self.rows)
        out = torch.empty(len(weights), self.rows.shape[1], dtype=self.rows.dtype, device=self.rows.device)
        for start in range(0, out.shape[1], self.block):
            block = slice(start, start + self.block)
            out[:, block] = w @ self.rows[:m, block]
        return out

    def compress(self, weights: np.ndarray) -> None:
        """Replace all rows in use but the last by ``weights (k, count - 1) @ unit rows``; the last follows them."""
        before, after = self.count - 1, len(weights)
        w = torch.from_numpy(weights * self.scales[:before]).to(self.rows)
        for start in range(0, self.rows.shape[1], self.block):
            block = slice(start, start + self.block)
            self.rows[:after, block] = w @ self.rows[:before, block]
        self.rows[after] = self.rows[before]
        self.scales[:after], self.scales[after] = 1.0, self.scales[before]
        self.count = after + 1

    def _blocks(self, pieces: Sequence[Tensor], at_once: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns and that part of the vector, cut so that no block crosses a piece's border."""
        at = 0
        for piece in pieces:
            for part in piece.reshape(-1).split(at_once):
                yield slice(at, at + len(part)), part
                at += len(part)


def norm(w: Tensor) -> float:
    """Return the Euclidean norm of ``w (size,)``, accumulated in float64 block by block."""
    return dot(w, w) ** 0.5


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors ``(size,)``, accumulated in float64 block by block."""
    block = GPU_BLOCK if a.is_cuda else CPU_BLOCK
    return float(torch.stack([_inner(p, q) for p, q in zip(a.split(block), b.split(block))]).double().sum())


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) if a.is_cuda else (a * b).sum()  # summed pairwise, as `torch.dot` on a CPU is not
