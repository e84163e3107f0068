"""Spectral density of the Hessian by stochastic Lanczos quadrature (SLQ)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.linalg.basis_memory import BasisBuffer
from vitscope.linalg.curvature.curvature_options import CurvatureOptions, OperatorArguments, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, mean_products
from vitscope.linalg.curvature.start_vector import vector_seed
from vitscope.linalg.quadrature import LEAST_VECTORS, SymmetricOperator, check_quadrature, quadrature_rule
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Row, stored_row
from vitscope.runtime.value_ranges import PositiveInt
from vitscope.stats.intervals import t_half_width_of_rows

#: moments that are reported: the means of lambda, lambda^2, ...
N_MOMENTS = 4


@dataclass(frozen=True)
class SpectralDensityResult(Result, coordinates={"grid": "grid"}):
    """Quadrature rules of the spectrum and the density they make.

    The spectrum as a distribution over the ``size`` eigenvalues, each of mass 1 / size. Intervals are 95 % t-intervals over
    probe vectors, NaN for a single one.

    Attributes:
        nodes: (n_vectors, n_steps) Ritz values, ascending.
        weights: (n_vectors, n_steps) their masses; each row sums to 1.
        residuals: (n_vectors, n_steps) of the nodes as Ritz values; 0 where the steps span an invariant subspace.
        resolution: Nodes nearer to zero than that may owe their sign to rounding: eps |H| (1 + log2 size) plus three times
            the asymmetry measured between products; the largest over vectors.
        grid: (n_grid,) eigenvalues at which the density is given.
        density: (n_grid,) the rules smoothed by a Gaussian of width ``sigma``, mean over vectors; integrates to 1.
        density_low, density_high: (n_grid,) its interval, never below 0, see `positive_interval`; NaN for one vector.
        sigma: The Gaussian's standard deviation, in units of the eigenvalues.
        moments: (4,) means of lambda^p, p = 1 to 4; unbiased, as the rules are exact up to degree 2 n_steps - 1; NaN beyond it,
            unless the steps span an invariant subspace.
        moments_half_width: (4,) half their t-intervals; NaN with fewer than 20 vectors.
        negative_mass: Mass at nodes below zero, those of unknown sign left out.
        near_zero_mass: Mass at nodes of unknown sign: those within the resolution of zero, and the next one on either side
            where zero is within its residual (by the inequalities of Chebyshev, Markov and Stieltjes all other nodes' masses
            are on their side).
        size: Number of parameters analyzed.
        n_products: Products with the operator.
        card: Conditions of the measurement.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    grid: np.ndarray
    density: np.ndarray
    density_low: np.ndarray
    density_high: np.ndarray
    sigma: float
    moments: np.ndarray
    moments_half_width: np.ndarray
    negative_mass: float
    near_zero_mass: float
    resolution: float
    size: int
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged; the mean square only where the steps give it."""
        mean_square = {"mean_square": float(self.moments[1])} if np.isfinite(self.moments[1]) else {}
        return {
            "negative_mass": self.negative_mass,
            "near_zero_mass": self.near_zero_mass,
            "mean": float(self.moments[0]),
            **mean_square,
            "node_max": float(self.nodes.max()),
            "node_min": float(self.nodes.min()),
            "n_products": float(self.n_products),
        }


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a product for each step of each vector, and the basis of one."""
    n_vectors, n_grid = int(options["n_vectors"]), int(options["n_grid"])
    n_steps = min(int(options["n_steps"]), workload.n_parameters)
    return MeasureCost(
        mean_products(workload, options, Count.exactly(n_vectors * n_steps)),
        held_bytes_shared=basis_bytes(workload, n_steps),
        # nodes, weights and residuals; the grid and three densities; moments and their half widths
        result_bytes=ENTRY * (3 * n_vectors * n_steps + 4 * n_grid + 2 * N_MOMENTS),
    )


@declares_cost(_cost)
@record_options
@curvature_arguments()
def spectral_density(
    probe: Probe,
    *,
    n_vectors: PositiveInt = 4,
    n_steps: PositiveInt = 30,
    n_grid: PositiveInt = 1024,
    sigma: float | None = None,
    partial: ResumableRows | None = None,
    **curvature: Unpack[OperatorArguments],
) -> SpectralDensityResult:
    """Estimate the density of all eigenvalues of the mean over all batches.

    Each random sign vector gives a tridiagonal matrix by ``n_steps`` of Lanczos (on a basis kept orthogonal to the root of the
    precision, which is what it takes that no ghost copies of the largest eigenvalues add mass); its eigenvalues are the nodes,
    the squared first entries of its eigenvectors the weights of a Gauss quadrature.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        n_vectors: Probe vectors; the interval shrinks with their root.
        n_steps: Lanczos steps of each, at most the number of parameters.
        n_grid: Points of the density.
        sigma: Width of the smoothing Gaussian; None for a hundredth of the nodes' range.
        partial: Rows of vectors already done, by ``vector-<number>``.
        curvature: ``operator``, ``parameters``, ``dtype``, ``bn``, ``product``, ``difference_step``, ``micro_batch``, ``basis``,
            ``checkpoint_blocks``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Fewer than one vector, step or grid point, a ``sigma`` that is not positive; and as
            `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Source: Ubaru, Chen & Saad (SIAM J. Matrix Anal. Appl. 2017); Ghorbani et al. (ICML 2019); docs/definitions.md section 2.
    """
    check_quadrature(n_vectors, n_steps, n_grid, sigma)
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options, mean_alone=True) as operators:
        mean = operators.mean()
        solver = {"solver": "slq", "n_vectors": n_vectors, "n_steps": min(n_steps, mean.size), "seed": options.seed}
        memory = operators.basis_memory(shared=True)
        result = density_of(mean, n_vectors, n_steps, n_grid, sigma, options.seed, partial, memory, operators.read_row)
        return replace(result, card=operators.card(solver))


