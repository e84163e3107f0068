"""Outliers of the Hessian's spectrum against the number of classes, and what they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import selected_images
from vitscope.core.losses.requirements import check_classes
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.class_structure._class_gradients import PARTS, ClassGradients, class_gradients
from vitscope.diagnostics.class_structure._outlier_count import (
    LEAST_BULK_GAPS,
    OutlierCount,
    count_outliers,
    largest_countable,
    matched_number,
)
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.start_vector import random_signs, start_vector, vector_seed
from vitscope.linalg.eigensolver import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.krylov_basis import dot
from vitscope.linalg.solvers import l2_contribution, solve
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveInt
from vitscope.stats.jackknife import group_numbers_of_batch

#: eigenvalues computed without ``k``: twice the classes and ten, at most this many
MOST_EIGENVALUES = 100


@dataclass(frozen=True)
class HessianClassStructureResult(Result, coordinates={"part": "parts"}):
    """The largest eigenvalues of the Hessian H and of its Gauss-Newton part G, and their class structure.

    C is the number of logits. Numbers that are not defined are NaN.

    Attributes:
        eigenvalues: (k,) the largest of H, in descending order.
        residuals: (k,) norms of H v - lambda v.
        converged: (k,) whether the estimated error is within the tolerance.
        n_outliers: eigenvalues of H above the bulk.
        gap_ratio: ratio of the last outlier to the eigenvalue below it.
        gap_p_value: probability of such a gap within a bulk, for all places tried.
        n_outliers_of_splits: (n_splits,) the same count on disjoint parts of the images.
        verdict: which of ``C - 1``, ``C``, ``C (C - 1)`` and ``C^2`` the count is, ``none``, or ``undecided`` where parts of the
            images give other counts or there are no parts, where no gap stands out, or eigenvalues have not converged.
        verdict_reason: why the verdict is ``undecided``; otherwise empty.
        gauss_newton: (k,) v^T G v of each eigenvector of H.
        remainder: (k,) v^T (H - G) v without the L2 term.
        l2: (k,) v^T H_L2 v.
        parts: (n_parts,) names of the parts of G: ``class``, ``cross_class``, ``same_class`` and ``within``.
        part_values: (n_parts, k) v^T A v of each part A; they add up to ``gauss_newton``.
        part_traces: (n_parts,) traces of the parts; they add up to the trace of G.
        within_standard_error: of the trace of ``within``, the only one that is estimated.
        part_shares: (n_parts,) shares of the trace of G.
        gradient_overlap: (k,) share of the squared gradient of the objective in the span of the first 1, 2, ... eigenvectors.
        ggn_eigenvalues: (k,) the largest of G, without the L2 term, in descending order.
        ggn_converged: (k,) as ``converged``.
        ggn_n_outliers: eigenvalues of G above the bulk.
        ggn_gap_ratio: as ``gap_ratio``.
        class_eigenvalues: (n_classes,) eigenvalues of the part ``class`` of G.
        n_classes: number of logits C.
        n_classes_present: classes that have images.
        size: number of parameters.
        n_products: products with H or G made.
        card: under which conditions.
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


