"""Extreme eigenvalues of a symmetric operator, with bounds of their errors.

An eigenvalue lies within a Ritz pair's residual r of its value, and within r^2/gap where the rest of the spectrum is gap away
(Parlett, The Symmetric Eigenvalue Problem, ch. 11). A Krylov space holds one direction of each eigenvalue: of a cluster tighter
than the tolerance it may show only some members. An eigenvalue of which the start vector has next to nothing may be passed over
while its neighbors look converged; before it appears their residuals rise again, so a search ends after `CONFIRMATIONS`
products in a row with which all is known (`SMALL_CONFIRMATIONS` in a small space).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.lanczos import Lanczos, Operator
from vitscope.linalg.missed_eigenvalues import HIGHEST_PROBABILITY, KrylovPolynomial, outer_values
from vitscope.linalg.partial_reorthogonalization import SemiorthogonalLanczos
from vitscope.linalg.ritz_values import WHICH, Ritz, count, errors, select_ritz_values, settled, tolerances
from vitscope.runtime import distributed

#: products in a row with which all must be known. Of 64 searches at a tolerance of 1e-2 for the ends of a trained transformer's
#: spectrum, whose eigenvalues follow each other by 1 %, 24 pass one over with two products, 1 with three (27 % more products,
#: as the values need them) and none with four (39 % more)
CONFIRMATIONS = 3
#: the same in a space of at most `SMALL_SIZE` dimensions, where a product costs next to nothing. Of 360 searches at 1e-3 for
#: five eigenvalues of dense Hessians of 211 and 787 parameters, six pass one over with three products and none with six or more
SMALL_CONFIRMATIONS, SMALL_SIZE = 10, 5_000


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with what is known about their error.

    Attributes:
        values: (k,) Ritz values in the order asked for.
        residuals: (k,) norms of H v - value v, at least `resolution`; an eigenvalue lies within.
        errors: (k,) estimates of |value - eigenvalue|: the residual or, where smaller, residual^2 / gap.
        converged: (k,) whether the estimate is within the tolerance and, where the probability below is known, that is at most
            `vitscope.linalg.missed_eigenvalues.HIGHEST_PROBABILITY`.
        n_products: Products made.
        vectors: (k, size) orthonormal, or None.
        resolution: Values nearer to zero than that may owe their sign to rounding, see `Lanczos.resolution`.
        missed_probability: Bound of the probability that an eigenvalue more than 1 % beyond the outermost of these exists and
            was passed over, see `vitscope.linalg.missed_eigenvalues`; NaN where the random share of the start is not stated.
    """

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    n_products: int
    vectors: Tensor | None
    resolution: float = 0.0
    missed_probability: float = float("nan")


def extreme_eigenvalues(
    product: Operator,
    start: Tensor,
    k: int,
    *,
    which: str = "LM",
    n_ends: int = 0,
    tol: float = 1e-3,
    max_products: int = 200,
    max_memory: float | None = None,
    vectors: bool = False,
    seed: int = 0,
    shift: float = 0.0,
    shared: bool = False,
    memory: BasisBuffer | None = None,
    confirmations: int | None = None,
    random_share: float | None = None,
    product_error: Callable[[], float] = float,
) -> Eigenpairs:
    """Return the ``k`` extreme eigenvalues of a symmetric operator.

    Args:
        product: ``v -> H v``, see `Lanczos`.
        start: The first vector ``(size,)``.
        k: Number of eigenvalues; with ``both`` at either end.
        which: ``LM`` by magnitude, ``LA`` the largest, ``SA`` the smallest, ``both`` ends from one run.
        n_ends: Number of the largest, then of the smallest eigenvalues that follow the others; 0 for none.
        tol: Relative error of each eigenvalue at which to stop (of the largest one's magnitude times 1e-3 where smaller).
        max_products: The most products, at least one for each eigenvalue; what has not converged then says so.
        max_memory: Bytes that the basis may take, on all ranks together; thick restarts keep to it. None: a quarter of what is
            free.
        vectors: Whether to return the eigenvectors too.
        seed: Seed of the random vectors that continue after an invariant subspace.
        shift: A number that is added to every eigenvalue: the operator is H + shift I.
        shared: Every rank runs this on one operator whose products are reduced: all must stop together, and each holds a share
            of the basis.
        memory: Memory of the basis, to be used again by the next search, with the same ``shared``; None for its own.
        confirmations: Products in a row with which all eigenvalues must be known; None for `SMALL_CONFIRMATIONS` in a space of
            at most `SMALL_SIZE` dimensions and `CONFIRMATIONS` in others.
        random_share: Length of the random part of ``start`` relative to the rest, which may lie in a wrong invariant subspace;
            the search then goes on until it is unlikely that a value beyond the wanted ones was passed over. None for a start
            of which that is not asked.
        product_error: Function that returns by how much products with unit vectors may be off beyond rounding, after the last
            product: it is added to residuals and errors. 0 for exact products.

    Raises:
        ValueError: Fewer dimensions than eigenvalues, an unknown ``which``, ``tol`` or ``max_products`` not positive, or a
            ``max_memory`` in which Lanczos cannot run.
    """
    search = Search(
        start, k, which=which, n_ends=n_ends, tol=tol, max_products=max_products, max_memory=max_memory,
        seed=seed, shift=shift, memory=memory or BasisBuffer(shared=shared), confirmations=confirmations,
        random_share=random_share,
    )  # fmt: skip
    while True:
        stop = search.absorb(product(search.lanczos.row))
        if _agreed(stop, shared, start.device):
            return search.pairs(vectors, product_error())
        search.make_space()