def density_of(
    operator: SymmetricOperator,
    n_vectors: int,
    n_steps: int,
    n_grid: int,
    sigma: float | None,
    seed: int,
    partial: ResumableRows | None = None,
    memory: BasisBuffer | None = None,
    read_row: Callable[[Row], Row] | None = None,
) -> SpectralDensityResult:
    """Return the density of an operator, without a card; arguments as in `spectral_density`, and the memory of the bases.

    ``read_row`` is called with each vector's row.
    """
    steps, memory, rules = min(n_steps, operator.size), memory or BasisBuffer(), []
    for number in track(range(n_vectors), "spectral density"):
        compute = functools.partial(quadrature_rule, operator, vector_seed(seed, number), steps, memory)
        rule = stored_row(partial, f"vector-{number:04d}", compute, required=["residuals"])
        rules.append(rule if read_row is None else read_row(rule))
    table = {key: np.array([rule[key] for rule in rules]) for key in ("nodes", "weights", "residuals", "resolution")}
    return _result(table, n_grid, sigma, operator.size, n_vectors * steps)


def masses_by_sign(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, resolution: np.ndarray
) -> tuple[float, float]:
    """Return the mass below zero and the mass of unknown sign, means over vectors.

    Args:
        nodes: (n_vectors, n_steps) ascending.
        weights: (n_vectors, n_steps).
        residuals: (n_vectors, n_steps).
        resolution: (n_vectors,) see `SpectralDensityResult`.
    """
    below, above = nodes < -resolution[:, None], nodes > resolution[:, None]  # (n_vectors, n_steps)
    next_below = below & (np.cumsum(below[:, ::-1], axis=1)[:, ::-1] == 1)
    next_above = above & (np.cumsum(above, axis=1) == 1)
    unknown = ~(below | above) | ((next_below | next_above) & (np.abs(nodes) <= residuals))
    return float((weights * (below & ~unknown)).sum(1).mean()), float((weights * unknown).sum(1).mean())


def _result(
    table: dict[str, np.ndarray],
    n_grid: int,
    sigma: float | None,
    size: int,
    n_products: int,
) -> SpectralDensityResult:
    nodes, weights = table["nodes"], table["weights"]
    extent = float(nodes.max() - nodes.min())
    width = sigma or (extent or max(abs(float(nodes.max())), 1.0)) / 100
    grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, n_grid)
    bells = np.exp(-0.5 * ((grid - nodes[..., None]) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    rows = (weights[..., None] * bells).sum(1)  # (n_vectors, n_grid)
    low, high = positive_interval(rows)
    powers = np.stack([(weights * nodes**p).sum(1) for p in range(1, N_MOMENTS + 1)], axis=1)  # (n_vectors, 4)
    is_invariant = (table["residuals"] <= table["resolution"][:, None]).all(1)  # (n_vectors,)
    degree = 2 * nodes.shape[1] - 1
    powers[~is_invariant, degree:] = np.nan
    negative, near_zero = masses_by_sign(nodes, weights, table["residuals"], table["resolution"])
    return SpectralDensityResult(
        nodes=nodes,
        weights=weights,
        residuals=table["residuals"],
        grid=grid,
        density=rows.mean(0),
        density_low=low,
        density_high=high,
        sigma=float(width),
        moments=powers.mean(0),
        moments_half_width=half_width(powers),
        negative_mass=negative,
        near_zero_mass=near_zero,
        resolution=float(table["resolution"].max()),
        size=size,
        n_products=n_products,
    )


def half_width(rows: np.ndarray) -> np.ndarray:
    """Return half the 95 % t-interval of the mean of ``rows (n, ...)``; NaN with fewer than `LEAST_VECTORS` rows."""
    return t_half_width_of_rows(rows, LEAST_VECTORS)


def positive_interval(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the 95 % interval of the mean of ``rows (n, ...)``, none below 0; NaN for a single row.

    An eigenvalue that stands alone has weights like chi-square with one degree of freedom, far from normal. Student's lower end,
    held at 0, and the upper end of Student's interval of the logarithm hold the truth at 93 to 96 % from four rows on, for one
    eigenvalue and for many.
    """
    mean = rows.mean(axis=0)
    half = t_half_width_of_rows(rows)
    return np.maximum(mean - half, 0.0), mean * np.exp(half / np.where(mean > 0, mean, 1.0))
