"""Power iteration with PyHessian's stopping rule, so that numbers published with it can be compared.

One eigenvector after the other: a random unit vector is multiplied, projected off the earlier vectors before each product,
and normalized; its Rayleigh quotient is the value. It stops when that changes by less than ``tol`` relative to the value
before (plus 1e-6), or after ``max_iterations``. A small change is no bound on the error: slow convergence looks like
convergence, and of two eigenvalues +a and -a it sees a mixture. The residuals say so.
"""

from __future__ import annotations

from collections.abc import Callable

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
        like: a vector ``(size,)`` whose size, dtype and device are used.
        k: number of eigenvalues.
        tol: relative change at which to stop.
        max_iterations: products for each eigenvalue at most.
        seed: seed of the random vectors.

    Raises:
        ValueError: ``k`` not between 1 and the size.
    """
    if not 1 <= k <= len(like):
        raise ValueError(f"Expected between 1 and {len(like)} eigenvalues (the parameters analyzed), received k={k}.")
    generator = torch.Generator().manual_seed(seed)
    eigenvectors: list[Tensor] = []
    rows, n_products = [], 0
    for _ in range(k):
        v = torch.randn(len(like), generator=generator, dtype=torch.float32).to(like)
        value, residual, stopped, last_vector, length = 0.0, np.inf, False, v, 0.0
        for iteration in range(max_iterations):
            v = _deflated(v, eigenvectors)
            hv = product(v)
            n_products += 1
            before, value = value, dot(hv, v)
            residual = norm(hv - value * v)
            length = norm(hv)
            if iteration > 0 and abs(value - before) < tol * (abs(before) + 1e-6):
                stopped = True
            last_vector = v
            v = hv / length if length > 0 else v
            if stopped or length == 0:
                break
        # the next iterate is what PyHessian keeps for deflation, the value belongs to the one before
        eigenvectors.append(v)
        rows.append((value, residual, stopped or length == 0, last_vector))
    # of products that are off by rounding, as inner products of that many entries are (see `Lanczos.resolution`)
    largest = max(abs(row[0]) for row in rows)
    resolution = float(torch.finfo(like.dtype).eps) * largest * (1.0 + float(np.log2(len(like))))
    return Eigenpairs(
        values=np.array([row[0] for row in rows]),
        residuals=np.maximum([row[1] for row in rows], resolution),
        errors=np.array([row[1] for row in rows]),
        converged=np.array([row[2] for row in rows]),
        n_products=n_products,
        vectors=torch.stack([row[3] for row in rows]),
        resolution=resolution,
    )


def _deflated(v: Tensor, eigenvectors: list[Tensor]) -> Tensor:
    for u in eigenvectors:
        v = v - dot(v, u) * u
    return v / norm(v)
