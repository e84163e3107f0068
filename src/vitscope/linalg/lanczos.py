"""Lanczos with full reorthogonalization and thick restart.

Each step makes one product, orthogonalises it against the whole basis and extends the projection T = Q^T H Q. A Ritz pair
(theta, Q s) has residual r = |H Q s - theta Q s| = beta |s_last|, at no further product. When the basis is full the best Ritz
vectors are kept (Wu & Simon, SIAM J. Matrix Anal. Appl. 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.krylov_basis import Basis
from vitscope.linalg.missed_eigenvalues import KrylovPolynomial
from vitscope.linalg.ritz_values import Ritz
from vitscope.runtime.errors import NumericalError

Operator = Callable[[Tensor], Tensor | Sequence[Tensor]]

#: a remainder below the precision to this power, relative to the operator, is rounding (1e-5 in float32, 1e-11 in
#: float64): the basis spans an invariant subspace
BREAKDOWN = 0.7
#: rounding of a coefficient, in units of the precision
ROUNDING = 4.0
#: an error matrix with entries of at most a in three diagonals has a norm of at most three times a
DIAGONALS = 3.0


class Lanczos:
    """The process itself: a basis and the projection on it, extended by `step`.

    Args:
        product: ``v (size,) -> H v`` as one tensor or as pieces that, flattened and joined, make up ``(size,)``; None where
            products come from outside, to `absorb`.
        start: The first vector ``(size,)``, of any length; a zero one is replaced by a random one.
        capacity: Rows of memory; at most ``capacity - 1`` steps between two calls of `restart`.
        seed: Seed of the random vectors that continue after an invariant subspace.
        shift: A number that is added to every eigenvalue: the operator is H + shift I.
        memory: Memory of the basis; None for its own.

    Attributes:
        projection: (m, m) float64, T.
        coupling: (m,) of the basis' last row with the rows before it: what T's next column begins with.
        breakdowns: After how many products the basis spanned an invariant subspace and a random vector was taken.
        n_products: Products made.
        asymmetry: The largest difference seen between <p, H q> and <q, H p> of unit rows p and q, which is 0 in exact
            arithmetic: the rounding of products as it is.
    """

    def __init__(
        self,
        product: Operator | None,
        start: Tensor,
        capacity: int,
        seed: int = 0,
        shift: float = 0.0,
        memory: BasisBuffer | None = None,
    ) -> None:
        self.product, self.seed, self.shift = product, seed, shift
        self.basis = Basis(min(capacity, len(start) + 1), start, memory)
        self.projection = np.zeros((0, 0))
        self.coupling = np.zeros(0)
        self.n_products = 0
        self.breakdowns: list[int] = []
        self.asymmetry = 0.0
        eps = float(torch.finfo(start.dtype).eps)
        # bounds of the inner products of different unit rows: each step multiplies them by how much of a product it takes away,
        # and below the root of the precision T is as exact as with an orthonormal basis (Simon, Math. Comp. 42, 1984)
        self.inner, self.rounding, self.threshold = np.zeros((0, 0)), ROUNDING * eps, eps**0.5
        length = self.basis.write([start], 1.0, np.zeros(0))
        if not np.isfinite(length):
            raise ValueError("Expected a finite start vector, received one with NaN or infinity.")
        if length == 0.0:
            self._take_random()
        else:
            self.basis.accept(length)

    @property
    def full(self) -> bool:
        """Whether the basis has no space for another step."""
        return self.basis.count >= self.basis.capacity

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space."""
        return len(self.projection) == self.basis.size

    def step(self) -> None:
        """Make one product and add a row to the basis, a row and a column to T."""
        assert self.product is not None
        self.absorb(self.product(self.row))

    @property
    def row(self) -> Tensor:
        """The vector ``(size,)`` whose product is next, of any length."""
        return self.basis.row(self.basis.count - 1)

    def absorb(self, pieces: Tensor | Sequence[Tensor]) -> None:
        """Take the product with `row` and extend the basis and T."""
        basis = self.basis
        pieces, scale = self._received(pieces)
        c = basis.coefficients(pieces) * scale
        self._check(c)
        self.asymmetry = max(self.asymmetry, float(np.abs(c[:-1] - self.coupling).max(initial=0.0)))
        size = float(np.linalg.norm(c))
        length = basis.write(pieces, scale, c)
        del pieces
        diagonal = c[-1] + self.shift
        inner = self._bounds(c, length)
        if inner.max(initial=0.0) > self.threshold:
            c = basis.coefficients(None)
            diagonal += c[-1]
            length = basis.write(None, 1.0, c)
            inner = self._bounds(c, length)
        self._take_bounds(inner)
        self._grow(diagonal, length, size)

    def _bounds(self, c: np.ndarray, length: float) -> np.ndarray:
        """Return bounds of the new unit row's inner products with the rows it was orthogonalised against, ``(count,)``."""
        if len(self.inner) < len(c):
            self.inner = np.pad(self.inner, (0, len(c) - len(self.inner)))
        lost = np.abs(c) @ self.inner + self.rounding * float(np.linalg.norm(c))
        return self.rounding + lost / max(length, 1e-300)

    def _take_bounds(self, inner: np.ndarray) -> None:
        n = len(inner)
        grown = np.zeros((n + 1, n + 1))
        grown[:n, :n], grown[n, :n], grown[:n, n] = self.inner, inner, inner
        self.inner = grown

    def ritz(self) -> Ritz:
        """Return the eigenvalues of T, ascending, with residuals and the eigenvectors' coefficients."""
        values, vectors = np.linalg.eigh(self.projection)
        return Ritz(values, np.abs(self.coupling @ vectors), vectors)

    def resolution(self, ritz: Ritz) -> float:
        """Return the distance from zero within which rounding may have made a Ritz value's sign.

        Inner products of n entries, summed pairwise, are off by log2(n) units of the precision (Higham, Accuracy and Stability
        of Numerical Algorithms, section 4.2), relative to the operator's norm; products with a network's curvature by more,
        which `asymmetry` measures: eps |H| (1 + log2 n) + 3 asymmetry.
        """
        size, eps = self.basis.size, float(torch.finfo(self.basis.dtype).eps)
        norm = float(np.abs(ritz.values).max(initial=0.0))
        return eps * norm * (1.0 + float(np.log2(size))) + DIAGONALS * self.asymmetry

    def polynomial(self, ritz: Ritz) -> KrylovPolynomial:
        """Return the polynomial that makes the next basis vector from the first one, before any restart."""
        betas = np.append(np.diag(self.projection, -1), self.coupling[-1:])
        with np.errstate(divide="ignore"):
            return KrylovPolynomial(ritz.values, float(np.log(np.abs(betas)).sum()))

    def restart(self, keep: np.ndarray) -> None:
        """Compress the basis to the Ritz vectors numbered ``keep`` and the last row."""
        ritz = self.ritz()
        weights = np.abs(ritz.vectors[:, keep].T)
        self.basis.compress(ritz.vectors[:, keep].T)
        inner = weights @ self.inner[:-1, :-1] @ weights.T + self.rounding
        border = weights @ self.inner[:-1, -1]
        # a last row and column around (keep, keep)
        self.inner = np.block([[inner - np.diag(np.diag(inner)), border[:, None]], [border[None, :], np.zeros((1, 1))]])
        self.projection = np.diag(ritz.values[keep])
        self.coupling = self.coupling @ ritz.vectors[:, keep]

    def vectors(self, ritz: Ritz, selected: np.ndarray) -> Tensor:
        """Return the Ritz vectors numbered ``selected``, orthonormal rows ``(k, size)``, before another step is made."""
        return self.basis.combine(ritz.vectors[:, selected].T)

    def _received(self, pieces: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Return the product's pieces, flat, and the scale that makes it one with a unit vector."""
        self.n_products += 1
        pieces = [pieces] if isinstance(pieces, Tensor) else pieces
        # flattened once: second derivatives of convolutions come transposed
        return [piece.reshape(-1) for piece in pieces], float(self.basis.scales[self.basis.count - 1])

    def _check(self, coefficients: np.ndarray) -> None:
        if not np.isfinite(coefficients).all():
            raise NumericalError(
                "hessian",
                None,
                "a product is not finite",
                "check the weights for values that are not finite, or use float64",
            )

    def _grow(self, diagonal: float, length: float, scale: float) -> None:
        """Add T's next row and column, and the remainder of that length to the basis."""
        last = len(self.projection)
        grown = np.zeros((last + 1, last + 1))
        grown[:last, :last] = self.projection
        grown[last], grown[:, last] = [*self.coupling, diagonal], [*self.coupling, diagonal]
        self.projection = grown
        self._extend(length, max(scale, float(np.abs(grown).max())))

    def _extend(self, length: float, scale: float) -> None:
        """Accept the remainder as the next row, or take a random one where it is rounding."""
        self.coupling = np.zeros(len(self.projection))
        if self.exhausted:
            return
        if scale == 0.0 or length <= torch.finfo(self.basis.dtype).eps ** BREAKDOWN * scale:
            self.breakdowns.append(self.n_products)
            self._take_random()
            return
        self.coupling[-1] = length
        self.basis.accept(length)

    def _take_random(self) -> None:
        """Make a random vector orthogonal to the basis the next row."""
        generator = torch.Generator().manual_seed(self.seed + self.basis.count)
        self.basis.put(torch.randn(self.basis.size, generator=generator, dtype=torch.float32))
        length = 0.0
        for _ in range(2):
            length = self.basis.write(None, 1.0, self.basis.coefficients(None))
        self.basis.accept(length)
