"""Spectral density of every diagonal block of the Hessian, and how much the blocks differ from each other."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Unpack, get_args

import numpy as np

from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import ResumableRows
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.block_spectra._block_distances import AXES, Axis, BlockDistances, block_distances
from vitscope.diagnostics.block_spectra._parameter_blocks import kinds_of_blocks, n_uncovered, parameter_blocks
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures, solver_of
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.linalg.curvature.product_cost import (
    basis_bytes,
    curvature_options,
    keeps_graph,
    mean_products,
    restricted,
    subset_sizes,
    with_options,
)
from vitscope.linalg.curvature.start_vector import vector_seed
from vitscope.linalg.quadrature import LEAST_VECTORS, check_quadrature, quadrature_rule
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Row, stored_row
from vitscope.runtime.value_ranges import PositiveInt
from vitscope.stats.intervals import t_half_width_of_rows

#: names of blocks that stand for a division of all parameters
Division = Literal["layer", "unit", "kind", "stage", "part"]
DIVISIONS: tuple[str, ...] = get_args(Division)
#: scalings that bring eigenvalues of blocks to one axis
Scale = Literal["none", "largest"]
SCALES: tuple[str, ...] = get_args(Scale)
#: a distance between halves of the vectors, relative to that between blocks, from which it is said
LARGEST_NOISE = 0.5


@dataclass(frozen=True)
class HessianBlockDensitiesResult(Result, coordinates={"block": "blocks", "other_block": "blocks", "grid": "grid"}):
    """Quadrature rules of the blocks' spectra, their densities on one grid, and the distances between these.

    A block is the Hessian of some parameters, all others held fixed. Numbers that are not defined are NaN.

    Attributes:
        blocks: (n_blocks) names.
        kinds: (n_blocks) kind of the unit that most of a block's parameters belong to (``stem conv msa mlp pool head``); empty
            where the model's units are not known.
        sizes: (n_blocks,) numbers of parameters.
        nodes: (n_blocks, n_vectors, n_steps) Ritz values, ascending; NaN after the last step of a block of fewer parameters.
        weights: (n_blocks, n_vectors, n_steps) their masses; each row sums to 1.
        residuals: (n_blocks, n_vectors, n_steps) of the nodes as Ritz values.
        grid: (n_grid,) eigenvalues, or with ``scale="largest"`` eigenvalues over the block's largest magnitude; equally spaced
            along the axis.
        density: (n_blocks, n_grid) the rules smoothed by a Gaussian of width ``sigma``, mean over vectors; integrates to 1 along
            the axis: per unit of eigenvalue, or per decade.
        sigma: The Gaussian's standard deviation, in units of the axis.
        js_distance: (n_blocks, n_blocks) root of the Jensen-Shannon divergence of two densities, in nats: 0 for equal
            ones, ``sqrt(log 2) = 0.833`` for disjoint ones.
        js_distance_low: (n_blocks, n_blocks) lower end of the 95 % bootstrap interval over probe vectors, widened for few of
            them; NaN for one vector.
        js_distance_high: (n_blocks, n_blocks) upper end.
        js_noise: (n_blocks,) distance between the densities of the two halves of a block's vectors: what estimates of equal
            spectra differ by, with half of the vectors; NaN for one vector.
        mean_js: Mean distance over all pairs of blocks.
        mean_js_interval: (2,) its 95 % bootstrap interval; NaN for one vector.
        trace: (n_blocks,) Hutchinson's estimate, from the same products.
        trace_half_width: (n_blocks,) half its 95 % t-interval over vectors; NaN with fewer than 20 vectors.
        largest: (n_blocks,) largest node of all vectors; the largest eigenvalue is at least that minus rounding.
        largest_residual: (n_blocks,) its residual: an eigenvalue lies within.
        smallest: (n_blocks,) smallest node of all vectors; the smallest eigenvalue is at most that.
        n_uncovered: Number of trainable parameters that belong to no block.
        n_products: Products with the blocks' operators.
        card: Conditions of the measurement; ``parameters`` is ``by layer`` and so on.
    """

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    grid: np.ndarray
    density: np.ndarray
    sigma: float
    js_distance: np.ndarray
    js_distance_low: np.ndarray
    js_distance_high: np.ndarray
    js_noise: np.ndarray
    mean_js: float
    mean_js_interval: np.ndarray
    trace: np.ndarray
    trace_half_width: np.ndarray
    largest: np.ndarray
    largest_residual: np.ndarray
    smallest: np.ndarray
    n_uncovered: int
    n_products: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the mean distance, the decades between the blocks' largest eigenvalues, and the number of products."""
        positive = self.largest[self.largest > 0]
        decades = float(np.log10(positive.max() / positive.min())) if len(positive) > 1 else float("nan")
        return {"mean_js": self.mean_js, "largest_decades": decades, "n_products": float(self.n_products)}


