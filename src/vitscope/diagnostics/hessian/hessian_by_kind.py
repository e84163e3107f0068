"""The curvature of attention against that of convolutions and MLPs: spectra of the Hessian's diagonal blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np

from vitscope.core.cost.measure_cost import MeasureCost, Options, Workload, declares_cost, stated_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import hessian_max_eigenvalue_spectrum
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures, solver_of
from vitscope.linalg.curvature.parameter_subsets import part_sizes, subset_name
from vitscope.linalg.curvature.product_cost import curvature_options, restricted, with_options
from vitscope.models.structure.parameter_groups import KIND_ORDER, parameter_kinds, parameter_stages
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class HessianByKindResult(Result, coordinates={"group": "groups"}):
    """Top eigenvalues of each block by mini-batch; signs and intervals as in `hessian_max_eigenvalue_spectrum`.

    Attributes:
        groups: (n_groups,) kinds of unit such as ``msa``, numbers of stages, or parts such as ``q``.
        n_parameters: (n_groups,) parameters of each.
        eigenvalues: (n_groups, n_batches, n_top) signed, by magnitude descending.
        residuals: (n_groups, n_batches, n_top) norms of H v - lambda v within the block.
        converged: (n_groups, n_batches, n_top) whether the estimated error is within the tolerance.
        n_products: (n_groups,) products made.
        nep: (n_groups,) negative eigenvalue proportion.
        nep_intervals: (n_groups, 2) 95 % over batches, NaN with fewer than 8 of them.
        ape: (n_groups,) average positive eigenvalue; NaN where there is none.
        ape_intervals: (n_groups, 2), NaN with fewer than 4.
        card: Conditions of the measurement; ``parameters`` is ``by kind``, ``by stage`` or ``by part``.
    """

    groups: tuple[str, ...]
    n_parameters: np.ndarray
    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    n_products: np.ndarray
    nep: np.ndarray
    nep_intervals: np.ndarray
    ape: np.ndarray
    ape_intervals: np.ndarray
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: NEP and APE of each group; an average only where a value is positive."""
        logged = {f"nep_{group}": float(value) for group, value in zip(self.groups, self.nep)}
        logged |= {f"ape_{group}": float(value) for group, value in zip(self.groups, self.ape) if np.isfinite(value)}
        return {**logged, "converged": float(self.converged.mean()), "n_products": float(self.n_products.sum())}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the cost of the spectrum of each group of parameters."""
    by = options["by"]
    spectrum_options = {name: value for name, value in options.items() if name != "by"}
    costs = []
    for group, size in _sizes(workload.model_probe(), by, curvature_options(options)).items():
        subset = f"{by}:{group}"
        cost = stated_cost(hessian_max_eigenvalue_spectrum, spectrum_options, restricted(workload, size))
        costs.append(with_options(cost, subset, parameters=subset))
    works = [work for i, cost in enumerate(costs) for work in (cost.measured() if i else cost).works]
    return MeasureCost(works, held_bytes=max(cost.held_bytes for cost in costs))


@declares_cost(_cost)
@record_options
@curvature_arguments("tol", "dtype", "bn", "product", "difference_step", "max_products", "seed")
def hessian_by_kind(
    probe: Probe,
    *,
    by: Literal["kind", "stage", "part"] = "kind",
    n_top: PositiveInt = 5,
    **curvature: Unpack[CurvatureArguments],
) -> HessianByKindResult:
    """Compute the Hessian max-eigenvalue spectrum of each kind of unit's parameters, of each stage's, or of each part's.

    The Hessian of the parameters of one group, all others held fixed, is a diagonal block of the whole one. By Cauchy's
    interlacing its largest eigenvalue is at most the whole Hessian's and its smallest at least: negative eigenvalues of a
    block are the network's, but a network can have more.

    Args:
        probe: The model, frozen augmented mini-batches and the objective; batches are split over ranks.
        by: ``kind`` (stem, conv, msa, mlp, pool, head), ``stage`` (0 is the stem) or ``part`` (q, k, v, proj, mlp_in, mlp_out:
            those that the model has; norms, convolutions and others are in none of them).
        n_top: Eigenvalues of each batch (``k`` is accepted too), at most the parameters of the smallest group.
        curvature: ``tol``, ``dtype``, ``bn``, ``product``, ``difference_step``, ``max_products``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Another ``by``, a model of no known unit, attention whose parts are not certain; and as
            `hessian_max_eigenvalue_spectrum`.
        NumericalError: A loss that is not finite.

    Source: vitscope's own; the blocks are those of `vitscope.models.structure.parameter_groups`.
    """
    sizes = _sizes(probe, by, CurvatureOptions(**curvature))
    spectra = [
        hessian_max_eigenvalue_spectrum(probe, n_top=n_top, **{**curvature, "parameters": f"{by}:{group}"})
        for group in sizes
    ]
    card = spectra[0].card
    assert card is not None
    return HessianByKindResult(
        groups=tuple(sizes),
        n_parameters=np.array(list(sizes.values())),
        eigenvalues=np.stack([s.eigenvalues for s in spectra]),
        residuals=np.stack([s.residuals for s in spectra]),
        converged=np.stack([s.converged for s in spectra]),
        n_products=np.array([int(s.n_products.sum()) for s in spectra]),
        nep=np.array([s.negative_eigenvalue_proportion for s in spectra]),
        nep_intervals=np.stack([s.negative_eigenvalue_proportion_interval for s in spectra]),
        ape=np.array([s.average_positive_eigenvalue for s in spectra]),
        ape_intervals=np.stack([s.average_positive_eigenvalue_interval for s in spectra]),
        card=probe.card(
            parameters=subset_name(probe.model, f"by {by}"),
            bn_policy=CurvatureOptions(**curvature).bn,
            dtype=card.dtype,
            solver=solver_of([s.card for s in spectra if s.card is not None]),
        ),
    )


def _sizes(probe: Probe, by: str, options: CurvatureOptions) -> dict[str, int]:
    """Return the number of trainable parameters of each group that has any, in the order shown."""
    if by not in ("kind", "stage", "part"):
        raise ValueError(
            f"Expected by to be kind or stage, received {by!r}; part is for queries, keys, values and MLPs."
        )
    if by == "part":
        with curvatures(probe, options) as operators:
            sizes = part_sizes(operators.model, operators.parameters, probe.first_images)
        if not sizes:
            raise ValueError("Expected a model with attention or MLPs for by='part', received one without.")
        return sizes
    find = parameter_kinds if by == "kind" else parameter_stages
    with probe.calling():
        places = find(probe.model, probe.first_images())
    sizes = {}
    for name, p in probe.parameters().items():
        group = str(places[name])
        sizes[group] = sizes.get(group, 0) + p.numel()
    return dict(sorted(sizes.items(), key=lambda pair: KIND_ORDER.index(pair[0]) if by == "kind" else int(pair[0])))
