"""Gauss quadrature of an operator's spectrum from a random vector (stochastic Lanczos quadrature)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.curvature.start_vector import VectorSpace, random_signs
from vitscope.linalg.partial_reorthogonalization import SemiorthogonalLanczos
from vitscope.runtime.resumable_map import Row

#: random vectors below which there is no interval: one large eigenvalue makes the estimates as skewed as chi-square
LEAST_VECTORS = 20


class SymmetricOperator(VectorSpace, Protocol):
    """An operator as quadrature uses it: it is `unshifted` plus ``shift`` times the identity."""

    @property
    def shift(self) -> float:
        """The multiple of the identity that `unshifted` leaves out."""
        ...

    def unshifted(self, v: Tensor) -> Tensor | Sequence[Tensor]:
        """Return the product with ``v (size,)`` without the shift's, as one tensor or in pieces."""
        ...


def check_quadrature(n_vectors: int, n_steps: int, n_grid: int, sigma: float | None) -> None:
    """Check the options of a density.

    Raises:
        ValueError: Fewer than one vector, step or grid point, a ``sigma`` that is not positive.
    """
    for name, value in (("n_vectors", n_vectors), ("n_steps", n_steps), ("n_grid", n_grid)):
        if value < 1:
            raise ValueError(f"Expected {name} to be at least 1, received {value}.")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"Expected sigma to be positive or None, received {sigma}.")


def quadrature_rule(operator: SymmetricOperator, seed: int, n_steps: int, memory: BasisBuffer) -> Row:
    """Return the quadrature rule of the random sign vector of ``seed``.

    Raises:
        ValueError: The memory holds no ``n_steps + 1`` vectors.
        NumericalError: Products by differences that are not exact enough.
    """
    start = random_signs(operator, seed)
    memory.plan(start, n_steps + 1, n_steps + 1)
    process = SemiorthogonalLanczos(operator.unshifted, start, n_steps + 1, shift=operator.shift, memory=memory)
    for _ in range(n_steps):
        process.step()
    ritz = process.ritz()
    error = float(getattr(operator, "product_error", 0.0))  # operators of others state none
    row = {
        "nodes": ritz.values,
        "weights": ritz.vectors[0] ** 2,
        "residuals": ritz.residuals + error,
        "resolution": process.resolution(ritz) + error,
    }
    differences = getattr(operator, "differences", None)
    return row if differences is None else {**row, **differences.facts()}
