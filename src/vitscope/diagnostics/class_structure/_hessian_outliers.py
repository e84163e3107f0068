"""The largest eigenpairs of the Hessian, how many of them stand above the bulk, and the same on parts of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import selected_images
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.diagnostics.class_structure._cost import n_searched
from vitscope.diagnostics.class_structure._outlier_count import (
    LEAST_BULK_GAPS,
    OutlierCount,
    count_outliers,
    largest_countable,
    matched_number,
)
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.eigensolver import Eigenpairs
from vitscope.linalg.krylov_basis import dot
from vitscope.linalg.solvers import l2_contribution, solve
from vitscope.stats.jackknife import group_numbers_of_batch


@dataclass(frozen=True)
class HessianOutliers:
    """The largest eigenpairs of the Hessian H, how many of them are outliers, and the verdict on the count.

    Attributes:
        pairs: The k largest eigenpairs, in descending order.
        vectors: (k, size) their eigenvectors.
        overlap: (k,) as ``gradient_overlap`` of the result.
        l2: (k,) as ``l2`` of the result.
        count: Eigenvalues above the bulk.
        split_counts: The same count on each part of the images.
        verdict: The verdict of the result.
        reason: The ``verdict_reason`` of the result.
        size: Number of parameters.
        n_products: Number of products with H of all searches.
        card: Conditions of the measurement.
    """

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


def find_hessian_outliers(
    probe: Probe, options: CurvatureOptions, k: int | None, n_classes: int, n_splits: int, n_vectors: int
) -> HessianOutliers:
    """Compute the largest eigenpairs of the Hessian, count outliers, and count again on parts of the images.

    Args:
        probe: The model, batches and objective.
        options: Options of the curvature.
        k: Number of eigenvalues; None for twice the classes and ten, at most 100.
        n_classes: Number of logits C.
        n_splits: Number of disjoint parts of the images on which the count is repeated.
        n_vectors: Number of random vectors of the measure, for the card.
    """
    with curvatures(probe, options) as operators:
        hessian = operators.mean()
        n_values = n_searched(k, n_classes, hessian.size)
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
    return HessianOutliers(
        pairs, pairs.vectors, overlap, l2, count, split_counts, verdict, reason, hessian.size, n_products, card
    )


def _by_value(pairs: Eigenpairs) -> Eigenpairs:
    """Return the pairs in descending order of their values."""
    order = np.argsort(-pairs.values, kind="stable")
    assert pairs.vectors is not None
    return Eigenpairs(
        pairs.values[order], pairs.residuals[order], pairs.errors[order], pairs.converged[order], pairs.n_products,
        pairs.vectors[torch.as_tensor(order.copy(), device=pairs.vectors.device)], pairs.resolution,
    )  # fmt: skip


def _overlap(gradient: Tensor, vectors: Tensor) -> np.ndarray:
    """Return the share of the squared gradient in the span of the first 1, 2, ... vectors; NaN for a gradient of zero."""
    square = dot(gradient, gradient)
    if not square > 0:
        return np.full(len(vectors), np.nan)
    return np.cumsum([dot(gradient, v) ** 2 for v in vectors]) / square


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
    reason, n_values = "", len(pairs.values)
    if n_values <= LEAST_BULK_GAPS + 1:
        reason = f"{n_values} eigenvalues are too few to count outliers: k must be {LEAST_BULK_GAPS + 2} or more"
    elif count.count == 0:
        reason = f"no gap among the first {largest_countable(n_values)} eigenvalues is wider than those that follow"
    elif not splits:
        reason = "the count was not repeated on parts of the images (n_splits=0)"
    elif any(split.count != count.count for split in splits):
        reason = "parts of the images give " + ", ".join(str(split.count) for split in splits)
    elif not all(_is_gap_converged(p, count.count) for p in (pairs, *split_pairs)):
        reason = "eigenvalues around the gap have not converged"
    return ("undecided", reason) if reason else (matched_number(count.count, n_classes), "")


def _is_gap_converged(pairs: Eigenpairs, n_outliers: int) -> bool:
    """Tell whether the outliers and the first eigenvalue of the bulk have converged."""
    order = np.argsort(-pairs.values)
    return bool(pairs.converged[order][: n_outliers + 1].all())
