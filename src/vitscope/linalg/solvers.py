"""Extreme eigenvalues of a curvature operator by name of the solver, with the L2 term's share of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.start_vector import start_vector
from vitscope.linalg.eigensolver import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.power_iteration import power_iteration

Solver = Literal["lanczos", "power"]
SOLVERS: tuple[str, ...] = get_args(Solver)


@dataclass(frozen=True)
class Solution:
    """Eigenpairs (see `Eigenpairs`) and what the L2 term adds to each value.

    Attributes:
        pairs: Values, residuals, errors, flags, products; vectors where asked for.
        l2_contribution: (k,) v^T H_L2 v.
    """

    pairs: Eigenpairs
    l2_contribution: np.ndarray


def solve(
    operator: Curvature,
    *,
    k: int,
    which: str = "LM",
    n_ends: int = 0,
    tol: float = 1e-3,
    solver: str = "lanczos",
    max_products: int = 200,
    max_memory: float | None = None,
    vectors: bool = False,
    seed: int = 0,
    shared: bool = False,
    start: Tensor | None = None,
    memory: BasisBuffer | None = None,
    random_share: float | None = None,
) -> Solution:
    """Return extreme eigenvalues of ``operator``; arguments as in `extreme_eigenvalues`.

    Raises:
        ValueError: An unknown solver, or ``power`` for anything but ``LM``; and what the solver raises.
    """
    check_solver(solver)
    if not 1 <= k <= operator.size:
        raise ValueError(
            f"Expected between 1 and {operator.size} eigenvalues (the parameters analyzed), received k={k}."
        )
    needed = vectors or operator.objective.l2 in ("sum_norm", "adamw")
    if solver == "power":
        if which != "LM" or n_ends:
            raise ValueError(
                "Expected which='LM' and n_ends=0 with solver='power' (it follows the magnitude), "
                f"received which={which!r}, n_ends={n_ends}."
            )
        like = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
        pairs = power_iteration(operator, like, k, tol=tol, seed=seed)
        error = operator.product_error
        pairs = replace(pairs, residuals=pairs.residuals + error, errors=pairs.errors + error)
    else:
        first = start_vector(operator, seed) if start is None else start
        pairs = extreme_eigenvalues(
            operator.unshifted,
            first,
            k,
            which=which,
            n_ends=n_ends,
            tol=tol,
            max_products=max_products,
            max_memory=max_memory,
            vectors=needed,
            seed=seed,
            shift=operator.shift,
            shared=shared,
            memory=memory,
            random_share=random_share,
            product_error=lambda: operator.product_error,
        )
    return Solution(pairs, l2_contribution(operator, pairs))


def check_solver(solver: str) -> None:
    """Check a solver's name.

    Raises:
        ValueError: An unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"Expected solver to be one of {', '.join(SOLVERS)}, received {solver!r}.")


def l2_contribution(operator: Curvature, pairs: Eigenpairs) -> np.ndarray:
    """Return v^T H_L2 v for each eigenvector ``(k,)``."""
    objective = operator.objective
    if objective.l2 == "none" or objective.weight_decay == 0.0:
        return np.zeros(len(pairs.values))
    if objective.l2 == "half_sq":
        return np.full(len(pairs.values), objective.weight_decay)
    assert pairs.vectors is not None
    return np.array([float(torch.dot(v.double(), operator.l2_product(v).double())) for v in pairs.vectors])
