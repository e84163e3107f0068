"""Densities of several spectra on one grid and the Jensen-Shannon distances between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vitscope.stats.intervals import t_quantile

#: a distance of densities without overlap
DISJOINT = float(np.sqrt(np.log(2)))
#: scales of the axis of densities
Axis = Literal["linear", "symlog"]
AXES: tuple[str, ...] = get_args(Axis)
#: magnitude from which the signed logarithmic axis is logarithmic, relative to the largest magnitude of all blocks
_LINEAR_SHARE = 1e-6
#: quantile of the normal distribution for a two-sided 95 % interval
_NORMAL_QUANTILE = 1.959964
#: points of the grid that a Gaussian's standard deviation spans at least
_POINTS_A_SIGMA = 2.0


@dataclass(frozen=True)
class BlockDistances:
    """Densities and distances; fields as those of `HessianBlockDensitiesResult`.

    Attributes:
        grid: (n_grid,) eigenvalues, equally spaced along the axis.
        density: (n_blocks, n_grid).
        sigma: Width of the Gaussian.
        distance: (n_blocks, n_blocks).
        low: (n_blocks, n_blocks) of the bootstrap interval.
        high: (n_blocks, n_blocks).
        noise: (n_blocks,).
        mean_interval: (2,) of the mean over pairs.
    """

    grid: np.ndarray
    density: np.ndarray
    sigma: float
    distance: np.ndarray
    low: np.ndarray
    high: np.ndarray
    noise: np.ndarray
    mean_interval: np.ndarray


def block_distances(
    nodes: np.ndarray,
    weights: np.ndarray,
    *,
    scale: str,
    axis: str,
    n_grid: int,
    sigma: float | None,
    n_resamples: int,
    seed: int,
) -> BlockDistances:
    """Return the densities of quadrature rules and the distances between them.

    Args:
        nodes: (n_blocks, n_vectors, n_steps), NaN where a block has fewer steps.
        weights: (n_blocks, n_vectors, n_steps).
        scale: ``none`` or ``largest``.
        axis: ``linear`` or ``symlog``.
        n_grid: Points of the grid.
        sigma: Width of the Gaussian; None for a hundredth of the nodes' range.
        n_resamples: Bootstrap resamples of the vectors.
        seed: Seed of the resamples.

    Raises:
        ValueError: A grid too coarse for ``sigma``.
    """
    if scale == "largest":
        largest = np.nanmax(np.abs(nodes), axis=(1, 2), keepdims=True)
        nodes = nodes / np.where(largest > 0, largest, 1.0)
    threshold = _LINEAR_SHARE * float(np.nanmax(np.abs(nodes)))
    is_log = axis == "symlog" and threshold > 0
    if is_log:  # to signed decades above the threshold
        nodes = np.arcsinh(nodes / threshold) / np.log(10)
    low, high = float(np.nanmin(nodes)), float(np.nanmax(nodes))
    spread = high - low
    if spread == 0:
        spread = max(abs(high), 1.0)
    width = sigma or spread / 100
    grid = np.linspace(low - 4 * width, high + 4 * width, n_grid)
    step = grid[1] - grid[0] if n_grid > 1 else np.inf
    if step * _POINTS_A_SIGMA > width:
        least = int(np.ceil((high - low + 8 * width) * _POINTS_A_SIGMA / width)) + 1
        raise ValueError(f"Expected n_grid to be at least {least} for sigma={width:.3g}, received {n_grid}.")
    rows = np.stack([_densities(n, w, grid, width) for n, w in zip(nodes, weights)])  # (n_blocks, n_vectors, n_grid)
    density = rows.mean(1)
    n_blocks, n_vectors = rows.shape[:2]
    noise = np.full(n_blocks, np.nan)
    if n_vectors > 1:
        half = n_vectors // 2
        pairs = zip(rows[:, :half].mean(1), rows[:, half : 2 * half].mean(1))
        noise = np.array([js_distances(np.stack(pair))[0, 1] for pair in pairs])
    distance = js_distances(density)
    low_and_high, mean_ends = _bootstrap(rows, distance, n_resamples, seed)
    grid = threshold * np.sinh(grid * np.log(10)) if is_log else grid
    return BlockDistances(grid, density, float(width), distance, *low_and_high, noise, mean_ends)


def js_distances(density: np.ndarray) -> np.ndarray:
    """Return the roots of the Jensen-Shannon divergences, in nats, between the rows of ``density (n, n_grid)``, ``(n, n)``.

    ``JSD(p, q) = S((p + q) / 2) - (S(p) + S(q)) / 2`` with the entropy ``S`` of the masses on an equally spaced grid.
    """
    mass = density / density.sum(1, keepdims=True)
    entropies = _entropy(mass)
    distance = np.zeros((len(mass), len(mass)))
    for i in range(len(mass) - 1):
        mixed = _entropy((mass[i] + mass[i + 1 :]) / 2)
        distance[i, i + 1 :] = np.sqrt(np.maximum(mixed - (entropies[i] + entropies[i + 1 :]) / 2, 0.0))
    return distance + distance.T


def _entropy(mass: np.ndarray) -> np.ndarray:
    return -(mass * np.log(np.where(mass > 0, mass, 1.0))).sum(-1)


def _densities(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Return the smoothed rules (n_vectors, n_grid) of nodes and weights (n_vectors, n_steps)."""
    rows = np.zeros((len(nodes), len(grid)))
    for row, values, masses in zip(rows, nodes, weights):
        for value, mass in zip(values, masses):  # a Gaussian at a time: no (n_vectors, n_steps, n_grid) array
            if np.isfinite(value):
                row += mass * np.exp(-0.5 * ((grid - value) / width) ** 2)
    return rows / (width * np.sqrt(2 * np.pi))