class Search:
    """A run of Lanczos towards extreme eigenvalues, one product at a time, so that several can run side by side.

    Args and raises: as `extreme_eigenvalues`.

    Attributes:
        lanczos: The process; ``lanczos.row`` is the vector whose product `absorb` takes.
    """

    def __init__(
        self,
        start: Tensor,
        k: int,
        *,
        which: str = "LM",
        n_ends: int = 0,
        tol: float = 1e-3,
        max_products: int = 200,
        max_memory: float | None = None,
        seed: int = 0,
        shift: float = 0.0,
        memory: BasisBuffer | None = None,
        confirmations: int | None = None,
        random_share: float | None = None,
    ) -> None:
        _check(len(start), k, which, tol, max_products)
        # fewer products could not give as many values
        max_products = max(max_products, min(count(k, which, n_ends), len(start)))
        self.k, self.which, self.n_ends, self.tol, self.max_products = k, which, n_ends, tol, max_products
        least = min(2 * count(k, which, n_ends) + 4, len(start) + 1, max_products + 1)
        memory = memory or BasisBuffer()
        self.rows = memory.plan(start, least, max_products + 1, max_memory)
        self.lanczos = SemiorthogonalLanczos(None, start, self.rows, seed=seed, shift=shift, memory=memory)
        self._at_breakdown: np.ndarray | None = None
        usual = SMALL_CONFIRMATIONS if len(start) <= SMALL_SIZE else CONFIRMATIONS
        self.confirmations, self._n_known = confirmations or usual, 0  # products in a row with which all was known
        self._random_share = random_share
        self._polynomial: KrylovPolynomial | None = None  # that of the last product before a restart

    def absorb(self, pieces: Tensor | Sequence[Tensor]) -> bool:
        """Take the product with ``lanczos.row``; return whether this is the end."""
        lanczos = self.lanczos
        lanczos.absorb(pieces)
        self._ritz = ritz = lanczos.ritz()
        self._chosen, all_known = settled(ritz, self.k, self.which, self.tol, self.n_ends)
        self._n_known = self._n_known + 1 if all_known else 0
        # an eigenvalue that is passed over shows in the next products: residuals rise again
        is_settled = self._n_known >= self.confirmations
        if is_settled and self._random_share is not None:
            is_settled = self._missed_probability() <= HIGHEST_PROBABILITY
        if lanczos.breakdowns:
            values = ritz.values[self._chosen]
            is_settled = is_settled and _nothing_new(lanczos, values, self._at_breakdown)
            self._at_breakdown = values if lanczos.breakdowns[-1] == lanczos.n_products else self._at_breakdown
        return is_settled or lanczos.exhausted or lanczos.n_products >= self.max_products

    def make_space(self) -> None:
        """Restart where the basis is full."""
        if self.lanczos.full:
            if self._polynomial is None:
                self._polynomial = self.lanczos.polynomial(self._ritz)
            self.lanczos.restart(_kept(self._ritz, self._chosen, self.which, self.rows))

    def pairs(self, vectors: bool, product_error: float = 0.0) -> Eigenpairs:
        """Return what is known after the last product; products with unit vectors may be off by ``product_error``."""
        pairs = _pairs(self.lanczos, self._ritz, self._chosen, self.tol, vectors, product_error)
        if self._random_share is None:
            return pairs
        probability = self._missed_probability()
        is_outermost = probability <= HIGHEST_PROBABILITY
        return replace(pairs, missed_probability=probability, converged=pairs.converged & is_outermost)

    def _missed_probability(self) -> float:
        """Return the bound for all ends that are looked at; 0 where the basis spans the whole space."""
        assert self._random_share is not None
        if self.lanczos.exhausted:
            return 0.0
        polynomial = self._polynomial or self.lanczos.polynomial(self._ritz)
        size = self.lanczos.basis.rows.shape[1]
        which = "both" if self.n_ends else self.which
        values = outer_values(self._ritz.values, which)
        return min(1.0, sum(polynomial.missed_probability(value, size, self._random_share) for value in values))


