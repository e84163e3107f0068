"""Trace of the Hessian by Hutchinson's estimator or Hutch++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureOptions, OperatorArguments, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import mean_products
from vitscope.linalg.curvature.start_vector import random_signs, vector_seed
from vitscope.linalg.krylov_basis import Basis, dot
from vitscope.linalg.quadrature import LEAST_VECTORS
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import PositiveInt
from vitscope.stats.intervals import t_quantile

Method = Literal["hutchinson", "hutch++"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class HessianTraceResult(Result):
    """The sum of all eigenvalues.

    Attributes:
        trace: The estimate.
        standard_error: Standard error of the estimate, over random vectors; NaN for a single one. 0 where no part was random.
        estimates: (n_vectors,) the estimate of each random vector.
        sketch_trace: The part that ``hutch++`` computes exactly, 0 for ``hutchinson``; included in ``trace``.
        size: Number of parameters analyzed.
        n_products: Products with the operator.
        card: Conditions of the measurement.
    """

    trace: float
    standard_error: float
    estimates: np.ndarray
    sketch_trace: float
    size: int
    n_products: int
    card: ObjectiveCard | None = None

    @property
    def half_width(self) -> float:
        """Half the 95 % t-interval over random vectors; NaN with fewer than `LEAST_VECTORS`, 0 where no part was random."""
        if self.standard_error == 0.0 and len(self.estimates) == 1:
            return 0.0
        n = len(self.estimates)
        return t_quantile(n) * self.standard_error if n >= LEAST_VECTORS else float("nan")

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        logged = {
            "trace": self.trace,
            "standard_error": self.standard_error,
            "half_width": self.half_width,
            "mean_eigenvalue": self.trace / self.size,
            "n_products": float(self.n_products),
        }
        return {name: value for name, value in logged.items() if np.isfinite(value)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a product for each vector; of Hutch++ a third of them span a basis, fewer where the curvature's rank is smaller."""
    n = int(options["n_vectors"])
    is_sketched = options.get("method") == "hutch++"
    sketch = min(n // 3, workload.n_parameters) if is_sketched else 0
    n_estimates = n - 2 * (n // 3) if is_sketched else n
    products = Count(2 * sketch + n_estimates, sketch, 2 * sketch + n_estimates) if is_sketched else Count.exactly(n)
    return MeasureCost(
        mean_products(workload, options, products),
        held_bytes=2.0 * workload.parameter_bytes,
        held_bytes_shared=float((sketch + 1) * workload.parameter_bytes) if is_sketched else 0.0,
        result_bytes=ENTRY * n_estimates,
    )


def _check(method: str, n_vectors: int) -> None:
    if method not in METHODS:
        raise ValueError(f"Expected method to be one of {', '.join(METHODS)}, received {method!r}.")
    least = 3 if method == "hutch++" else 1
    if n_vectors < least:
        raise ValueError(f"Expected n_vectors to be at least {least} with method={method!r}, received {n_vectors}.")


@declares_cost(_cost)
@record_options
@checks_options(_check)
@curvature_arguments()
def hessian_trace(
    probe: Probe,
    *,
    method: Method = "hutchinson",
    n_vectors: PositiveInt = 30,
    **curvature: Unpack[OperatorArguments],
) -> HessianTraceResult:
    """Estimate the trace of the mean over all batches.

    Hutchinson: the mean of g^T H g over vectors g of random signs. Hutch++: a third of the products sketch the range, a
    third give the trace on an orthonormal basis Q of it exactly, and the rest Hutchinson's estimate of what is left,
    (I - QQ^T) H (I - QQ^T), whose variance lacks the large eigenvalues.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        method: ``hutchinson`` or ``hutch++``.
        n_vectors: Products in all; at least 3 for ``hutch++``, which holds a third as many vectors in memory (of several ranks
            each a share of them).
        curvature: ``operator``, ``parameters``, ``dtype``, ``bn``, ``product``, ``difference_step``, ``micro_batch``, ``basis``,
            ``checkpoint_blocks``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: An unknown method, too few vectors; and as `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Source: Hutchinson (1989); Meyer, Musco, Musco & Woodruff, Hutch++ (SOSA 2021), algorithm 1.
    """
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options, mean_alone=True) as operators:
        mean = operators.mean()
        exact, basis, n_remaining = 0.0, None, n_vectors
        if method == "hutch++":
            basis = _range(mean, min(n_vectors // 3, mean.size), options.seed, operators.basis_memory(shared=True))
            exact = sum(_rayleigh_quotient(mean, basis, i) for i in track(range(basis.count), "hutch++ basis"))
            n_remaining = n_vectors - 2 * (n_vectors // 3)
        covered = basis is not None and basis.count == mean.size
        estimates = np.array(
            [0.0] if covered else [_estimate(mean, options.seed, i, basis) for i in track(range(n_remaining), "trace")]
        )
        error = float(estimates.std(ddof=1) / np.sqrt(len(estimates))) if len(estimates) > 1 else float("nan")
        return HessianTraceResult(
            trace=exact + float(estimates.mean()) + mean.shift * mean.size,
            standard_error=0.0 if covered else error,
            estimates=exact + estimates + mean.shift * mean.size,
            sketch_trace=exact,
            size=mean.size,
            n_products=mean.n_products,
            card=operators.card({"solver": method, "n_vectors": n_vectors, "seed": options.seed}),
        )


def _product(operator: Curvature, v: Tensor) -> Tensor:
    """Return the product without the multiple of the identity, whose trace is known."""
    return torch.cat([piece.reshape(-1) for piece in operator.unshifted(v)])


def _signs(operator: Curvature, seed: int, stream: int, number: int) -> Tensor:
    """Return vector ``number`` of one of two independent sequences of random signs ``(size,)``, ``stream`` 0 or 1."""
    return random_signs(operator, vector_seed(seed, number) * 2 + stream)


def _range(operator: Curvature, rank: int, seed: int, memory: BasisBuffer) -> Basis:
    """Return an orthonormal basis of the operator's image of ``rank`` random vectors, with space for one row more."""
    like = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    memory.plan(like, rank + 1, rank + 1)
    basis = Basis(rank + 1, like, memory)
    for number in range(rank):
        v = _product(operator, _signs(operator, seed, 1, number))
        before = dot(v, v)
        basis.write([v], 1.0, basis.coefficients([v]))
        length = basis.write(None, 1.0, basis.coefficients(None))
        if length**2 > 1e-10 * before:  # the image of a low-rank operator is exhausted before the sketch
            basis.accept(length)
    return basis


def _rayleigh_quotient(operator: Curvature, basis: Basis, index: int) -> float:
    """Return q^T H q of the unit row ``index``."""
    q = basis.row(index) * float(basis.scales[index])
    return dot(q, _product(operator, q))


def _estimate(operator: Curvature, seed: int, number: int, basis: Basis | None) -> float:
    g = _signs(operator, seed, 0, number)
    if basis is not None:
        basis.write([g], 1.0, basis.coefficients([g]))
        g = basis.row(basis.count)
    return dot(g, _product(operator, g))