def _bootstrap(
    rows: np.ndarray, distance: np.ndarray, n_resamples: int, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return 95 % bootstrap intervals over vectors, each block's drawn by itself: of each pair, and of the mean."""
    n_blocks, n_vectors = rows.shape[:2]
    if n_vectors == 1:
        undefined = np.where(np.eye(n_blocks, dtype=bool), 0.0, np.nan)
        return (undefined, undefined.copy()), np.full(2, np.nan)
    rng = np.random.default_rng(seed)
    pairs = np.triu_indices(n_blocks, 1)
    samples = np.empty((n_resamples, len(pairs[0])))
    for sample in samples:
        counts = rng.multinomial(n_vectors, np.full(n_vectors, 1 / n_vectors), size=n_blocks)  # (n_blocks, n_vectors)
        sample[:] = js_distances(np.einsum("bv,bvg->bg", counts / n_vectors, rows))[pairs]
    ends = []
    for values in _interval(samples, distance[pairs], n_vectors):
        matrix = np.zeros((n_blocks, n_blocks))
        matrix[pairs] = values
        ends.append(matrix + matrix.T)
    return (ends[0], ends[1]), _interval(samples.mean(1, keepdims=True), distance[pairs].mean()[None], n_vectors)[:, 0]


def _interval(samples: np.ndarray, estimates: np.ndarray, n_vectors: int) -> np.ndarray:
    """Return the lower and upper ends ``(2, n)`` from resampled distances ``(n_resamples, n)`` and the estimates ``(n,)``.

    Resampled densities have more noise than the estimated ones, which makes distances larger, as the noise of the estimates
    makes them larger than the true ones: the excess of the resamples' median over the estimate is subtracted. The standard
    deviation of resamples of n vectors is too small by ``sqrt((n - 1) / n)``, and uncertain where n is small: the larger distance
    of a quantile from the median is multiplied by Student's quantile over the normal one. Intervals of 3 to 20 vectors held the
    true distance in 93 to 100 % of the cases, basic bootstrap intervals of 4 to 20 in 68 to 95 %.
    """
    share = n_vectors / (n_vectors - 1)
    scale = np.sqrt(share) * t_quantile(n_vectors) / _NORMAL_QUANTILE
    low, median, high = np.percentile(samples, [2.5, 50, 97.5], axis=0)
    center = estimates - share * (median - estimates)
    half_width = scale * np.maximum(high - median, median - low)
    return np.clip(np.stack([center - half_width, center + half_width]), 0.0, DISJOINT)
