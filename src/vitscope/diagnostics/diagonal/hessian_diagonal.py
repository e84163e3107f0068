"""Diagonal of the Hessian, of the Gauss-Newton or of a Fisher matrix, estimated or exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import numpy as np
import torch

from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.diagonal._exact_diagonal import diagonal_by_images, diagonal_by_products
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.product_cost import mean_products
from vitscope.linalg.curvature.start_vector import random_signs, vector_seed
from vitscope.models.structure.parameter_groups import kinds_of_probe
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import PositiveInt

Method = Literal["hutchinson", "exact"]
METHODS: tuple[str, ...] = get_args(Method)
#: levels of the quantiles of each parameter's entries
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class HessianDiagonalResult(
    Result, coordinates={"parameter": "parameters"}, untabulated=("diagonal", "standard_error")
):
    """The diagonal, in the order of ``named_parameters()``, and its size in each parameter.

    Attributes:
        parameters: (n_parameters,) names of the tensors.
        kinds: (n_parameters,) kind of the unit of each; ``unknown`` where the model's units are not known.
        sizes: (n_parameters,) entries of each.
        diagonal: (size,) entries of all tensors, flattened, one tensor after the other.
        standard_error: (size,) over random vectors; 0 where exact, NaN with one vector.
        mean: (n_parameters,) mean entry of each tensor; times ``sizes`` the trace of its block.
        mean_standard_error: (n_parameters,) over random vectors, likewise.
        quantiles: (n_parameters, 3) of the entries of each tensor at 0.05, 0.5 and 0.95; the noise of an estimate widens them.
        negative_share: (n_parameters,) share of the entries below zero by more than two standard errors; NaN with one vector.
        trace: Sum of the diagonal.
        noise_share: Share of the variance of the estimated entries, over all of them, that is noise of the random vectors: near 1
            the single entries say nothing; NaN with one vector.
        n_products: Products made; 0 where gradients of images took their place.
        card: Conditions of the measurement.
    """

    parameters: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: np.ndarray
    diagonal: np.ndarray
    standard_error: np.ndarray
    mean: np.ndarray
    mean_standard_error: np.ndarray
    quantiles: np.ndarray
    negative_share: np.ndarray
    trace: float
    noise_share: float
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: trace, extremes, and the share of noise where it is known."""
        logged = {
            "trace": self.trace,
            "largest": float(self.diagonal.max()),
            "smallest": float(self.diagonal.min()),
            "negative_share": float((self.negative_share * self.sizes).sum() / self.sizes.sum()),
            "noise_share": self.noise_share,
        }
        return {name: value for name, value in logged.items() if np.isfinite(value)}


def _cost(workload: Workload, options: Options) -> MeasureCost | None:
    """Return a product for each vector; the exact diagonal has no formula."""
    if options.get("method") != "hutchinson":
        return None
    n = int(options["n_vectors"])
    # mean, squares, the sample and the difference in float64; the vector and its product
    held = 4.0 * ENTRY * workload.n_parameters + 2.0 * workload.parameter_bytes
    # the diagonal and its error; size, mean, its error, quantiles and the negative share of each tensor
    n_bytes = ENTRY * (2 * workload.n_parameters + (4 + len(QUANTILES)) * workload.n_tensors)
    return MeasureCost(mean_products(workload, options, Count.exactly(n)), held_bytes=held, result_bytes=n_bytes)


