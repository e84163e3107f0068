"""Standard errors of any statistic of independent images by the jackknife over groups of images."""

from __future__ import annotations

import numpy as np

from vitscope.stats.intervals import t_quantile

#: groups of images that are left out in turn
N_GROUPS = 10


def group_numbers(count: int, n_groups: int = N_GROUPS) -> np.ndarray:
    """Return the group of each of ``count`` images ``(count,)``: equal sizes up to one, drawn at random, always alike.

    Images in turn would put one class in a group where classes alternate, as in scikit-learn's digits.
    """
    return np.random.default_rng(0).permutation(np.arange(count) % n_groups)


def group_numbers_of_batch(number: int, count: int, n_groups: int = N_GROUPS) -> np.ndarray:
    """Return the group of each image of batch ``number`` ``(count,)``, as `group_numbers` where the number of images is unknown.

    Of batches of one size the groups are of equal sizes up to one.
    """
    return np.random.default_rng(number).permutation((number * count + np.arange(count)) % n_groups)


def jackknife_half_width(left_out: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return half the two-sided t-interval of a statistic from its values without one group each.

    The variance is ``(G - 1) / G sum (s_g - mean s)^2`` (Kott 2001 for groups), and the quantile is Student's with ``G - 1``
    degrees of freedom. No image is drawn twice, unlike in a bootstrap, whose duplicates are each other's nearest neighbors.

    Args:
        left_out: ``(G, ...)`` the statistic of all images but those of one group, G > 1.
        level: Coverage, in (0, 1).
    """
    n = len(left_out)
    with np.errstate(invalid="ignore"):  # values that are not finite
        variance = (n - 1) / n * np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    return t_quantile(n, level) * np.sqrt(variance)
