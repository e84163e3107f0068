"""Lanczos that reorthogonalizes only when it must.

As long as no two rows of the basis have an inner product above the root of the precision, T equals a projection of the
operator on an orthonormal basis up to the precision itself (Simon, Math. Comp. 42, 1984), so that Ritz values have no ghost
copies. The inner products of a new row with the old ones follow a recurrence in the entries of T, which costs nothing; where it
passes the root, that row and the next are orthogonalised against the whole basis. Most steps then read two rows of it, not all.

T is the projection on the basis that a Cholesky factor of the rows' inner products makes orthonormal: Ritz vectors, and the
rows that a restart keeps, are combined of that one. From the first restart on every row is orthogonalised against all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.lanczos import Lanczos, Operator
from vitscope.linalg.ritz_values import Ritz
from vitscope.runtime.errors import NumericalError

#: orthogonalise against the whole basis where less than this share of a product is left by the last two rows
AGAIN = 0.1
#: assumed rounding of a product, in units of the precision, until the recurrence has observed one
PESSIMISM = 8.0
#: from then on it is to predict this many times the inner products that are seen, from no less rounding than that
CAUTION, LEAST = 4.0, 1 / 64


class SemiorthogonalLanczos(Lanczos):
    """A `Lanczos` process whose basis is orthonormal to the root of the precision.

    Args: as `Lanczos`.

    Attributes:
        noise: Rounding of a product relative to the operator, as far as seen.
        cleaned: Number of rows that were orthogonalised against the whole basis.
    """

    def __init__(self, product: Operator | None, start: Tensor, capacity: int, **options: Any) -> None:
        eps = float(torch.finfo(start.dtype).eps)
        self.noise, self.least, self.cleaned = PESSIMISM * eps, LEAST * eps, 0
        self._before, self._level = np.zeros(1), np.ones(1)  # inner products of the last two rows with all rows
        self._second, self._full = False, False
        super().__init__(product, start, capacity, **options)

    def restart(self, keep: np.ndarray) -> None:
        """Compress the basis to the Ritz vectors numbered ``keep`` and the last row, and keep it orthonormal from here on."""
        if self._full:
            return super().restart(keep)
        ritz = self.ritz()
        self.basis.compress(self._orthonormal(ritz.vectors[:, keep].T))
        self.basis.count -= 1
        for _ in range(2):  # the last row, which follows those kept
            length = self.basis.write(None, 1.0, self.basis.coefficients(None))
        self.basis.accept(length)
        self.projection, self.coupling = np.diag(ritz.values[keep]), self.coupling @ ritz.vectors[:, keep]
        n = len(keep) + 1
        self.inner, self._full = self.rounding * (1.0 - np.eye(n)), True

    def vectors(self, ritz: Ritz, selected: np.ndarray) -> Tensor:
        """Return the Ritz vectors numbered ``selected``, orthonormal rows ``(k, size)``, before another step is made."""
        weights = ritz.vectors[:, selected].T
        return self.basis.combine(weights if self._full else self._orthonormal(weights))

    def _orthonormal(self, weights: np.ndarray) -> np.ndarray:
        """Return which combinations of the rows are those of ``weights (k, m)`` of the first m rows made orthonormal."""
        m = weights.shape[1]
        try:
            lower = np.linalg.cholesky(self.basis.gram()[:m, :m])
        except np.linalg.LinAlgError as error:
            raise NumericalError("hessian", None, "Lanczos' vectors lost their independence", "use float64") from error
        return np.linalg.solve(lower.T, weights.T).T

    def absorb(self, pieces: Tensor | Sequence[Tensor]) -> None:
        """Take the product with `row`; orthogonalise against the last two rows, or all where the recurrence asks for it."""
        if self._full:
            return super().absorb(pieces)
        basis, last = self.basis, self.basis.count - 1
        pieces, scale = self._received(pieces)
        near = basis.coefficients(pieces, first=max(0, last - 1)) * scale
        self._check(near)
        size = float(np.linalg.norm(near))
        length = basis.write(pieces, scale, near, first=max(0, last - 1))
        del pieces
        diagonal = near[-1] + self.shift
        norm = max(size, float(np.abs(self.projection).max(initial=0.0)))
        if last > 0:
            explained = float(np.abs(self._level[:-1]).max())  # what the rows' own inner products explain
            difference = float(abs(near[0] - self.coupling[-1]))
            self.asymmetry = max(self.asymmetry, difference)
            self.noise = max(self.noise, difference / max(norm, 1e-300) - explained)
        level = self._predicted(diagonal, length, norm)
        is_due = self._second or bool(np.abs(level[:-1]).max() > self.threshold)
        if is_due or length < AGAIN * size:
            c = basis.coefficients(None)
            if is_due and not self._second and last > 0:
                self._learn(float(np.abs(c).max()) / max(length, 1e-300), float(np.abs(level[:-1]).max()))
            diagonal += c[-1]
            length = basis.write(None, 1.0, c)
            level[:-1] = self.noise
            self.cleaned += 1
            self._second = is_due and not self._second
        self._before, self._level = np.append(self._level, 0.0), level
        self._grow(diagonal, length, norm)

    def _learn(self, observed: float, predicted: float) -> None:
        """Scale the rounding that is assumed by how far the recurrence was off."""
        self.noise = min(self.threshold, max(self.least, self.noise * CAUTION * observed / predicted))

    def _predicted(self, diagonal: float, length: float, norm: float) -> np.ndarray:
        """Return estimates ``(count + 1,)`` of the new row's inner products with every row; the last one is its own, 1."""
        count = self.basis.count
        levels = np.ones(count + 1)
        rounding = self.noise * norm
        levels[count - 1] = rounding / max(length, 1e-300)
        if count > 1:
            level, old = self._level, slice(0, count - 1)
            diagonals, couplings = np.diag(self.projection), np.append(np.diag(self.projection, 1), self.coupling[-1])
            grown = couplings * level[1:] + (diagonals - diagonal) * level[old] - couplings[-1] * self._before[old]
            grown[1:] += couplings[:-1] * level[: count - 2]
            levels[old] = (grown + np.copysign(rounding, grown)) / max(length, 1e-300)
        return levels
