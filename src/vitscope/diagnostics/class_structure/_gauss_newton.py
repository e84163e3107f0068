"""The Gauss-Newton part of the Hessian: its largest eigenvalues, quadratic forms and class means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from vitscope.core.probe import Batch, Probe
from vitscope.diagnostics.class_structure._class_gradients import ClassGradients, class_gradients
from vitscope.diagnostics.class_structure._outlier_count import OutlierCount, count_outliers
from vitscope.linalg.curvature.curvature_options import CurvatureOptions
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.start_vector import random_signs, start_vector, vector_seed
from vitscope.linalg.eigensolver import extreme_eigenvalues
from vitscope.linalg.krylov_basis import dot
from vitscope.runtime.progress import track


@dataclass(frozen=True)
class GaussNewtonStructure:
    """Spectrum, quadratic forms and class means of the Gauss-Newton part G of the Hessian.

    Attributes:
        eigenvalues: (k,) the largest of G, in descending order.
        converged: (k,) whether the estimated error is within the tolerance.
        count: Eigenvalues above the bulk.
        forms: (k,) v^T G v of each eigenvector v of the Hessian.
        random_forms: (n_vectors,) z^T G z of each vector z of random signs.
        means: Class means of the gradients, with their quadratic forms of the same vectors.
        n_products: Number of products with G.
    """

    eigenvalues: np.ndarray
    converged: np.ndarray
    count: OutlierCount
    forms: np.ndarray
    random_forms: np.ndarray
    means: ClassGradients
    n_products: int


def measure_gauss_newton(
    probe: Probe, options: CurvatureOptions, vectors: Tensor, n_classes: int, n_vectors: int
) -> GaussNewtonStructure:
    """Measure the Gauss-Newton part of the Hessian.

    Args:
        probe: The model, batches and objective.
        options: Options of the curvature.
        vectors: (k, size) eigenvectors of the Hessian.
        n_classes: Number of logits C.
        n_vectors: Number of random vectors for the trace.
    """
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
    return GaussNewtonStructure(
        values, pairs.converged[order], count_outliers(values), forms, random_forms, means, ggn.n_products
    )


def _row(vectors: Tensor, i: int) -> Tensor:
    """Return one vector; `class_gradients` takes functions, since random vectors are drawn anew instead of stored."""
    return vectors[i]


def _pieces(batch: Batch, micro_batch: int | None) -> Iterator[Batch]:
    """Return the micro-batches of a batch."""
    x, y = batch
    step = micro_batch or len(x)
    return ((x[a : a + step], y[a : a + step]) for a in range(0, len(x), step))