def _nothing_new(lanczos: Lanczos, values: np.ndarray, before: np.ndarray | None) -> bool:
    """Return whether the directions after an invariant subspace have had their chance.

    A Krylov space holds one direction of each multiple eigenvalue; the others, and null directions, come from the random
    vectors that continue: until these break down too without a change, or for as many products as the first subspace took.
    """
    if lanczos.n_products - lanczos.breakdowns[-1] >= lanczos.breakdowns[0]:
        return True
    if before is None or len(before) != len(values) or lanczos.breakdowns[-1] != lanczos.n_products:
        return False
    return np.allclose(values, before, rtol=1e-3, atol=1e-6 * np.abs(values).max())


def _check(size: int, k: int, which: str, tol: float, max_products: int) -> None:
    if which not in WHICH:
        raise ValueError(f"Expected which to be one of {', '.join(WHICH)}, received {which!r}.")
    if k < 1 or k > size:
        raise ValueError(f"Expected between 1 and {size} eigenvalues (the parameters analyzed), received k={k}.")
    check_stopping_rule(tol, max_products)


def check_stopping_rule(tol: float, max_products: int) -> None:
    """Check when a search stops.

    Raises:
        ValueError: A tolerance outside (0, 1), or fewer than one product.
    """
    if not 0 < tol < 1:
        raise ValueError(f"Expected tol between 0 and 1, received {tol}.")
    if max_products < 1:
        raise ValueError(f"Expected max_products to be at least 1, received {max_products}.")


def _kept(ritz: Ritz, selected: np.ndarray, which: str, rows: int) -> np.ndarray:
    """Return the Ritz values to restart with: the wanted ones and, for a wider gap, some that follow them."""
    following = select_ritz_values(ritz.values, len(ritz.values), "LM" if which == "both" else which)
    ranked = list(dict.fromkeys([*selected.tolist(), *following.tolist()]))
    base = len(set(selected.tolist()))
    return np.sort(ranked[: min(base + max(2, (rows - base) // 3), rows - 3)])


def _agreed(stop: bool, shared: bool, device: torch.device) -> bool:
    """Return rank 0's decision: rounding may differ between ranks, but all must make the same products."""
    if not shared or distributed.world_size() == 1:
        return stop
    return bool(distributed.broadcast(torch.tensor(float(stop), device=device)).item())


def _beyond(lanczos: Lanczos, ritz: Ritz, bounds: np.ndarray, product_error: float) -> np.ndarray:
    """Return which tolerances the operator's asymmetry exceeds, and warn of it: half of the digits are more than rounding.

    Products that are off by ``product_error`` explain twice that. They are central differences, whose digits are those of
    eps^(2/3): the error is an estimate, and along some directions the product has fewer of them.

    Such a product is not that of a matrix of second derivatives: a part of the network has a wrong derivative, such as an
    ``autograd.Function`` whose backward pass reads values that autograd takes for constants.
    """
    norm = float(np.abs(ritz.values).max(initial=0.0))
    half_of_digits = 1 / 3 if product_error else 1 / 2
    explained = float(torch.finfo(lanczos.basis.dtype).eps) ** half_of_digits * norm + 2 * product_error
    if not lanczos.asymmetry > explained:
        return np.zeros(len(bounds), dtype=bool)
    warnings.warn(
        f"the products with the matrix are not symmetric (by {lanczos.asymmetry / norm:.2g} of its norm): a part of the network "
        "has wrong second derivatives, such as an autograd.Function whose backward pass is not differentiable; no eigenvalue is "
        "nearer than that (product='difference' uses first derivatives alone)",
        stacklevel=2,
    )
    return lanczos.asymmetry > bounds


def _pairs(
    lanczos: Lanczos, ritz: Ritz, selected: np.ndarray, tol: float, vectors: bool, product_error: float
) -> Eigenpairs:
    estimate, resolution = errors(ritz)[selected] + product_error, lanczos.resolution(ritz) + product_error
    bounds = tolerances(ritz.values, selected, tol)
    return Eigenpairs(
        values=ritz.values[selected],
        residuals=np.maximum(ritz.residuals[selected] + product_error, resolution),
        errors=estimate,
        converged=(estimate <= bounds) & ~_beyond(lanczos, ritz, bounds, product_error),
        n_products=lanczos.n_products,
        vectors=lanczos.vectors(ritz, selected) if vectors else None,
        resolution=resolution,
    )
