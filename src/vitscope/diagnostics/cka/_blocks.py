"""Whether a similarity matrix has blocks along the stages: the statistic and its permutation null."""

from __future__ import annotations

import numpy as np


def block_structure(similarity: np.ndarray, stages: np.ndarray) -> float | None:
    """Return the mean similarity of pairs within a stage minus that of pairs across stages, matched by distance.

    Layers far apart are less alike whatever the stages, and pairs within a stage are the closer ones; so pairs are compared
    only with pairs of the same distance in depth, each distance weighted by the smaller of its two numbers of pairs. None
    where no distance has both kinds (a single stage).

    Args:
        similarity: (n_taps, n_taps); pairs that are not finite are left out.
        stages: (n_taps,) the stage of each tap.
    """
    total, weights = 0.0, 0.0
    for distance in range(1, len(stages)):
        values = np.diagonal(similarity, distance)
        finite = np.isfinite(values)
        within = (stages[:-distance] == stages[distance:]) & finite
        across = ~within & finite
        weight = min(within.sum(), across.sum())
        if weight:
            total += weight * (values[within].mean() - values[across].mean())
            weights += weight
    return float(total / weights) if weights else None


def p_value(similarity: np.ndarray, stages: np.ndarray, n_permutations: int, seed: int) -> float | None:
    """Return how often boundaries drawn at random give at least the block structure of the real ones.

    The null keeps the number of stages and draws their boundaries among all positions; one-sided, the real one counted.
    """
    observed = block_structure(similarity, stages)
    if observed is None:
        return None
    rng = np.random.default_rng(seed)
    places = np.arange(1, len(stages))
    n_boundaries = int((np.diff(stages) != 0).sum())
    drawn = []
    for _ in range(n_permutations):
        boundaries = rng.choice(places, n_boundaries, replace=False)
        null = np.isin(np.arange(len(stages)), boundaries).cumsum()
        drawn.append(block_structure(similarity, null))
    exceeding = sum(value is not None and value >= observed - 1e-12 for value in drawn)
    return (1 + exceeding) / (1 + n_permutations)