@record_options
@curvature_arguments(
    "tol", "parameters", "dtype", "micro_batch", "max_products", "max_memory", "seed", tol=1e-2, max_products=400
)
def hessian_class_structure(
    probe: Probe,
    *,
    k: PositiveInt | None = None,
    n_splits: NonNegativeInt = 2,
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
        probe: the model, batches and objective; batches are split over ranks.
        k: eigenvalues of H and of G; None for 2 C + 10, at most 100. At most k - 9 outliers can be counted: for those of
            C (C - 1) pass as many.
        n_splits: parts of the images on which the count is repeated; 0 for none, then it is not decided.
        n_vectors: random vectors for the trace of ``within``.
        curvature: ``tol``, ``parameters``, ``dtype``, ``micro_batch``, ``max_products`` (of each search), ``max_memory``,
            ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: another loss than the cross entropy, one split, fewer images than splits; and as `hessian_eigenvalues`.
        NumericalError: a loss that is not finite.

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
    n_classes = _n_logits(probe, options)
    hessian = _hessian_outliers(probe, options, k, n_classes, n_splits, n_vectors)
    values = hessian.pairs.values
    ggn = _gauss_newton_structure(probe, options, hessian.vectors, n_classes, n_vectors)
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


@dataclass(frozen=True)
class _HessianOutliers:
    """The largest eigenpairs of H, in descending order, their counts and the verdict; fields as those of the result."""

    pairs: Eigenpairs
    vectors: Tensor
    overlap: np.ndarray
    l2: np.ndarray
    count: OutlierCount
    split_counts: list[OutlierCount]
    verdict: str
    reason: str
    size: int
    n_products: int
    card: ObjectiveCard


@dataclass(frozen=True)
class _GaussNewtonStructure:
    """The largest eigenvalues of G, quadratic forms of G with eigenvectors of H and with random signs, and class means."""

    eigenvalues: np.ndarray
    converged: np.ndarray
    count: OutlierCount
    forms: np.ndarray
    random_forms: np.ndarray
    means: ClassGradients
    n_products: int


def _hessian_outliers(
    probe: Probe, options: CurvatureOptions, k: int | None, n_classes: int, n_splits: int, n_vectors: int
) -> _HessianOutliers:
    with curvatures(probe, options) as operators:
        hessian = operators.mean()
        n_values = k if k is not None else min(2 * n_classes + 10, MOST_EIGENVALUES, hessian.size)
        pairs = _by_value(solve(hessian, k=n_values, which="LA", vectors=True, shared=True, **options.search()).pairs)
        assert pairs.vectors is not None
        overlap, l2 = _overlap(hessian.gradient(), pairs.vectors), l2_contribution(hessian, pairs)
        hessian.release()
        splits = [_pairs_of_split(operators, number, n_splits, n_values) for number in range(n_splits)]
        card = operators.card({
            "k": n_values, "n_splits": n_splits, "n_vectors": n_vectors, "ranking": "largest", "outliers": "last wide gap",
            **options.values("tol", "max_products", "seed"),
        })  # fmt: skip
    count, *split_counts = (count_outliers(p.values - hessian.shift) for p in (pairs, *splits))
    verdict, reason = _verdict(count, split_counts, pairs, splits, n_classes)
    n_products = hessian.n_products + sum(split.n_products for split in splits)
    return _HessianOutliers(
        pairs, pairs.vectors, overlap, l2, count, split_counts, verdict, reason, hessian.size, n_products, card
    )


def _gauss_newton_structure(
    probe: Probe, options: CurvatureOptions, vectors: Tensor, n_classes: int, n_vectors: int
) -> _GaussNewtonStructure:
    with curvatures(probe, options, operator="ggn") as operators:
        ggn = operators.mean()
        start = start_vector(ggn, options.seed)
        pairs = extreme_eigenvalues(ggn.data_product, start, len(vectors), which="LA", shared=True, **options.search())
        forms = np.array([dot(v, ggn.data_product(v)) for v in track(vectors, "Gauss-Newton part")])
        signs = [partial(random_signs, ggn, vector_seed(options.seed, i)) for i in range(n_vectors)]
        random_forms = np.array([dot(z(), ggn.data_product(z())) for z in track(signs, "trace")])
        ggn.release()
        means = class_gradients(
            operators.model,
            lambda: (piece for _, batch in probe.local_batches() for piece in _pieces(batch, options.micro_batch)),
            operators.parameters,
            n_classes,
            probe.n_labeled,
            [*(partial(_row, vectors, i) for i in range(len(vectors))), *signs],
            options.max_memory,
        )
    order = np.argsort(-pairs.values, kind="stable")
    values = pairs.values[order]
    return _GaussNewtonStructure(
        values, pairs.converged[order], count_outliers(values), forms, random_forms, means, ggn.n_products
    )


def _n_logits(probe: Probe, options: CurvatureOptions) -> int:
    with probe.guard(dtype=options.torch_dtype, micro_batch=options.micro_batch) as model:
        x, _ = next(probe.iter_batches())
        return int(model(x[:1]).shape[1])


def _by_value(pairs: Eigenpairs) -> Eigenpairs:
    """Return the pairs in descending order of their values."""
    order = np.argsort(-pairs.values, kind="stable")
    assert pairs.vectors is not None
    return Eigenpairs(
        pairs.values[order], pairs.residuals[order], pairs.errors[order], pairs.converged[order], pairs.n_products,
        pairs.vectors[torch.as_tensor(order.copy(), device=pairs.vectors.device)], pairs.resolution,
    )  # fmt: skip


def _overlap(gradient: Tensor, vectors: Tensor) -> np.ndarray:
    square = dot(gradient, gradient)
    if not square > 0:
        return np.full(len(vectors), np.nan)
    return np.cumsum([dot(gradient, v) ** 2 for v in vectors]) / square


def _row(vectors: Tensor, i: int) -> Tensor:
    return vectors[i]


def _pieces(batch: Batch, micro_batch: int | None) -> Iterator[Batch]:
    x, y = batch
    step = micro_batch or len(x)
    return ((x[a : a + step], y[a : a + step]) for a in range(0, len(x), step))


def _pairs_of_split(operators: Curvatures, number: int, n_splits: int, n_values: int) -> Eigenpairs:
    """Return the largest eigenvalues of the Hessian on one part of the images."""
    probe, options = operators.probe, operators.options

    def selected(index: int, batch: Batch) -> Batch | None:
        x, y = batch
        images = np.flatnonzero(group_numbers_of_batch(index, len(x), n_splits) == number).tolist()
        return (selected_images(x, images), y[images]) if images else None

    def batches() -> Iterator[tuple[int, Batch]]:
        for index, batch in probe.local_batches():
            part = selected(index, batch)
            if part is not None:
                yield index, part

    parts = (selected(index, batch) for index, batch in enumerate(probe.iter_batches()))
    n_images = sum(probe.objective.n_examples(part[1]) for part in parts if part is not None)
    operator: Curvature = operators.of(batches, n_images, reduce=True)
    pairs = solve(operator, k=n_values, which="LA", shared=True, **options.search()).pairs
    operator.release()
    return pairs


def _verdict(
    count: OutlierCount, splits: list[OutlierCount], pairs: Eigenpairs, split_pairs: list[Eigenpairs], n_classes: int
) -> tuple[str, str]:
    """Return which number the count matches, or ``undecided`` and the reason."""
    reasons: list[tuple[bool, Callable[[], str]]] = [
        (
            len(pairs.values) <= LEAST_BULK_GAPS + 1,
            lambda: (
                f"{len(pairs.values)} eigenvalues are too few to count outliers: k must be {LEAST_BULK_GAPS + 2} or more"
            ),
        ),
        (
            count.count == 0,
            lambda: (
                f"no gap among the first {largest_countable(len(pairs.values))} eigenvalues is wider than those that follow"
            ),
        ),
        (not splits, lambda: "the count was not repeated on parts of the images (n_splits=0)"),
        (
            any(split.count != count.count for split in splits),
            lambda: "parts of the images give " + ", ".join(str(split.count) for split in splits),
        ),
        (
            not all(bool(p.converged[np.argsort(-p.values)][: count.count + 1].all()) for p in (pairs, *split_pairs)),
            lambda: "eigenvalues around the gap have not converged",
        ),
    ]
    for is_reason, text in reasons:
        if is_reason:
            return "undecided", text()
    return matched_number(count.count, n_classes), ""
