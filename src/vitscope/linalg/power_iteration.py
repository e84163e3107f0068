"""Power iteration with PyHessian's stopping rule, so that numbers published with it can be compared.

One eigenvector after the other: a random unit vector is multiplied, projected off the earlier vectors before each product,
and normalized; its Rayleigh quotient is the value. It stops when that changes by less than ``tol`` relative to the value
before (plus 1e-6), or after ``max_iterations``. A small change is no bound on the error: slow convergence looks like
convergence, and of two eigenvalues +a and -a it sees a mixture. The residuals say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.eigensolver import Eigenpairs
from vitscope.linalg.krylov_basis import dot, norm


def power_iteration(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    k: int,
    *,
    tol: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
) -> Eigenpairs:
    """Return the first ``k`` eigenvalues that power iteration with deflation finds, in the order found.

    Args:
        product: ``v -> H v``.
        like: A vector ``(size,)`` whose size, dtype and device are used.
        k: Number of eigenvalues.
        tol: Relative change at which to stop.
        max_iterations: Products for each eigenvalue at most.
        seed: Seed of the random vectors.

    Raises:
        ValueError: ``k`` not between 1 and the size.
    """
    if not 1 <= k <= len(like):
        raise ValueError(f"Expected between 1 and {len(like)} eigenvalues (the parameters analyzed), received k={k}.")
    generator = torch.Generator().manual_seed(seed)
    searches: list[_Search] = []
    for _ in range(k):
        v = torch.randn(len(like), generator=generator, dtype=torch.float32).to(like)
        # the next iterate is what PyHessian keeps for deflation, the value belongs to the one before
        eigenvectors = [search.next_vector for search in searches]
        searches.append(_search(product, v, eigenvectors, tol, max_iterations))
    # of products that are off by rounding, as inner products of that many entries are (see `Lanczos.resolution`)
    largest = max(abs(search.value) for search in searches)
    resolution = float(torch.finfo(like.dtype).eps) * largest * (1.0 + float(np.log2(len(like))))
    return Eigenpairs(
        values=np.array([search.value for search in searches]),
        residuals=np.maximum([search.residual for search in searches], resolution),
        errors=np.array([search.residual for search in searches]),
        converged=np.array([search.converged for search in searches]),
        n_products=sum(search.n_products for search in searches),
        vectors=torch.stack([search.vector for search in searches]),
        resolution=resolution,
    )


class _Search(NamedTuple):
    """The end of the iteration for one eigenvalue: its last iterate with the value, and the one that would follow."""

    value: float
    residual: float
    converged: bool
    vector: Tensor
    next_vector: Tensor
    n_products: int


def _search(
    product: Callable[[Tensor], Tensor], v: Tensor, eigenvectors: list[Tensor], tol: float, max_iterations: int
) -> _Search:
    """Iterate from ``v``, orthogonal to the eigenvectors before; arguments as of `power_iteration`."""
    search = _Search(0.0, np.inf, max_iterations < 1, v, v, 0)
    for iteration in range(max_iterations):
        v = _deflated(search.next_vector, eigenvectors)
        image = product(v)
        value, length = dot(image, v), norm(image)
        is_settled = iteration > 0 and abs(value - search.value) < tol * (abs(search.value) + 1e-6)
        search = _Search(
            value=value,
            residual=norm(image - value * v),
            converged=is_settled or length == 0,
            vector=v,
            next_vector=image / length if length > 0 else v,
            n_products=iteration + 1,
        )
        if search.converged:
            break
    return search


def _deflated(v: Tensor, eigenvectors: list[Tensor]) -> Tensor:
    for u in eigenvectors:
        v = v - dot(v, u) * u
    return v / norm(v)
