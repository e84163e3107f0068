"""First vectors of Krylov methods, and random sign vectors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.krylov_basis import norm

#: length of a start vector's random part, in units of the gradient's. Of 60 constructed searches for an end that the gradient
#: does not show 23 passed it over with 0.1, and 3 do with 1, with as many products
RANDOM_SHARE = 1.0


def start_vector(operator: Curvature, seed: int = 0) -> Tensor:
    """Return a first vector for Krylov methods: the data gradient's direction plus as much of a random one.

    The gradient lies mostly in the span of the top eigenvectors, which saves products; the random part reaches the
    eigenvectors that are nearly orthogonal to it, such as the most negative ones, at the same number of products.
    """
    return start_along(operator.gradient(data_only=True), seed)


def start_along(gradient: Tensor, seed: int = 0) -> Tensor:
    """Return the direction of ``gradient (size,)``, which is written to, plus as much of a random one (see `start_vector`)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(gradient), generator=generator, dtype=torch.float32).to(gradient)
    length, random_length = norm(gradient), norm(random)
    if not length > 0:
        return random
    return gradient.div_(length).add_(random, alpha=RANDOM_SHARE / random_length)


def warm_start(vectors: np.ndarray | Tensor, operator: VectorSpace, seed: int = 0) -> Tensor:
    """Return a first vector in the direction of the sum of earlier eigenvectors, plus as much of a random one.

    The random part is what keeps a search honest. Let the earlier vectors span an invariant subspace S of the operator, such
    as eigenvectors that are no longer the largest ones. Without a random part every Krylov space lies in S: its Ritz pairs
    converge, and no residual shows the rest of the spectrum. With it an eigenvector outside of S has about 1 / sqrt(2 size) of
    the start, which `vitscope.linalg.missed_eigenvalues` turns into a bound of the probability that it was passed over: give
    `RANDOM_SHARE` to `extreme_eigenvalues` with this vector. A smaller share saves no products (docs/definitions.md section 3).

    Args:
        vectors: ``(m, size)`` or ``(size,)``, of any length; a row without a direction is left out.
        operator: The operator, which gives the size, type and device of vectors.
        seed: Seed of the random part.

    Raises:
        ValueError: Other shapes, entries that are not finite, or no direction at all.
    """
    rows = torch.as_tensor(vectors)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != operator.size or not len(rows):
        raise ValueError(
            f"Expected start of shape (m, {operator.size}) (the parameters analyzed), received {tuple(rows.shape)}: use the "
            "eigenvectors of a result of the same model and parameters (eigenvectors=True)."
        )
    rows = rows.to(operator.device, operator.dtype)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("Expected finite start vectors, received NaN or infinity.")
    lengths = [norm(row) for row in rows]
    total = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
    for row, length in zip(rows, lengths):
        total.add_(row, alpha=1 / length if length > 0 else 0.0)
    if not norm(total) > 0:
        raise ValueError("Expected start vectors with a sum other than zero, received zeros.")
    return start_along(total, seed)


class VectorSpace(Protocol):
    """The vectors that an operator takes."""

    size: int
    dtype: torch.dtype
    device: torch.device


def random_signs(operator: VectorSpace, seed: int) -> Tensor:
    """Return independent random signs ``(size,)`` of the operator's type and device, drawn on the CPU with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
    return signs.to(operator.device, operator.dtype).mul_(2).sub_(1)


def vector_seed(seed: int, number: int) -> int:
    """Return the seed of vector ``number`` of a sequence: it depends on ``(seed, number)`` alone."""
    return seed * 1_000_003 + number
