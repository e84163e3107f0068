"""Bound the probability that a Krylov search from a partly random vector has passed an eigenvalue over.

Lanczos from a unit vector q_1 makes q_{j+1} = p_j(H) q_1, where the polynomial p_j has the Ritz values theta_1, ..., theta_j as
its roots and the leading coefficient 1 / (beta_1 ... beta_j), the betas being the off-diagonal entries of T (Parlett, The
Symmetric Eigenvalue Problem, section 12.3). For an eigenvector u of H with the eigenvalue lambda, <u, q_{j+1}> = p_j(lambda)
<u, q_1>, and the left side is at most 1. So

    |<u, q_1>| <= beta_1 ... beta_j / prod_i |lambda - theta_i|,

which falls from product to product where lambda lies beyond all Ritz values: an eigenvalue there that has not shown itself
has next to nothing of the start vector. Let q_1 be the normalized sum of a fixed unit vector and s times a random one, uniform
on the sphere. Then <u, q_1> is some number plus s / sqrt(1 + s^2) times one that is close to normal with variance 1 / size, and
whatever that number is,

    P(|<u, q_1>| <= x) <= sqrt(2 / pi) x sqrt(size) sqrt(1 + s^2) / s,

as a normal density is nowhere above its center's. Both together bound the probability that an eigenvalue as far out as
lambda exists and was passed over, without any assumption on the fixed vector: it may lie in an invariant subspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: distance beyond the outermost wanted value, relative to it, of an eigenvalue that counts as missed
MARGIN = 0.01
#: the highest probability at which a value counts as the outermost one
HIGHEST_PROBABILITY = 0.05


@dataclass(frozen=True)
class KrylovPolynomial:
    """The polynomial p_j that makes the next vector of a Lanczos basis from the first one.

    Attributes:
        roots: (j,) Ritz values.
        log_betas: Logarithm of beta_1 ... beta_j; -inf where the basis spans an invariant subspace.
    """

    roots: np.ndarray
    log_betas: float

    def log_inverse(self, value: float) -> float:
        """Return log 1 / |p_j(value)|."""
        with np.errstate(divide="ignore"):
            return self.log_betas - float(np.log(np.abs(value - self.roots)).sum())

    def missed_probability(self, value: float, size: int, random_share: float) -> float:
        """Return a bound, at most 1, of the probability that an eigenvalue at ``value`` or farther out was passed over.

        Args:
            value: Beyond all roots.
            size: Dimension of the space.
            random_share: The share s: the length of the start vector's random part relative to that of its fixed part.
        """
        factor = math.sqrt(2 / math.pi * size) * math.sqrt(1 + random_share**2) / random_share
        return min(1.0, factor * math.exp(min(self.log_inverse(value), 0.0)))


def outer_values(values: np.ndarray, which: str) -> list[float]:
    """Return the values at ``MARGIN`` beyond the outermost wanted Ritz values, one for each end that is looked at.

    Args:
        values: (m,) all Ritz values, ascending.
        which: ``LM``, ``LA``, ``SA`` or ``both``.
    """
    low, high, largest = float(values[0]), float(values[-1]), float(np.abs(values).max())
    if which == "LM":
        return [(1 + MARGIN) * largest, -(1 + MARGIN) * largest]
    ends = {"LA": [high + MARGIN * abs(high)], "SA": [low - MARGIN * abs(low)]}
    return [*ends["LA"], *ends["SA"]] if which == "both" else ends[which]
