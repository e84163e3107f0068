"""Eigenvalues of D H D with D the filters' norms: curvature that a rescaling of the network does not change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.curvatures import curvatures
from vitscope.linalg.directions import filter_parameters, moving
from vitscope.linalg.scaled import scaled_eigenvalues
from vitscope.measure_options import record_options
from vitscope.probe import ObjectiveCard, Probe


@dataclass(frozen=True)
class NormalisedHessianResult:
    """Eigenvalues in units of the weights' own size.

    Attributes:
        eigenvalues: (k,) of D H D, signed, by magnitude descending (``LM``), descending (``LA``), ascending (``SA``).
        residuals: (k,).
        errors: (k,) estimates of the distance to the eigenvalue.
        converged: (k,) booleans.
        n_products: products with the Hessian.
        n_moving: parameters that D does not set to zero.
        card: under which conditions.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    n_products: int
    n_moving: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        return {
            "eigenvalue_max": float(self.eigenvalues.max()),
            "eigenvalue_min": float(self.eigenvalues.min()),
            "converged": float(self.converged.mean()),
            "n_products": float(self.n_products),
        }


@record_options
def normalised_hessian(
    probe: Probe,
    *,
    k: int = 5,
    which: str = "LM",
    tol: float = 1e-3,
    ignore: str = "bias_bn",
    dtype: str | torch.dtype | None = None,
    bn: str = "eval",
    micro_batch: int | None = None,
    max_products: int = 200,
    max_memory: float | None = None,
    seed: int = 0,
) -> NormalisedHessianResult:
    """Compute extreme eigenvalues of D H D, the Hessian in filter-normalised coordinates.

    D is diagonal: an entry of a filter (a row of dimension 0 of a Linear or Conv weight) has that filter's norm, an entry of
    another tensor the tensor's norm. Scaling a filter by c and its successor by 1/c changes H, but not D H D. These are the
    coordinates of the ``filter`` landscape: its curvature along a unit direction lies between the extreme eigenvalues.

    Args:
        probe: the model, batches and objective; batches are split over ranks.
        k: how many eigenvalues.
        which: ``LM``, ``LA``, ``SA`` or ``both``.
        tol: relative error at which to stop.
        ignore: what does not move, as for the landscape: ``bias_bn`` (one-dimensional parameters and position tables).
        dtype: ``float32`` or ``float64``; None for the model's own.
        bn: BatchNorm on running statistics (``eval``) or on each batch's (``batch``).
        micro_batch: images held at once; None for a whole batch.
        max_products: the most products.
        max_memory: bytes the Lanczos basis may take.
        seed: of the start vector.

    Raises:
        ValueError: as `hessian_eigenvalues`.
        NumericalError: a loss that is not finite.

    Source: PAPER.md section 9; filter norms of Li et al. (NeurIPS 2018), section 4.
    """
    solving = {"k": k, "which": which, "tol": tol, "max_products": max_products, "seed": seed}
    subset = list(moving(dict(probe.parameters()), ignore))
    with curvatures(probe, parameters=subset, dtype=dtype, bn=bn, micro_batch=micro_batch, seed=seed) as made:
        mean = made.mean()
        filters = filter_parameters(made.model)
        scale = [_norms(p, name in filters) for name, p in made.parameters.items()]
        pairs = scaled_eigenvalues(mean, scale, shared=True, max_memory=max_memory, **solving)
        return NormalisedHessianResult(
            eigenvalues=pairs.values,
            residuals=pairs.residuals,
            errors=pairs.errors,
            converged=pairs.converged,
            n_products=pairs.n_products,
            n_moving=mean.size,
            card=made.card({**solving, "normalization": "filter"}, parameters=f"all but {ignore}"),
        )


def _norms(p: Tensor, has_filters: bool) -> Tensor:
    axes = tuple(range(1 if has_filters and p.ndim > 1 else 0, p.ndim))
    return torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True, dtype=torch.float64)
