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
    value = _structures(similarity, stages[None])[0]  # one labeling: (1, n_taps)
    return None if np.isnan(value) else float(value)


def p_value(similarity: np.ndarray, stages: np.ndarray, n_permutations: int, seed: int) -> float | None:
    """Return how often boundaries drawn at random give at least the block structure of the real ones.

    The null keeps the number of stages and draws their boundaries among all positions; one-sided, the real one counted.
    None without permutations.
    """
    observed = block_structure(similarity, stages)
    if observed is None or n_permutations < 1:
        return None
    rng = np.random.default_rng(seed)
    places = np.arange(1, len(stages))
    n_boundaries = int((np.diff(stages) != 0).sum())
    boundaries = np.stack([rng.choice(places, n_boundaries, replace=False) for _ in range(n_permutations)])
    nulls = (boundaries[:, :, None] <= np.arange(len(stages))).sum(1)  # (n_permutations, n_taps), stages from 0
    exceeding = int((_structures(similarity, nulls) >= observed - 1e-12).sum())
    return (1 + exceeding) / (1 + n_permutations)


def _structures(similarity: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """Return the block structure under each row of ``stages (m, n_taps)``, ``(m,)``; NaN where it does not exist."""
    total, weights = np.zeros(len(stages)), np.zeros(len(stages))
    for distance in range(1, stages.shape[1]):
        values = np.diagonal(similarity, distance)
        finite = np.isfinite(values)
        values = np.where(finite, values, 0.0)
        within = (stages[:, :-distance] == stages[:, distance:]) & finite
        across = ~within & finite
        n_within, n_across = within.sum(1), across.sum(1)
        means = within @ values / np.maximum(n_within, 1), across @ values / np.maximum(n_across, 1)
        weight = np.minimum(n_within, n_across)
        total += weight * (means[0] - means[1])
        weights += weight
    return np.where(weights > 0, total / np.maximum(weights, 1), np.nan)
