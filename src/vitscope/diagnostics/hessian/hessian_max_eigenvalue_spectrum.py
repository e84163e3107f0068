"""The paper's Hessian max-eigenvalue spectrum: the top eigenvalues of many mini-batches, pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.diagnostics.hessian import _nep_statistics
from vitscope.diagnostics.hessian._batchwise_spectrum import BatchwiseSpectrum
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, batch_products, search_products
from vitscope.runtime.resumable_map import Row
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class HessianMaxEigenvalueSpectrumResult(Result, coordinates={"batch": "batches", "grid": "grid"}):
    """Top eigenvalues by mini-batch, and what the paper makes of them.

    A value is negative where it is below minus its residual, positive where it is above it; those within their residual of
    zero are counted apart. Intervals are of 95 % over batches: NEP's needs 8 of them, APE's 4, and is NaN otherwise.

    Attributes:
        eigenvalues: (n_batches, n_top) signed, by magnitude descending.
        residuals: (n_batches, n_top) norms of H v - lambda v.
        errors: (n_batches, n_top) estimates of the distance to the eigenvalue.
        converged: (n_batches, n_top) whether that is within the tolerance.
        n_products: (n_batches,) products with the batch's Hessian.
        l2_contribution: (n_batches, n_top) the L2 term's share of each value.
        largest, smallest: (n_batches, n_ends) either end by itself, where asked for.
        batches: (n_batches,) the batches' numbers.
        negative_eigenvalue_proportion: NEP, share of the pooled values that are negative.
        negative_eigenvalue_proportion_interval: (2,).
        average_positive_eigenvalue: APE, mean of the pooled positive values; NaN where there is none.
        average_positive_eigenvalue_interval: (2,).
        near_zero_proportion: Share within the residual of zero.
        top1_negative_eigenvalue_proportion, top1_average_positive_eigenvalue: The same of each batch's first value.
        smallest_negative_proportion: Share of the batches whose smallest eigenvalue is negative; NaN unless asked for.
        largest_average: Mean over batches of the largest eigenvalue; NaN unless asked for.
        grid: (n_grid,) eigenvalues at which the density is given.
        density: (n_grid,) Gaussian kernel density of the pooled values (for figures only; NEP and APE are from the values).
        card: Conditions of the measurement.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    n_products: np.ndarray
    l2_contribution: np.ndarray
    largest: np.ndarray
    smallest: np.ndarray
    batches: np.ndarray
    negative_eigenvalue_proportion: float
    negative_eigenvalue_proportion_interval: np.ndarray
    average_positive_eigenvalue: float
    average_positive_eigenvalue_interval: np.ndarray
    near_zero_proportion: float
    top1_negative_eigenvalue_proportion: float
    top1_average_positive_eigenvalue: float
    smallest_negative_proportion: float
    largest_average: float
    grid: np.ndarray
    density: np.ndarray
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged; the average over positive first values only where a batch has one."""
        logged = {
            "negative_eigenvalue_proportion": self.negative_eigenvalue_proportion,
            "average_positive_eigenvalue": self.average_positive_eigenvalue,
            "top1_negative_eigenvalue_proportion": self.top1_negative_eigenvalue_proportion,
            "top1_average_positive_eigenvalue": self.top1_average_positive_eigenvalue,
            "near_zero_proportion": self.near_zero_proportion,
            "eigenvalue_max": float(self.eigenvalues.max()),
            "eigenvalue_min": float(self.eigenvalues.min()),
            "converged": float(self.converged.mean()),
            "n_batches": float(len(self.batches)),
            "n_products": float(self.n_products.sum()),
        }
        if np.isnan(self.top1_average_positive_eigenvalue):  # few batches, each led by a negative value: no failure
            del logged["top1_average_positive_eigenvalue"]
        return logged


def _cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return the products of each batch's search and the basis of the longest one; None for power iteration."""
    n_top, n_ends = int(options["n_top"]), int(options["n_ends"])
    products = search_products(workload, options, n_top + 2 * n_ends)
    if products is None:
        return None
    n_batches = workload.n_batches
    # values, residuals, errors, flags of one byte and L2 shares; both ends; products and numbers of batches; grid and density
    entries = n_batches * (4 * n_top + 2 * n_ends + 2) + 2 * _nep_statistics.N_GRID + 4
    return MeasureCost(
        batch_products(workload, options, products),
        held_bytes=basis_bytes(workload, products.expected),
        result_bytes=ENTRY * entries + n_batches * n_top,
        limit_s=options.get("budget_s"),
    )