#: blocks whose products are timed before a measurement; each stands for those nearest to it in the model
MOST_TIMED_BLOCKS = 4


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a product for each step of each vector of each block, and the basis of one."""
    subsets = parameter_blocks(workload.model_probe(), options["blocks"], curvature_options(options))
    sizes = subset_sizes(workload, subsets, options)
    names, n_vectors, n_grid = list(sizes), int(options["n_vectors"]), int(options["n_grid"])
    n_steps = {name: min(int(options["n_steps"]), size) for name, size in sizes.items()}
    works = []
    n_timed = min(MOST_TIMED_BLOCKS, len(names))
    for group in np.array_split(np.arange(len(names)), n_timed):
        members = [names[i] for i in group]
        timed = members[len(members) // 2]
        products = Count.exactly(n_vectors * sum(n_steps[name] for name in members))
        cost = MeasureCost(mean_products(workload, options, products))
        if keeps_graph(workload, options, workload.n_batches):  # each block has a graph of its own
            works.append(replace(cost.works[0], repeats=Count.exactly(len(members) - 1)))
        works += with_options(cost if not group[0] else cost.measured(), timed, parameters=subsets[timed]).works
    largest = restricted(workload, max(sizes.values()))
    n = len(names)
    # rules; sizes, traces and ends of a block; distances with their ends; densities and the grid
    entries = n * (3 * n_vectors * int(options["n_steps"]) + 7 + 3 * n + n_grid) + n_grid + 2
    return MeasureCost(
        works,
        held_bytes_shared=basis_bytes(largest, max(n_steps.values())),
        result_bytes=ENTRY * entries,
    )


@declares_cost(_cost)
@record_options
@curvature_arguments("operator", "dtype", "bn", "product", "difference_step", "micro_batch", "basis", "seed")
def hessian_block_densities(
    probe: Probe,
    *,
    blocks: Division | Sequence[str] | Mapping[str, str | Sequence[str]] = "layer",
    n_vectors: PositiveInt = 4,
    n_steps: PositiveInt = 30,
    n_grid: PositiveInt = 1024,
    sigma: float | None = None,
    scale: Scale = "none",
    axis: Axis = "linear",
    n_resamples: PositiveInt = 200,
    partial: ResumableRows | None = None,
    **curvature: Unpack[CurvatureArguments],
) -> HessianBlockDensitiesResult:
    """Estimate the spectral density of each diagonal block of the Hessian by `spectral_density`'s quadrature.

    The distance of two blocks is ``sqrt(JSD)`` with ``JSD(p, q) = (KL(p|m) + KL(q|m)) / 2`` and ``m = (p + q) / 2``, natural
    logarithm, of their densities on one grid. A finite number of vectors makes it larger than it is, see ``js_noise``.

    Args:
        probe: The model, batches and objective; batches are split over ranks.
        blocks: ``layer``, a block for each weight matrix or kernel with its bias; ``unit``, for each residual unit; ``kind``,
            ``stage`` or ``part`` (q, k, v, ...); or a list of subsets as ``parameters=`` takes them
            (``[kind:msa, layer:blocks.3.attn]``), or a mapping of names to such subsets.
        n_vectors: Probe vectors of each block.
        n_steps: Lanczos steps of each, at most the number of the block's parameters.
        n_grid: Points of the densities.
        sigma: Width of the smoothing Gaussian along the axis; None for a hundredth of the range of all nodes.
        scale: ``none``, or ``largest``: eigenvalues over the largest magnitude among the block's nodes, which compares the shapes
            of spectra and not their sizes.
        axis: ``linear``, on which distances are made by outliers and by blocks that reach as far as the smoothing, or ``symlog``,
            signed decades above a millionth of the largest magnitude, on which spectra of another size do not overlap.
        n_resamples: Bootstrap resamples of the vectors.
        partial: Rows of vectors already done, by ``block-<number>-vector-<number>``.
        curvature: ``operator``, ``dtype``, ``bn``, ``product``, ``difference_step``, ``micro_batch``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Unknown blocks, fewer than two blocks, an unknown ``scale`` or ``axis``; and as `spectral_density`.
        StructureError: ``unit`` or ``kind`` for a model whose units are not known.
        NumericalError: A loss that is not finite.

    Source: Zhang et al., Why Transformers Need Adam (NeurIPS 2024), who compare blocks so at initialization (``JS^0``);
    docs/definitions.md section 2.
    """
    check_quadrature(n_vectors, n_steps, n_grid, sigma)
    if scale not in SCALES:
        raise ValueError(f"Expected scale to be one of {', '.join(SCALES)}, received {scale!r}.")
    if axis not in AXES:
        raise ValueError(f"Expected axis to be one of {', '.join(AXES)}, received {axis!r}.")
    options = CurvatureOptions(**curvature)
    subsets = parameter_blocks(probe, blocks, options)
    if len(subsets) < 2:
        raise ValueError(f"Expected at least two blocks to compare, received {', '.join(subsets) or 'none'}.")
    tables: list[dict[str, np.ndarray]] = []
    names: list[dict[str, int]] = []  # sizes by name
    sizes: list[int] = []
    cards = []
    for index, subset in enumerate(track(list(subsets.values()), "hessian block densities")):
        with curvatures(probe, replace(options, parameters=subset)) as operators:
            mean, memory = operators.mean(), operators.basis_memory(shared=True)
            rules = [
                operators.read_row(
                    stored_row(
                        partial,
                        f"block-{index:04d}-vector-{number:04d}",
                        functools.partial(
                            quadrature_rule, mean, vector_seed(options.seed, number), min(n_steps, mean.size), memory
                        ),
                    )
                )
                for number in range(n_vectors)
            ]
            cards.append(operators.card({"solver": "slq", "n_vectors": n_vectors, "n_steps": n_steps}))
            names.append({name: value.numel() for name, value in operators.parameters.items()})
            sizes.append(mean.size)
        tables.append(_padded(rules, n_steps))
    table = {key: np.stack([t[key] for t in tables]) for key in tables[0]}
    distances = block_distances(
        table["nodes"], table["weights"], scale=scale, axis=axis, n_grid=n_grid, sigma=sigma, n_resamples=n_resamples,
        seed=options.seed,
    )  # fmt: skip
    _warn_of_nulls(list(subsets), table["nodes"], n_vectors)
    _warn_of_noise(distances)
    whole = "by " + blocks if isinstance(blocks, str) else ", ".join(subsets)
    card = probe.card(
        parameters=subset_name(probe.model, whole), bn_policy=options.bn, dtype=cards[0].dtype, solver=solver_of(cards)
    )
    return _result(
        tuple(subsets), kinds_of_blocks(probe, names), np.array(sizes), table, distances,
        n_uncovered({name: p.numel() for name, p in probe.parameters().items()}, names), card,
    )  # fmt: skip


def _padded(rules: Sequence[Row], n_steps: int) -> dict[str, np.ndarray]:
    """Return the rules of a block as arrays (n_vectors, n_steps), NaN after the last step of a small block."""
    arrays = {}
    for key in ("nodes", "weights", "residuals"):
        rows = np.array([rule[key] for rule in rules])  # (n_vectors, steps)
        arrays[key] = np.pad(rows, ((0, 0), (0, n_steps - rows.shape[1])), constant_values=np.nan)
    return arrays


def _warn_of_nulls(blocks: Sequence[str], nodes: np.ndarray, n_vectors: int) -> None:
    zero = [block for block, values in zip(blocks, nodes) if not np.nanmax(np.abs(values)) > 0]
    if zero:
        warnings.warn(f"blocks whose curvature is zero: {', '.join(zero)}", stacklevel=3)
    if n_vectors == 1:
        warn_nulls("hessian_block_densities", {"intervals": "one probe vector"})


def _warn_of_noise(distances: BlockDistances) -> None:
    n_blocks = len(distances.distance)
    mean = float(distances.distance[np.triu_indices(n_blocks, 1)].mean())
    noise = float(distances.noise.mean())
    if noise > LARGEST_NOISE * mean:
        warnings.warn(
            f"the two halves of a block's probe vectors differ by {noise:.2g} on average, the blocks by {mean:.2g}: use more "
            "n_vectors, or a larger sigma",
            stacklevel=3,
        )


def _result(
    blocks: tuple[str, ...],
    kinds: tuple[str, ...],
    sizes: np.ndarray,
    table: dict[str, np.ndarray],
    distances: BlockDistances,
    n_uncovered: int,
    card: ObjectiveCard,
) -> HessianBlockDensitiesResult:
    nodes, weights = table["nodes"], table["weights"]
    # (n_blocks, n_vectors): unbiased estimates of the trace
    means = np.nansum(weights * nodes, axis=2) * sizes[:, None]
    flat = nodes.reshape(len(blocks), -1)
    top = np.nanargmax(flat, axis=1)
    pairs = np.triu_indices(len(blocks), 1)
    half_widths = np.array([float(t_half_width_of_rows(row, LEAST_VECTORS)) for row in means])
    return HessianBlockDensitiesResult(
        blocks=blocks,
        kinds=kinds,
        sizes=sizes,
        nodes=nodes,
        weights=weights,
        residuals=table["residuals"],
        grid=distances.grid,
        density=distances.density,
        sigma=distances.sigma,
        js_distance=distances.distance,
        js_distance_low=distances.low,
        js_distance_high=distances.high,
        js_noise=distances.noise,
        mean_js=float(distances.distance[pairs].mean()),
        mean_js_interval=distances.mean_interval,
        trace=means.mean(axis=1),
        trace_half_width=half_widths,
        largest=np.take_along_axis(flat, top[:, None], 1)[:, 0],
        largest_residual=np.take_along_axis(table["residuals"].reshape(len(blocks), -1), top[:, None], 1)[:, 0],
        smallest=np.nanmin(flat, axis=1),
        n_uncovered=n_uncovered,
        n_products=int((~np.isnan(nodes)).sum()),
        card=card,
    )
