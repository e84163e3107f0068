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

from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.runtime import distributed

#: columns at once on a CPU: few enough for the cache, enough to hide the loop
CPU_BLOCK = 1 << 18
#: entries of several rows at once on a CPU
CPU_ENTRIES = 1 << 21
#: a matrix product sums its columns one after the other: this much fewer at once
GRAM_SHARE = 64
#: on a GPU sums are trees already, and each block is a kernel launch
GPU_BLOCK = 1 << 22


class Basis:
    """Rows ``(capacity, size)`` of which the first ``count`` are orthogonal; a row times its scale has length 1.

    Args:
        capacity: The most rows.
        like: A vector ``(size,)`` whose size, dtype and device are used.
        memory: Memory of the rows, which says which columns this rank holds; None for new memory with all columns.

    Attributes:
        rows: (capacity, columns of this rank) the memory; on a CPU pages are taken only when a row is first written.
        scales: (capacity,) one over each row's length.
        count: Rows in use.
        size: Columns of all ranks.
        capacity: The most rows.
        dtype: Type of the rows.
    """

    def __init__(self, capacity: int, like: Tensor, memory: BasisBuffer | None = None) -> None:
        self._memory = memory or BasisBuffer()
        self.size, self.capacity, self.dtype, self._device = len(like), capacity, like.dtype, like.device
        self._columns = self._memory.columns(self.size)
        self._padded = self._memory.rows(capacity, like)  # (capacity, share), the same share on all ranks
        self.rows = self._padded[:, : self._columns.stop - self._columns.start]
        self.scales = np.ones(capacity)
        self.count = 0
        self.block = GPU_BLOCK if self.rows.is_cuda else CPU_BLOCK

    def row(self, index: int) -> Tensor:
        """Return row ``index`` whole, ``(size,)``, on the vectors' device; its length is one over its scale."""
        return self._whole(self._padded[index])

    def put(self, vector: Tensor) -> None:
        """Copy ``vector (size,)`` to the row after those in use."""
        self.rows[self.count].copy_(vector[self._columns])

    def coefficients(self, pieces: Sequence[Tensor] | None, first: int = 0) -> np.ndarray:
        """Return the inner products of the unit rows from ``first`` on with a vector, float64.

        Args:
            pieces: What flattened and joined makes up the vector ``(size,)``; None: the row after those in use.
            first: Number of the first row.
        """
        total = torch.zeros(self.count - first, dtype=torch.float64, device=self.rows.device)
        at_once = self.block if self.rows.is_cuda else min(self.block, CPU_ENTRIES // max(1, self.count - first))
        for block, piece in self._blocks(pieces, at_once):
            rows = self.rows[first : self.count, block]
            total += torch.mv(rows, piece) if rows.is_cuda else (rows * piece).sum(1)
        return self._sum(total).cpu().numpy() * self.scales[first : self.count]

    def write(self, pieces: Sequence[Tensor] | None, factor: float, coefficients: np.ndarray, first: int = 0) -> float:
        """Write ``factor * vector - coefficients @ unit rows`` to the row after those in use; return its length.

        The row is in use from the next `accept` on. The vector is given as for `coefficients`; the unit rows are those from
        ``first`` on.
        """
        target, device = self.rows[self.count], self.rows.device
        c = torch.from_numpy(coefficients * self.scales[first : self.count]).to(device, self.dtype)
        square = torch.zeros((), dtype=torch.float64, device=device)
        for block, piece in self._blocks(pieces, self.block):
            out = target[block]
            if len(c):
                torch.addmv(piece, self.rows[first : self.count, block].T, c, beta=factor, alpha=-1, out=out)
            else:
                torch.mul(piece, factor, out=out)
            square += _inner(out, out)
        return float(self._sum(square).sqrt())

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
        return self._sum(total).cpu().numpy() * np.outer(scales, scales)

    def combine(self, weights: np.ndarray) -> Tensor:
        """Return ``weights (k, m) @ the first m unit rows``: new vectors ``(k, size)``, whole on every rank."""
        m = weights.shape[1]
        w = torch.from_numpy(weights * self.scales[:m]).to(self.rows)
        local = torch.empty(len(weights), self._padded.shape[1], dtype=self.dtype, device=self.rows.device)
        for start in range(0, self.rows.shape[1], self.block):
            block = slice(start, min(start + self.block, self.rows.shape[1]))
            local[:, block] = w @ self.rows[:m, block]
        if self._memory.n_shares == 1:
            return local.to(self._device)
        out = torch.empty(len(weights), self.size, dtype=self.dtype, device=self._device)
        for vector, part in zip(out, local):
            vector.copy_(self._whole(part))
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

    def _blocks(self, pieces: Sequence[Tensor] | None, at_once: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of this rank and that part of the vector, cut so that no block crosses a piece's border."""
        if pieces is None:
            vector, start = [self.rows[self.count]], 0
        else:
            vector, start = pieces, self._columns.start
        column, end = -start, self.rows.shape[1]  # in this rank's columns
        for piece in vector:
            flat = piece.reshape(-1)
            first, last = max(0, -column), min(len(flat), end - column)
            for begin in range(first, last, at_once):
                part = flat[begin : min(begin + at_once, last)]
                yield slice(column + begin, column + begin + len(part)), part.to(self.rows.device)
            column += len(flat)

    def _sum(self, total: Tensor) -> Tensor:
        """Return the sum over the ranks that hold the other columns, on the vectors' device, where all backends work."""
        return distributed.all_reduce_sum(total.to(self._device)) if self._memory.n_shares > 1 else total

    def _whole(self, part: Tensor) -> Tensor:
        """Return the whole vector ``(size,)`` of which ``part (share,)`` is this rank's."""
        part = part.to(self._device)
        return distributed.all_gather(part)[: self.size] if self._memory.n_shares > 1 else part


def norm(w: Tensor) -> float:
    """Return the Euclidean norm of ``w (size,)``, accumulated in float64 block by block."""
    return dot(w, w) ** 0.5


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two vectors ``(size,)``, accumulated in float64 block by block."""
    block = GPU_BLOCK if a.is_cuda else CPU_BLOCK
    return float(torch.stack([_inner(p, q) for p, q in zip(a.split(block), b.split(block))]).double().sum())


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) if a.is_cuda else (a * b).sum()  # summed pairwise, as `torch.dot` on a CPU is not
