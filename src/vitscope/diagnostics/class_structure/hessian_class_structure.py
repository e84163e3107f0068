"""Outliers of the Hessian's spectrum against the number of classes, and what they are made of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.losses.requirements import check_classes
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.class_structure._class_gradients import PARTS
from vitscope.diagnostics.class_structure._cost import class_structure_cost, n_logits
from vitscope.diagnostics.class_structure._gauss_newton import measure_gauss_newton
from vitscope.diagnostics.class_structure._hessian_outliers import find_hessian_outliers
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.runtime.value_ranges import IntAboveOneOrNone, PositiveInt


@dataclass(frozen=True)
class HessianClassStructureResult(Result, coordinates={"part": "parts"}):
    """The largest eigenvalues of the Hessian H and of its Gauss-Newton part G, and their class structure.

    C is the number of logits. Numbers that are not defined are NaN.

    Attributes:
        eigenvalues: (k,) the largest of H, in descending order.
        residuals: (k,) norms of H v - lambda v.
        converged: (k,) whether the estimated error is within the tolerance.
        n_outliers: Eigenvalues of H above the bulk.
        gap_ratio: Ratio of the last outlier to the eigenvalue below it.
        gap_p_value: Probability of such a gap within a bulk, for all places tried.
        n_outliers_of_splits: (n_splits,) the same count on disjoint parts of the images.
        verdict: The number that the count matches: ``C - 1``, ``C``, ``C (C - 1)`` and ``C^2`` the count is, ``none``, or
            ``undecided`` where parts of the images give other counts or there are no parts, where no gap stands out, or
            eigenvalues have not converged.
        verdict_reason: Why the verdict is ``undecided``; otherwise empty.
        gauss_newton: (k,) v^T G v of each eigenvector of H.
        remainder: (k,) v^T (H - G) v without the L2 term.
        l2: (k,) v^T H_L2 v.
        parts: (n_parts,) names of the parts of G: ``class``, ``cross_class``, ``same_class`` and ``within``.
        part_values: (n_parts, k) v^T A v of each part A; they add up to ``gauss_newton``.
        part_traces: (n_parts,) traces of the parts; they add up to the trace of G.
        within_standard_error: Standard error of the trace of ``within``, the only one that is estimated.
        part_shares: (n_parts,) shares of the trace of G.
        gradient_overlap: (k,) share of the squared gradient of the objective in the span of the first 1, 2, ... eigenvectors.
        ggn_eigenvalues: (k,) the largest of G, without the L2 term, in descending order.
        ggn_converged: (k,) as ``converged``.
        ggn_n_outliers: Eigenvalues of G above the bulk.
        ggn_gap_ratio: ``gap_ratio`` of G.
        class_eigenvalues: (n_classes,) eigenvalues of the part ``class`` of G.
        n_classes: Number of logits C.
        n_classes_present: Classes that have images.
        size: Number of parameters.
        n_products: Products with H or G made.
        card: Conditions of the measurement.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    n_outliers: float
    gap_ratio: float
    gap_p_value: float
    n_outliers_of_splits: np.ndarray
    verdict: str
    verdict_reason: str
    gauss_newton: np.ndarray
    remainder: np.ndarray
    l2: np.ndarray
    parts: tuple[str, ...]
    part_values: np.ndarray
    part_traces: np.ndarray
    within_standard_error: float
    part_shares: np.ndarray
    gradient_overlap: np.ndarray
    ggn_eigenvalues: np.ndarray
    ggn_converged: np.ndarray
    ggn_n_outliers: float
    ggn_gap_ratio: float
    class_eigenvalues: np.ndarray
    n_classes: int
    n_classes_present: int
    size: int
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: counts, shares of the trace, and the gradient in the span of the first C eigenvectors."""
        at_classes = min(self.n_classes, len(self.gradient_overlap)) - 1
        return {
            "n_outliers": self.n_outliers,
            "n_outliers_decided": float(self.verdict != "undecided"),
            "gap_ratio": self.gap_ratio,
            "ggn_n_outliers": self.ggn_n_outliers,
            **{f"trace_share_{part}": float(share) for part, share in zip(self.parts, self.part_shares)},
            "gradient_overlap": float(self.gradient_overlap[at_classes]),
            "top_eigenvalue": float(self.eigenvalues[0]),
            "n_products": float(self.n_products),
        }


@declares_cost(class_structure_cost)
@record_options
@curvature_arguments(
    "tol", "parameters", "dtype", "micro_batch", "max_products", "max_memory", "seed", tol=1e-2, max_products=400
)
def hessian_class_structure(
    probe: Probe,
    *,
    k: PositiveInt | None = None,
    n_splits: IntAboveOneOrNone = 2,
    n_vectors: PositiveInt = 20,
    **curvature: Unpack[CurvatureArguments],
) -> HessianClassStructureResult:
    """Count the eigenvalues of the Hessian above its bulk, and split them into class means and the rest.

    The Gauss-Newton part of the cross entropy is ``G = sum w d d^T`` over images i and labels c', with ``d`` the gradient that
    image i would have with label c' and ``w`` the probability of c' over the number of images. With the means of ``d`` over the
    images of class c for each c' (cross-class means), and their weighted mean over c' other than c (class means), G is a sum of
    four positive semi-definite parts: ``class`` of rank C at most, ``cross_class`` of rank C (C - 2) at most, ``same_class`` of
    the means with c' = c, and ``within`` around the means. The first three are exact; the trace of ``within`` is Hutchinson's
    estimate.

    Eigenvalues above the bulk are counted by the last gap of the sorted logarithms that is too wide for the gaps that follow it:
    see docs/curvature.md. What ``l2="half_sq"`` adds to every eigenvalue is subtracted before. The count is repeated on disjoint
    parts of the images, drawn at random; it is decided only where all agree.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        k: Eigenvalues of H and of G; None for 2 C + 10, at most 100. At most k - 9 outliers can be counted: for those of
            C (C - 1) pass as many.
        n_splits: Parts of the images on which the count is repeated; 0 for none, then it is not decided.
        n_vectors: Random vectors for the trace of ``within``.
        curvature: ``tol``, ``parameters``, ``dtype``, ``micro_batch``, ``max_products`` (of each search), ``max_memory``,
            ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Another loss than the cross entropy, one split, fewer images than splits; and as `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Example:
        ``vs.hessian_class_structure(probe).verdict`` is ``"C - 1"`` where C - 1 eigenvalues stand above the bulk.

    Source: Papyan, Measurements of Three-Level Hierarchical Structure in the Outliers in the Spectrum of Deepnet Hessians (ICML
    2019); Papyan, Traces of Class/Cross-Class Structure Pervade Deep Learning Spectra (JMLR 2020), whose part c = c' holds the
    vectors around their means too; Gur-Ari, Roberts and Dyer, Gradient Descent Happens in a Tiny Subspace (2018) for the overlap.
    The counting rule is vitscope's own.
    """
    options = CurvatureOptions(**curvature)
    check_classes(probe, "hessian_class_structure")
    if n_splits == 1 or n_splits > probe.n_images:
        raise ValueError(
            f"Expected n_splits to be 0 or from 2 to the {probe.n_images} images, received {n_splits}; 2 is usual."
        )
    n_classes = n_logits(probe, options)
    hessian = find_hessian_outliers(probe, options, k, n_classes, n_splits, n_vectors)
    values = hessian.pairs.values
    ggn = measure_gauss_newton(probe, options, hessian.vectors, n_classes, n_vectors)
    n_present = int((ggn.means.weights.sum(1) > 0).sum())
    if n_present < n_classes:
        warnings.warn(
            f"hessian_class_structure: {n_present} of {n_classes} classes have images; counts are compared with the number of "
            "logits",
            stacklevel=2,
        )
    if n_vectors == 1:
        warn_nulls("hessian_class_structure", {"within_standard_error": "one random vector"})
    forms = ggn.means.quadratic_forms()  # (3, k + n_vectors)
    exact = forms[:, : len(values)]
    within = ggn.random_forms - forms[:, len(values) :].sum(0)
    traces = np.append(ggn.means.traces(), within.mean())
    return HessianClassStructureResult(
        eigenvalues=values,
        residuals=hessian.pairs.residuals,
        converged=hessian.pairs.converged,
        n_outliers=float(hessian.count.count),
        gap_ratio=hessian.count.gap_ratio,
        gap_p_value=hessian.count.p_value,
        n_outliers_of_splits=np.array([float(count.count) for count in hessian.split_counts]),
        verdict=hessian.verdict,
        verdict_reason=hessian.reason,
        gauss_newton=ggn.forms,
        remainder=values - ggn.forms - hessian.l2,
        l2=hessian.l2,
        parts=PARTS,
        part_values=np.vstack([exact, ggn.forms - exact.sum(0)]),
        part_traces=traces,
        within_standard_error=float(within.std(ddof=1) / np.sqrt(n_vectors)) if n_vectors > 1 else float("nan"),
        part_shares=traces / traces.sum() if traces.sum() > 0 else np.full(len(PARTS), np.nan),
        gradient_overlap=hessian.overlap,
        ggn_eigenvalues=ggn.eigenvalues,
        ggn_converged=ggn.converged,
        ggn_n_outliers=float(ggn.count.count),
        ggn_gap_ratio=ggn.count.gap_ratio,
        class_eigenvalues=ggn.means.class_eigenvalues,
        n_classes=n_classes,
        n_classes_present=n_present,
        size=hessian.size,
        n_products=hessian.n_products + ggn.n_products,
        card=hessian.card,
    )
