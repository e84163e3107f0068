"""Curvature with BatchNorm on running statistics against curvature with each batch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import numpy as np

from vitscope.core.cost.measure_cost import (
    ENTRY,
    MeasureCost,
    Options,
    Workload,
    declares_cost,
    stated_cost,
)
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import hessian_max_eigenvalue_spectrum
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, curvature_arguments
from vitscope.linalg.curvature.product_cost import with_options
from vitscope.runtime.torch_internals import BatchNormBase
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class BnPolicyResult(Result):
    """Top eigenvalues of the same mini-batches under both policies.

    Attributes:
        eigenvalues_eval, eigenvalues_batch: (n_batches, n_top) by magnitude descending: running and batch statistics.
        residuals_eval, residuals_batch: (n_batches, n_top) norms of H v - lambda v.
        nep: (n_policies,) negative eigenvalue proportion under ``eval`` and ``batch``.
        nep_intervals: (n_policies, 2) 95 % over batches, NaN with fewer than 8 of them.
        ape: (n_policies,) average positive eigenvalue.
        ape_intervals: (n_policies, 2), NaN with fewer than 4.
        n_norms: BatchNorm layers in the model.
        card: Conditions of the measurement; ``bn_policy`` is ``both``.
    """

    eigenvalues_eval: np.ndarray
    eigenvalues_batch: np.ndarray
    residuals_eval: np.ndarray
    residuals_batch: np.ndarray
    nep: np.ndarray
    nep_intervals: np.ndarray
    ape: np.ndarray
    ape_intervals: np.ndarray
    n_norms: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        names = [f"{name}_{policy}" for name in ("nep", "ape") for policy in ("eval", "batch")]
        return {n: float(v) for n, v in zip(names, [*self.nep, *self.ape]) if np.isfinite(v)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the cost of both spectra."""
    spectrum_options = {name: value for name, value in options.items() if name != "partial"}
    both = [
        with_options(
            stated_cost(hessian_max_eigenvalue_spectrum, {**spectrum_options, "bn": bn}, workload), f"bn={bn}", bn=bn
        )
        for bn in ("eval", "batch")
    ]
    # values and residuals of both; NEP and APE with their intervals
    n_bytes = ENTRY * (4 * workload.n_batches * int(options["n_top"]) + 2 * 6)
    return MeasureCost(
        [*both[0].works, *both[1].measured().works],
        held_bytes=max(cost.held_bytes for cost in both),
        result_bytes=n_bytes,
    )


@declares_cost(_cost)
@record_options
@curvature_arguments("tol", "parameters", "dtype", "max_products", "seed")
def bn_policy(
    probe: Probe,
    *,
    n_top: PositiveInt = 5,
    **curvature: Unpack[CurvatureArguments],
) -> BnPolicyResult:
    """Compute the Hessian max-eigenvalue spectrum twice, with BatchNorm's running and its batch statistics.

    The paper's ResNet has no negative eigenvalues in eval mode; training sees the other curvature.

    Args:
        probe: The model, mini-batches and objective; batches are split over ranks.
        n_top: Eigenvalues of each batch (``k`` is accepted too).
        curvature: ``tol``, ``parameters``, ``dtype``, ``max_products``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: A model without BatchNorm; and as `hessian_max_eigenvalue_spectrum`.
        NumericalError: A loss that is not finite.

    Source: docs/definitions.md section 2.
    """
    n_norms = sum(isinstance(m, BatchNormBase) for m in probe.model.modules())
    if n_norms == 0:
        raise ValueError(f"Expected a model with BatchNorm layers, received {type(probe.model).__name__} without any.")
    both = [hessian_max_eigenvalue_spectrum(probe, n_top=n_top, **{**curvature, "bn": bn}) for bn in ("eval", "batch")]
    assert both[0].card is not None
    return BnPolicyResult(
        eigenvalues_eval=both[0].eigenvalues,
        eigenvalues_batch=both[1].eigenvalues,
        residuals_eval=both[0].residuals,
        residuals_batch=both[1].residuals,
        nep=np.array([r.negative_eigenvalue_proportion for r in both]),
        nep_intervals=np.array([r.negative_eigenvalue_proportion_interval for r in both]),
        ape=np.array([r.average_positive_eigenvalue for r in both]),
        ape_intervals=np.array([r.average_positive_eigenvalue_interval for r in both]),
        n_norms=n_norms,
        card=probe.card(
            bn_policy="both",
            parameters=both[0].card.parameters,
            dtype=both[0].card.dtype,
            solver=both[0].card.solver,
        ),
    )
