"""Parts of the extreme eigenvalues: Gauss-Newton part, remainder and L2 term, and the kinds of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.losses.named_losses import LOSSES
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.linalg.curvature.curvature_options import CurvatureOptions, SearchArguments, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, lanczos_products, mean_products, with_options
from vitscope.linalg.eigensolver import Eigenpairs
from vitscope.linalg.krylov_basis import dot
from vitscope.linalg.solvers import solve
from vitscope.models.structure.parameter_groups import kinds_of_probe
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class RayleighSplitResult(Result, coordinates={"kind": "kinds"}):
    """Each eigenvalue as a sum, each eigenvector's mass by kind of parameter.

    Attributes:
        eigenvalues: (k,) the top k by magnitude, then those of the n_ends largest and n_ends smallest that are not among them.
        residuals: (k,) norms of H v - lambda v.
        gauss_newton: (k,) v^T G v, never negative: the curvature of the loss in the logits seen through the Jacobian.
        remainder: (k,) v^T (H - G) v without the L2 term: the curvature of the network. Only this part can be negative.
        l2: (k,) v^T H_L2 v. The three add up to the eigenvalue.
        mass: (k, n_kinds) squared length of v on the parameters of each kind; rows sum to 1.
        kinds: (n_kinds,) the kinds that occur.
        share_of_parameters: (n_kinds,) the mass that a random vector would have.
        card: Conditions of the measurement.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    gauss_newton: np.ndarray
    remainder: np.ndarray
    l2: np.ndarray
    mass: np.ndarray
    kinds: tuple[str, ...]
    share_of_parameters: np.ndarray
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: the split of the smallest eigenvalue and of the largest one by magnitude."""
        low = int(np.argmin(self.eigenvalues))
        logged = {
            "top_eigenvalue": self.eigenvalues[0],
            "top_gauss_newton": self.gauss_newton[0],
            "top_remainder": self.remainder[0],
            "smallest_eigenvalue": self.eigenvalues[low],
            "smallest_gauss_newton": self.gauss_newton[low],
            "smallest_remainder": self.remainder[low],
        }
        logged |= {f"top_mass_{kind}": self.mass[0, i] for i, kind in enumerate(self.kinds)}
        return {name: float(value) for name, value in logged.items()}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the products of the search, and one of the Gauss-Newton matrix for each eigenvector.

    An eigenvector that is among the largest and at an end counts once.
    """
    k, n_ends = int(options["k"]), int(options["n_ends"])
    products = lanczos_products(workload, options, k + 2 * n_ends)
    most = min(k + 2 * n_ends, workload.n_parameters)
    vectors = Count(min(k + n_ends, most), min(k, most), most)
    gauss_newton = MeasureCost(mean_products(workload, options, vectors)).measured()
    return MeasureCost(
        [
            *mean_products(workload, options, products, gradients=1),
            *with_options(gauss_newton, "Gauss-Newton", operator="ggn").works,
        ],
        held_bytes=vectors.expected * workload.parameter_bytes,
        held_bytes_shared=basis_bytes(workload, products.expected),
    )


@declares_cost(_cost)
@record_options
@curvature_arguments()
def rayleigh_split(
    probe: Probe,
    *,
    k: PositiveInt = 5,
    n_ends: NonNegativeInt = 2,
    **curvature: Unpack[SearchArguments],
) -> RayleighSplitResult:
    """Split the Rayleigh quotient of each extreme eigenvector of the Hessian of the mean over all batches.

    H = G + (H - G): G is positive semi-definite for the cross entropy, so a negative eigenvalue owes its sign to H - G.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        k: Eigenvalues of largest magnitude (``n_top`` is accepted too).
        n_ends: Number of the largest and of the smallest eigenvalues that are returned too.
        curvature: ``tol``, ``parameters``, ``dtype``, ``bn``, ``micro_batch``, ``max_products``, ``max_memory``, ``basis``,
            ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: As `hessian_eigenvalues`; a loss that is a callable.
        NumericalError: A loss that is not finite.

    Source: docs/definitions.md section 2.
    """
    options = CurvatureOptions(**curvature)
    if callable(probe.objective.loss):
        raise ValueError(
            "rayleigh_split needs the Gauss-Newton matrix, which a loss of your own does not have: use hessian_eigenvalues, or "
            f"a named loss ({', '.join(LOSSES)})."
        )
    with curvatures(probe, options) as operators:
        hessian = operators.mean()
        solution = solve(
            hessian,
            k=k,
            n_ends=n_ends,
            vectors=True,
            shared=True,
            memory=operators.basis_memory(shared=True),
            **options.search(),
        )
        pairs = _distinct(solution.pairs)
        assert pairs.vectors is not None
        l2 = np.array([dot(v, hessian.l2_product(v)) for v in pairs.vectors])
        hessian.release()
        analyzed = list(operators.parameters)
        parts = [hessian.split(v) for v in pairs.vectors]
        ones = [torch.ones_like(p) for p in operators.parameters.values()]
        facts = {"k": k, "n_ends": n_ends, **options.values("tol", "max_products", "seed"), "ranking": "magnitude"}
        card = operators.card(facts)
    with curvatures(probe, options, operator="ggn") as operators:
        ggn = operators.mean()
        gauss_newton = np.array([dot(v, ggn.data_product(v)) for v in pairs.vectors])
    kinds = dict(zip(analyzed, kinds_of_probe(probe, analyzed, "rayleigh_split")))
    names = tuple(sorted(set(kinds.values())))
    mass = np.array([_mass(part, analyzed, kinds, names) for part in parts])
    sizes = _mass(ones, analyzed, kinds, names)
    return RayleighSplitResult(
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        gauss_newton=gauss_newton,
        remainder=pairs.values - gauss_newton - l2,
        l2=l2,
        mass=mass,
        kinds=names,
        share_of_parameters=np.array(sizes) / np.sum(sizes),
        card=card,
    )


def _distinct(pairs: Eigenpairs) -> Eigenpairs:
    """Drop the pairs that came a second time: the smallest by magnitude may be among the top k too."""
    assert pairs.vectors is not None
    overlap = np.abs((pairs.vectors @ pairs.vectors.T).double().cpu().numpy())
    rows = [i for i in range(len(pairs.values)) if (overlap[i, :i] < 0.5).all()]  # orthonormal but for repeats
    distinct_pairs = {
        name: getattr(pairs, name)[rows] for name in ("values", "residuals", "errors", "converged", "vectors")
    }
    return replace(pairs, **distinct_pairs)


def _mass(parts: Sequence[Tensor], names: list[str], kinds: dict[str, str], order: tuple[str, ...]) -> list[float]:
    total = dict.fromkeys(order, 0.0)
    for name, part in zip(names, parts):
        total[kinds[name]] += float(part.double().square().sum())
    return list(total.values())
