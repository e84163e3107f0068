"""Extreme eigenvalues of the objective's Hessian, averaged over all batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np
from torch import Tensor

from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, mean_products, search_products
from vitscope.linalg.curvature.start_vector import RANDOM_SHARE, warm_start
from vitscope.linalg.ritz_values import Which
from vitscope.linalg.solvers import solve
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class HessianEigenvaluesResult(Result, untabulated=("eigenvectors",)):
    """Eigenvalues of one operator.

    Attributes:
        eigenvalues: (k,) signed, by magnitude descending (``LM``), descending (``LA``), ascending (``SA``); with ``both``
            (2k,), the largest descending and then the smallest ascending.
        residuals: (k,) norms of H v - lambda v: an eigenvalue lies within.
        errors: (k,) estimates of the distance to the eigenvalue, min(residual, residual^2 / gap).
        converged: (k,) whether that is within the tolerance and, with ``start``, the probability below is at most 5 %.
        l2_contribution: (k,) the L2 term's share of each eigenvalue, v^T H_L2 v; it is an exact part of the sum.
        n_products: Products with the operator.
        eigenvectors: (k, size) unit vectors where asked for, else (0, 0).
        parameter_names: Names of the parameters analyzed, in the order of the vectors' entries.
        card: Conditions of the measurement.
        missed_probability: With ``start``, an upper bound of the probability that an eigenvalue lies more than 1 % beyond the
            outermost of these and was passed over (`vitscope.linalg.missed_eigenvalues`); else NaN.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    l2_contribution: np.ndarray
    n_products: int
    eigenvectors: np.ndarray = field(repr=False)
    parameter_names: tuple[str, ...] = field(repr=False)
    card: ObjectiveCard | None = None
    missed_probability: float = float("nan")

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        return {
            "eigenvalue_max": float(self.eigenvalues.max()),
            "eigenvalue_min": float(self.eigenvalues.min()),
            "largest_relative_error": float(np.max(self.errors / np.maximum(np.abs(self.eigenvalues), 1e-300))),
            "converged": float(self.converged.mean()),
            "n_products": float(self.n_products),
        }


def _cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return the products of the search; None for power iteration and for a start from earlier vectors."""
    k = int(options["k"]) * (2 if options.get("which") == "both" else 1)
    products = search_products(workload, options, k)
    if products is None or options.get("start") is not None:
        return None
    vectors = k * workload.parameter_bytes if options.get("eigenvectors") else 0
    return MeasureCost(
        mean_products(workload, options, products, gradients=1),
        held_bytes=float(vectors),
        held_bytes_shared=basis_bytes(workload, products.expected),
        result_bytes=ENTRY * 4 * k + k + vectors,  # a flag takes a byte
    )


@declares_cost(_cost)
@record_options
@curvature_arguments()
def hessian_eigenvalues(
    probe: Probe,
    *,
    k: PositiveInt = 5,
    which: Which = "LM",
    eigenvectors: bool = False,
    start: np.ndarray | Tensor | HessianEigenvaluesResult | None = None,
    **curvature: Unpack[CurvatureArguments],
) -> HessianEigenvaluesResult:
    """Compute the ``k`` extreme eigenvalues of the mean over all batches' images.

    Args:
        probe: The model, batches and objective. Under ``torch.distributed`` batches are split over ranks.
        k: Number of eigenvalues (``n_top`` is accepted too); with ``both`` at either end.
        which: ``LM`` by magnitude, ``LA`` the largest, ``SA`` the smallest, ``both`` ends from one run.
        eigenvectors: Whether to return the eigenvectors too.
        start: Eigenvectors ``(m, size)`` of an earlier measurement of these parameters, or its result, to begin the search
            from in place of the gradient: those of a few training steps or of a batch before. They may lie in a wrong invariant
            subspace, so as much of a random vector is added, and the search goes on until ``missed_probability`` is at most
            5 %, or its values are not called converged. Beginning there saves the gradient and about one product in eight of
            a search for one eigenvalue; the assurance takes them again, and more in a large network (docs/definitions.md
            section 3). Under ``torch.distributed`` all ranks pass the same. Lanczos only.
        curvature: The fields of `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Returns:
        The eigenvalues with their residuals.

    Raises:
        ValueError: No parameters, fewer parameters than ``k``, an unknown name, a compiled or inference-mode model, a
            batch on another device, a ``start`` of another size or of other parameters, or with ``solver="power"``.
        NumericalError: A loss that is not finite.

    Source: Park & Kim (ICLR 2022), section 3 and appendix A; docs/definitions.md section 2.

    Example:
        >>> before = vs.hessian_eigenvalues(probe, k=1, which="LA", eigenvectors=True)
        >>> ...  # some training steps
        >>> after = vs.hessian_eigenvalues(probe, k=1, which="LA", start=before)
    """
    options = CurvatureOptions(**curvature)
    if start is not None and options.solver != "lanczos":
        raise ValueError(f"Expected solver='lanczos' with start, received {options.solver!r}.")
    with curvatures(probe, options, mean_alone=True) as operators:
        mean = operators.mean()
        first = None if start is None else warm_start(_vectors_of(start, operators.parameters), mean, options.seed)
        solution = solve(
            mean,
            k=k,
            which=which,
            solver=options.solver,
            vectors=eigenvectors,
            shared=True,
            start=first,
            random_share=None if first is None else RANDOM_SHARE,
            memory=operators.basis_memory(shared=True),
            **options.search(),
        )
        pairs = solution.pairs
        facts = {
            "solver": options.solver,
            "k": k,
            "which": which,
            **options.values("tol", "seed", "max_products"),
            "n_products": mean.n_products,
        }
        if first is not None:
            facts["start"] = "earlier eigenvectors and a random vector"
        return HessianEigenvaluesResult(
            eigenvalues=pairs.values,
            residuals=pairs.residuals,
            errors=pairs.errors,
            converged=pairs.converged,
            l2_contribution=solution.l2_contribution,
            n_products=mean.n_products,
            eigenvectors=np.zeros((0, 0)) if not eigenvectors or pairs.vectors is None else pairs.vectors.cpu().numpy(),
            parameter_names=tuple(operators.parameters),
            missed_probability=pairs.missed_probability,
            card=operators.card(facts),
        )


def _vectors_of(
    start: np.ndarray | Tensor | HessianEigenvaluesResult, parameters: Collection[str]
) -> np.ndarray | Tensor:
    """Return the vectors ``(m, size)`` to begin from, those of a result after a check that its parameters are the same."""
    if not isinstance(start, HessianEigenvaluesResult):
        if not isinstance(start, np.ndarray | Tensor):
            raise ValueError(
                f"Expected start to be eigenvectors (m, size), a result that holds them or None, received {start!r}."
            )
        return start
    if not start.eigenvectors.size:
        raise ValueError(
            "Expected start to hold eigenvectors, received a result without: pass eigenvectors=True to it."
        )
    if tuple(start.parameter_names) != tuple(parameters):
        raise ValueError(
            f"Expected start of the {len(parameters)} parameters analyzed, received that of {len(start.parameter_names)} others: "
            "use a result of the same model and subset."
        )
    return start.eigenvectors
