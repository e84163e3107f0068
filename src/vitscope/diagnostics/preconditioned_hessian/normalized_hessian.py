"""Eigenvalues of D H D with D = diag(abs(w)), which do not change when weights are rescaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.linalg.curvature.product_cost import basis_bytes, lanczos_products, mean_products, restricted
from vitscope.linalg.preconditioned_operator import scaled_eigenvalues
from vitscope.linalg.ritz_values import Which
from vitscope.linalg.weights.directions import filter_parameters, moving
from vitscope.linalg.weights.effective_weights import pruning_masks, refuse_made_weights
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class NormalizedHessianResult(Result):
    """Eigenvalues in units of the weights' own size.

    Attributes:
        eigenvalues: (k,) of D H D, signed, by magnitude descending (``LM``), descending (``LA``), ascending (``SA``).
        residuals: (k,).
        errors: (k,) estimates of the distance to the eigenvalue.
        converged: (k,) booleans.
        n_products: Products with the Hessian.
        n_moving: Parameters that ``ignore`` leaves to move.
        card: Conditions of the measurement.
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


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the products of the search among the weights that move."""
    parameters = workload.model_probe().parameters()
    names = moving(dict(parameters), options["ignore"])
    moved = restricted(workload, sum(parameters[name].numel() for name in names))
    k = int(options["k"]) * (2 if options["which"] == "both" else 1)
    products = lanczos_products(moved, options, k)
    return MeasureCost(
        mean_products(workload, options, products, gradients=1),
        held_bytes=moved.parameter_bytes,  # D
        held_bytes_shared=basis_bytes(moved, products.expected),
        result_bytes=ENTRY * 3 * k + k,  # a flag takes a byte
    )


@declares_cost(_cost)
@record_options
@curvature_arguments("tol", "dtype", "bn", "micro_batch", "max_products", "max_memory", "basis", "seed")
def normalized_hessian(
    probe: Probe,
    *,
    k: PositiveInt = 5,
    which: Which = "LM",
    normalization: Literal["weight", "filter"] = "weight",
    ignore: str = "bias_bn",
    **curvature: Unpack[CurvatureArguments],
) -> NormalizedHessianResult:
    """Compute extreme eigenvalues of D H D, the Hessian in coordinates scaled by the size of the weights.

    D is diagonal. With ``weight`` its entries are the weights' absolute values, D = diag(|w|). Where w' = S w with a positive
    diagonal S gives the same function, H' = S^-1 H S^-1 and D' = S D, so that D' H' D' = D H D entry by entry: the eigenvalues
    are unchanged by every rescaling of single weights that leaves the function alone. Such are, in a network of ReLUs
    (positively homogeneous), a unit's or channel's incoming weights and bias times c and its outgoing weights times 1 / c, in
    linear layers and convolutions alike; a convolution's filter times c before a BatchNorm on its own statistics
    (``bn="batch"``), up to the layer's eps; before one on running statistics where the running mean and deviation are scaled too.
    Changing signs changes no eigenvalue either; rotations do. A weight that is zero does not move.

    With ``filter`` an entry of a filter (a row of dimension 0 of a Linear or Conv weight) has that filter's norm, an entry of
    another tensor the tensor's norm. These are the coordinates of the ``filter`` landscape: its curvature along a unit direction
    lies between the extreme eigenvalues. They are unchanged where all of a layer's units are scaled by one c and the next layer
    by 1 / c, and where a filter is scaled before a BatchNorm; **not** where one unit is, for the next layer's rows mix
    columns of scaled and other units.

    What ``ignore`` leaves out does not move: the block of H that belongs to the others is as invariant as the whole.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        k: Number of eigenvalues (``n_top`` is accepted too).
        which: ``LM``, ``LA``, ``SA`` or ``both``.
        normalization: ``weight`` or ``filter``, see above.
        ignore: Parameters that do not move, as for the landscape: ``bias_bn`` (one-dimensional parameters and position tables).
        curvature: ``tol``, ``dtype``, ``bn``, ``micro_batch``, ``max_products``, ``max_memory``, ``basis``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: An unknown normalization, or weights that are made from parameters (weight norm, spectral norm); and as
            `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Source: D = diag(|w|) is that of Kwon et al., ASAM (ICML 2021), element-wise; filter norms of Li et al. (NeurIPS 2018),
    section 4.
    """
    if normalization not in ("weight", "filter"):
        raise ValueError(f"Expected normalization to be weight or filter, received {normalization!r}.")
    moving_names = list(moving(dict(probe.parameters()), ignore))
    options = CurvatureOptions(**{**curvature, "parameters": moving_names})
    subset = subset_name(probe.model, f"all but {ignore}")  # inside `curvatures` the others' gradients are switched off
    with curvatures(probe, options) as operators:
        mean, parameters = operators.mean(), operators.parameters
        refuse_made_weights(operators.model, parameters, "filter")
        filters, masks = filter_parameters(operators.model), pruning_masks(operators.model)
        # a pruned entry counts in no norm, and D sets it to zero
        used = {name: masks[name].to(p) if name in masks else torch.ones_like(p) for name, p in parameters.items()}
        scale = [
            (p.detach().double().abs() if normalization == "weight" else _norms(p * used[name], name in filters))
            * used[name]
            for name, p in parameters.items()
        ]
        pairs = scaled_eigenvalues(
            mean, scale, k=k, which=which, shared=True, memory=operators.basis_memory(shared=True), **options.search()
        )
        return NormalizedHessianResult(
            eigenvalues=pairs.values,
            residuals=pairs.residuals,
            errors=pairs.errors,
            converged=pairs.converged,
            n_products=pairs.n_products,
            n_moving=mean.size,
            card=operators.card(
                {
                    "k": k,
                    "which": which,
                    **options.values("tol", "max_products", "seed"),
                    "normalization": normalization,
                },
                parameters=subset,
            ),
        )


def _norms(p: Tensor, has_filters: bool) -> Tensor:
    axes = tuple(range(1 if has_filters and p.ndim > 1 else 0, p.ndim))
    return torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True, dtype=torch.float64)
