"""The exponent with which curvature follows the singular values of each layer's gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.kronecker._layers import present_kinds, weight_matrices
from vitscope.diagnostics.kronecker._power_laws import LEAST_POINTS, fit_power_law, mean_by_kind
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import curvature_options, mean_products
from vitscope.linalg.krylov_basis import dot
from vitscope.models.structure.parameter_groups import kinds_of_probe
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import PositiveInt


@dataclass(frozen=True)
class CurvatureExponentsResult(Result, coordinates={"layer": "layers", "group": "groups"}):
    """Curvature along singular directions of the gradient, and its exponent, by layer and by kind.

    Attributes:
        layers: (n_layers,) names of the weights.
        kinds: (n_layers,) kind of the unit of each; ``unknown`` where the model's units are not known.
        singular_values: (n_layers, n_directions) of the gradient as a matrix, descending; NaN beyond its rank.
        curvatures: (n_layers, n_directions) ``d^T C d`` along ``d = u v^T`` of each singular value; NaN likewise.
        exponents: (n_layers,) slope of the logarithm of positive curvatures on that of the singular values; NaN with
            fewer than 4.
        exponent_half_widths: (n_layers,) half the 95 % interval of the slope in ordinary least squares.
        r_squared: (n_layers,) of the fit.
        n_fitted: (n_layers,) directions in the fit, those of positive curvature.
        groups: (n_groups,) kinds that occur.
        mean_exponents: (n_groups,) mean over the layers of a kind.
        mean_exponent_intervals: (n_groups, 2) 95 % over layers; NaN with fewer than 3.
        n_products: Products made.
        card: Conditions of the measurement.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    singular_values: np.ndarray
    curvatures: np.ndarray
    exponents: np.ndarray
    exponent_half_widths: np.ndarray
    r_squared: np.ndarray
    n_fitted: np.ndarray
    groups: tuple[str, ...]
    mean_exponents: np.ndarray
    mean_exponent_intervals: np.ndarray
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: the mean exponent of each kind, where there is one."""
        logged = {f"exponent_{group}": float(value) for group, value in zip(self.groups, self.mean_exponents)}
        return {**{k: v for k, v in logged.items() if np.isfinite(v)}, "n_products": float(self.n_products)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a gradient, and a product for each singular value that rounding does not hide: at most as many as the rank."""
    with curvatures(workload.model_probe(), curvature_options(options)) as operators:
        matrices = {name: operators.parameters[name] for name in weight_matrices(operators.parameters)}
        ranks = [min(len(p), p.numel() // len(p), int(options["n_singular_values"])) for p in matrices.values()]
    most = sum(ranks)
    return MeasureCost(
        mean_products(workload, options, Count(most, 0, most), gradients=1), held_bytes=2.0 * workload.parameter_bytes
    )


def _check(n_singular_values: int) -> None:
    if n_singular_values < LEAST_POINTS:
        raise ValueError(
            f"Expected n_singular_values of at least {LEAST_POINTS}, received {n_singular_values}; 10 is usual."
        )


@declares_cost(_cost)
@record_options
@checks_options(_check)
@curvature_arguments("operator", "parameters", "dtype", "bn", "micro_batch", "seed")
def curvature_exponents(
    probe: Probe,
    *,
    n_singular_values: PositiveInt = 10,
    **curvature: Unpack[CurvatureArguments],
) -> CurvatureExponentsResult:
    """Measure how curvature scales with the singular values of the gradient, in every layer.

    The gradient of a weight of two or more dimensions is a matrix of its first axis by the rest, ``sum_k s_k u_k v_k^T``. With
    the curvature ``h_k = d_k^T C d_k`` along ``d_k = u_k v_k^T``, other weights fixed, the exponent is the slope a of
    ``h_k ~ s_k^a`` over the first ``n_singular_values`` directions with positive curvature. Gradient and curvature are those of
    the data term; a fused weight of queries, keys and values is one matrix.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        n_singular_values: Singular directions of each layer, at least 4; each costs a product.
        curvature: ``operator``, ``parameters``, ``dtype``, ``bn``, ``micro_batch``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Fewer than 4 directions, no weight of two dimensions; and as `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Example:
        ``vs.curvature_exponents(probe).mean_exponents`` of ``.groups``.

    Source: Calvo, Spectral Asymptotics of Neural Network Loss Landscapes (arXiv 2606.02596), abstract and introduction, for
    the quantity: about 2 for convolutions, 1 for attention, below 1 for the first layers of MLPs. Directions, the fit and its
    interval are vitscope's own.
    """
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options) as operators:
        matrices = weight_matrices(operators.parameters)
        operator = operators.mean()
        gradient = dict(zip(operators.parameters, operator.split(operator.gradient(data_only=True))))
        singular_values = np.full((len(matrices), n_singular_values), np.nan)
        values = np.full_like(singular_values, np.nan)
        for row, name in enumerate(track(matrices, "curvature exponents")):
            s, h = _curvatures_along(operator, name, gradient[name], n_singular_values)
            singular_values[row, : len(s)], values[row, : len(h)] = s, h
        card = operators.card({"n_singular_values": n_singular_values, "seed": options.seed})
    kinds = kinds_of_probe(probe, matrices, "curvature_exponents")
    fits = [fit_power_law(s, h) for s, h in zip(singular_values, values)]
    exponents = np.array([fit.exponent for fit in fits])
    warn_nulls(
        "curvature_exponents",
        {
            name: f"fewer than {LEAST_POINTS} directions of positive curvature"
            for name, value in zip(matrices, exponents)
            if np.isnan(value)
        },
    )
    groups = present_kinds(kinds)
    means, intervals = mean_by_kind(exponents, kinds, groups)
    return CurvatureExponentsResult(
        layers=tuple(matrices),
        kinds=kinds,
        singular_values=singular_values,
        curvatures=values,
        exponents=exponents,
        exponent_half_widths=np.array([fit.half_width for fit in fits]),
        r_squared=np.array([fit.r_squared for fit in fits]),
        n_fitted=np.array([fit.n_points for fit in fits]),
        groups=groups,
        mean_exponents=means,
        mean_exponent_intervals=intervals,
        n_products=operator.n_products,
        card=card,
    )


def _curvatures_along(operator: Curvature, name: str, gradient: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest singular values of a weight's gradient and the curvatures along their directions."""
    matrix = gradient.reshape(len(gradient), -1).double()  # (outputs, inputs times places of a kernel)
    if not bool(torch.isfinite(matrix).all()):
        warnings.warn(f"the gradient of {name} is not finite", stacklevel=3)
        return np.empty(0), np.empty(0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # a singular value within the rounding of the gradient has no direction
    rounding = torch.finfo(gradient.dtype).eps * max(matrix.shape) * s[0]
    n_known = min(n, int((s > rounding).sum()))
    values = []
    for k in range(n_known):
        direction = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        part = dict(zip(operator.parameters, operator.split(direction)))[name]
        part.copy_(torch.outer(u[:, k], vh[k]).reshape(part.shape))
        values.append(dot(direction, operator.data_product(direction)))
    return s[:n_known].cpu().numpy(), np.array(values)