@declares_cost(_cost)
@record_options
@curvature_arguments("operator", "parameters", "dtype", "bn", "product", "difference_step", "micro_batch", "seed")
def hessian_diagonal(
    probe: Probe,
    *,
    method: Method = "hutchinson",
    n_vectors: PositiveInt = 100,
    **curvature: Unpack[CurvatureArguments],
) -> HessianDiagonalResult:
    """Compute the diagonal of the curvature of the mean over all batches.

    ``hutchinson`` is the mean over random sign vectors z of ``z * (C z)``, entry by entry. The standard error of entry i is the
    root of ``sum_{j != i} C_ij^2`` over that of ``n_vectors``: entries that are small beside their row need many vectors, and
    `noise_share` states how far the estimate is from the noise. ``exact`` costs, for ``operator='hessian'``, one product a
    parameter (at most 4096), and for ``ggn`` and the Fisher matrices one gradient of every image for each of its outputs.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        method: ``hutchinson`` or ``exact``.
        n_vectors: Random vectors of ``hutchinson``, each of which costs a product.
        curvature: ``operator``, ``parameters``, ``dtype``, ``bn``, ``product``, ``difference_step``, ``micro_batch``,
            ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: An unknown method, an exact diagonal of too many parameters or outputs, or of ``l2="sum_norm"``; and as
            `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Example:
        ``vs.hessian_diagonal(probe, method="exact", operator="ggn", parameters="*head*").diagonal``

    Source: Bekas, Kokiopoulou and Saad, An Estimator for the Diagonal of a Matrix (Applied Numerical Mathematics 2007); Dangel,
    Kunstner and Hennig, BackPACK (ICLR 2020) for the exact Gauss-Newton diagonal.
    """
    options = CurvatureOptions(**curvature)
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {', '.join(METHODS)}, received {method!r}.")
    if method == "exact" and probe.objective.l2 == "sum_norm" and probe.objective.weight_decay > 0:
        raise ValueError(
            "Expected method='hutchinson' with l2='sum_norm', received 'exact': its diagonal is estimated alone."
        )
    with curvatures(probe, options) as operators:
        operator = operators.mean()
        sizes = {name: p.numel() for name, p in operators.parameters.items()}
        starts = np.cumsum([0, *sizes.values()])[:-1]
        if method == "exact":
            diagonal, mean_error = _exact(operators, operator), np.zeros(len(sizes))
            error = np.zeros(operator.size)
        else:
            diagonal, error, mean_error = _hutchinson(operator, n_vectors, options.seed, starts)
        card = operators.card({"solver": method, "n_vectors": n_vectors, "seed": options.seed})
    if method == "hutchinson" and n_vectors == 1:
        names = ("standard_error", "negative_share", "noise_share")
        warn_nulls("hessian_diagonal", dict.fromkeys(names, "one random vector"))
    parts = np.split(diagonal, starts[1:])
    is_negative = np.where(np.isnan(error), np.nan, diagonal < -2 * error)
    variance = float(diagonal.var())
    noise = float(np.square(error).mean())
    return HessianDiagonalResult(
        parameters=tuple(sizes),
        kinds=kinds_of_probe(probe, list(sizes), "hessian_diagonal"),
        sizes=np.array(list(sizes.values())),
        diagonal=diagonal,
        standard_error=error,
        mean=np.array([part.mean() for part in parts]),
        mean_standard_error=mean_error,
        quantiles=np.array([np.quantile(part, QUANTILES) for part in parts]),
        negative_share=np.array([part.mean() for part in np.split(is_negative, starts[1:])]),
        trace=float(diagonal.sum()),
        noise_share=float(np.minimum(noise / variance, 1.0)) if variance > 0 else float("nan"),
        n_products=operator.n_products,
        card=card,
    )


def _exact(operators: Curvatures, operator: Curvature) -> np.ndarray:
    """Return the exact diagonal, the L2 term's included."""
    data = diagonal_by_products(operator) if operator.kind == "hessian" else diagonal_by_images(operators)
    ones = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
    return data + operator.l2_product(ones).double().cpu().numpy()  # a diagonal matrix


def _hutchinson(
    operator: Curvature, n_vectors: int, seed: int, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the estimate, its standard error, and that of the mean of each tensor that begins at ``starts``."""
    mean = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    squares = torch.zeros_like(mean)  # of differences from the mean (Welford)
    sizes = np.diff([*starts, operator.size]).tolist()
    means = []
    for number in track(range(n_vectors), "diagonal"):
        z = random_signs(operator, vector_seed(seed, number))
        sample = (z * operator(z)).double()
        difference = sample - mean
        mean += difference / (number + 1)
        squares += difference * (sample - mean)
        means.append(torch.stack([part.mean() for part in sample.split(sizes)]))
    if n_vectors == 1:
        return mean.cpu().numpy(), np.full(operator.size, np.nan), np.full(len(starts), np.nan)
    error = (squares / (n_vectors - 1) / n_vectors).sqrt()
    spread = torch.stack(means).std(dim=0, correction=1)  # (n_tensors,)
    return mean.cpu().numpy(), error.cpu().numpy(), spread.cpu().numpy() / np.sqrt(n_vectors)
