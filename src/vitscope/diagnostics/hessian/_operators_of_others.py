"""Eigenvalues and spectral densities of operators that are not of a probe: of SciPy, of curvlinops, matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitscope.diagnostics.hessian.hessian_eigenvalues import HessianEigenvaluesResult
from vitscope.diagnostics.hessian.spectral_density import SpectralDensityResult, density_of
from vitscope.linalg.eigensolver import extreme_eigenvalues
from vitscope.linalg.interchange.foreign_operators import ForeignOperator
from vitscope.linalg.quadrature import check_quadrature
from vitscope.linalg.ritz_values import Which
from vitscope.runtime.value_ranges import OpenUnitInterval, PositiveInt, Seed

#: products in a row with which all eigenvalues must be known. Without a gradient the start is random: of 540 searches for the
#: largest eigenvalue of matrices of three spectra, at tolerances of 1e-2 to 1e-4, 15 passed it over with 3 such products, 3 with
#: 6 and none with 10 (8 products more)
CONFIRMATIONS = 10


def eigenvalues_of(
    operator: Any,
    *,
    k: PositiveInt = 5,
    which: Which = "LM",
    tol: OpenUnitInterval = 1e-3,
    max_products: PositiveInt = 200,
    max_memory: float | None = None,
    eigenvectors: bool = False,
    seed: Seed = 0,
) -> HessianEigenvaluesResult:
    """Compute the ``k`` extreme eigenvalues of any symmetric operator, by the solver of `hessian_eigenvalues`.

    The result has neither a card nor parameter names, and its ``l2_contribution`` is NaN: what the operator is made of is not
    known. Two of its products check the symmetry.

    Args:
        operator: A SciPy ``LinearOperator`` or sparse matrix, a symmetric array or tensor ``(size, size)``, or an object with
            ``shape``, ``dtype``, ``device`` and ``@`` for torch vectors, as curvlinops' operators (KFAC, GGN, ...).
        k: Number of eigenvalues; with ``both`` at either end.
        which: ``LM`` by magnitude, ``LA`` the largest, ``SA`` the smallest, ``both`` ends from one run.
        tol: Relative error at which the search stops.
        max_products: The largest number of products; eigenvalues that have not converged by then are marked.
        max_memory: Bytes of the Lanczos basis; None for a quarter of the free memory.
        eigenvectors: Whether to return the eigenvectors too.
        seed: Seed of the start vector.

    Raises:
        ValueError: An operator that is not square, real and symmetric, fewer rows than ``k``, an unknown ``which``.
        NumericalError: A product that is not finite.

    Example:
        ``vs.eigenvalues_of(vs.hessian_operator(probe), k=5)`` gives the numbers of ``vs.hessian_eigenvalues(probe, k=5)``.
    """
    foreign = ForeignOperator(operator, seed)
    if not 1 <= k <= foreign.size:
        raise ValueError(f"Expected k between 1 and the operator's {foreign.size} rows, received {k}.")
    pairs = extreme_eigenvalues(
        foreign, foreign.random(seed), k, which=which, tol=tol, max_products=max_products, max_memory=max_memory,
        vectors=eigenvectors, seed=seed, confirmations=CONFIRMATIONS,
    )  # fmt: skip
    return HessianEigenvaluesResult(
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        errors=pairs.errors,
        converged=pairs.converged,
        l2_contribution=np.full(len(pairs.values), np.nan),
        n_products=foreign.n_products,
        eigenvectors=np.zeros((0, 0)) if not eigenvectors or pairs.vectors is None else pairs.vectors.cpu().numpy(),
        parameter_names=(),
    )


def spectral_density_of(
    operator: Any,
    *,
    n_vectors: PositiveInt = 4,
    n_steps: PositiveInt = 30,
    n_grid: PositiveInt = 1024,
    sigma: float | None = None,
    seed: Seed = 0,
) -> SpectralDensityResult:
    """Estimate the density of the eigenvalues of any symmetric operator, as `spectral_density` does.

    Args:
        operator: The operator, as for `eigenvalues_of`.
        n_vectors: Probe vectors; the interval shrinks with their root.
        n_steps: Lanczos steps of each, at most the number of rows.
        n_grid: Points of the density.
        sigma: Width of the smoothing Gaussian; None for a hundredth of the nodes' range.
        seed: Seed of the probe vectors.

    Raises:
        ValueError: An operator that is not square, real and symmetric; and as `spectral_density`.
        NumericalError: A product that is not finite.
    """
    check_quadrature(n_vectors, n_steps, n_grid, sigma)
    foreign = ForeignOperator(operator, seed)
    n_checked = foreign.n_products
    result = density_of(foreign, n_vectors, n_steps, n_grid, sigma, seed)
    assert foreign.n_products == n_checked + result.n_products
    return result