@declares_cost(_cost)
@record_options
@curvature_arguments()
def hessian_max_eigenvalue_spectrum(
    probe: Probe,
    *,
    n_top: PositiveInt = 5,
    n_ends: NonNegativeInt = 0,
    budget_s: PositiveFloat | None = None,
    batches_at_once: int | None = None,
    partial: ResumableRows | None = None,
    **curvature: Unpack[CurvatureArguments],
) -> HessianMaxEigenvalueSpectrumResult:
    """Compute the ``n_top`` eigenvalues of largest magnitude of every mini-batch's Hessian.

    Each batch of the probe gives one Hessian: of the mean over its images plus the L2 term. Under ``torch.distributed``
    batches are split over ranks.

    Args:
        probe: The model, frozen augmented mini-batches (16 images in the paper) and the objective.
        n_top: Eigenvalues of each batch (``k`` is accepted too).
        n_ends: Number of the largest and of the smallest eigenvalues that are returned too, from the same run; 0 for none.
        budget_s: Seconds that may be spent: one product is timed first, time and memory are predicted and printed, and as
            many batches are analyzed as fit, at least one; the card states what was done. None for all batches.
        batches_at_once: Batches of equal shape analyzed together under vmap (`linalg.batched_lanczos`): 1 one after the other,
            None for what fits on a GPU and 1 on a CPU.
        partial: Rows of batches already done, by ``batch-<number>``; new ones are added as soon as they are known.
        curvature: The fields of `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: No parameters, fewer parameters than ``n_top``, an unknown name, a compiled or inference-mode model, a
            batch on another device, a budget that is not positive, or several batches at once where that cannot be: power
            iteration, another operator, batch statistics, or a model that vmap cannot differentiate.
        NumericalError: A loss that is not finite.

    Source: Park & Kim (ICLR 2022), figures 1c, 4, 6, 7, C.4; docs/definitions.md section 2. Deviation: Lanczos with residuals
    in place of power iteration with a tolerance on its change (``solver="power"``).
    """
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options) as operators:
        spectrum = BatchwiseSpectrum(operators, n_top, n_ends, batches_at_once, budget_s)
        rows, course = spectrum.rows({} if partial is None else partial)
        facts = {
            "n_top": n_top,
            "n_ends": n_ends,
            "ranking": "magnitude",
            **options.values("tol", "solver", "max_products", "seed"),
            **course,
        }
        card = operators.card(facts, n_images=_images(probe, rows))
    return _result(rows, card)


def _images(probe: Probe, rows: Mapping[int, Row]) -> int:
    """Return the images in the batches that were analyzed."""
    if len(rows) == probe.n_batches:
        return probe.n_images
    return sum(len(x) for index, (x, _) in enumerate(probe.batches) if index in rows)


def _result(rows: Mapping[int, Row], card: ObjectiveCard) -> HessianMaxEigenvalueSpectrumResult:
    order = sorted(rows)
    table = {key: np.array([rows[index][key] for index in order]) for key in rows[order[0]]}
    values, residuals = table["eigenvalues"], table["residuals"]
    first, smallest = (values[:, :1], residuals[:, :1]), (table["smallest"], table["smallest_residuals"])
    grid, density = _nep_statistics.kernel_density(values)
    return HessianMaxEigenvalueSpectrumResult(
        eigenvalues=values,
        residuals=residuals,
        errors=table["errors"],
        converged=table["converged"].astype(bool),
        n_products=table["n_products"].astype(int),
        l2_contribution=table["l2_contribution"],
        largest=table["largest"],
        smallest=table["smallest"],
        batches=np.array(order),
        negative_eigenvalue_proportion=_nep_statistics.negative_proportion(values, residuals),
        negative_eigenvalue_proportion_interval=_nep_statistics.proportion_interval(values, residuals),
        average_positive_eigenvalue=_nep_statistics.positive_average(values, residuals),
        average_positive_eigenvalue_interval=_nep_statistics.average_interval(values, residuals),
        near_zero_proportion=_nep_statistics.near_zero_proportion(values, residuals),
        top1_negative_eigenvalue_proportion=_nep_statistics.negative_proportion(*first),
        top1_average_positive_eigenvalue=_nep_statistics.positive_average(*first),
        smallest_negative_proportion=_nep_statistics.negative_proportion(smallest[0][:, :1], smallest[1][:, :1]),
        largest_average=float(table["largest"][:, 0].mean()) if table["largest"].size else float("nan"),
        grid=grid,
        density=density,
        card=card,
    )
