"""Confidence intervals of means and shares: Student's, Wilson's and exact ones, and the rules for giving none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

#: images below which a mean of measurements has no interval: Student's covers too rarely where they are skewed between images. Of
#: losses of a trained classifier (skewness 4) it held the truth at 78 % of 16, 90 % of 64 and 93 % of 128 images
LEAST_IMAGES = 128

#: successes and failures below which a share has the exact interval instead of Wilson's
LEAST_COUNT = 5

#: images that must differ from the most frequent answer for a mean of answers to have an interval: with fewer, Student's does not
#: cover (and has no width where all agree)
LEAST_EVENTS = 10


@dataclass(frozen=True)
class Estimate:
    """A mean over images.

    Attributes:
        mean: The mean, float64; NaN where nothing was added.
        half_width: Half the two-sided t-interval, of the mean's shape; NaN for measurements of fewer than `LEAST_IMAGES` images,
            and for answers where fewer than `LEAST_EVENTS` images differ from the rest.
        count: The number of images.
    """

    mean: np.ndarray
    half_width: np.ndarray
    count: int


def check_level(level: float) -> None:
    """Refuse a coverage outside (0, 1) with a ValueError; measures call it before their work, not after."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"Expected level in (0, 1), received {level}.")


def estimate(count: int, total: np.ndarray, square: np.ndarray, level: float = 0.95) -> Estimate:
    """Return a mean of measurements and its t-interval from the sum and the sum of squares over ``count`` > 0 images.

    There is no interval for fewer than `LEAST_IMAGES` images. A nominal 95 % holds at 87 to 92 % of 4 to 16 lognormal
    measurements (standard deviation of the logarithm 0.5 to 0.8), at 94 % of 128. With stronger skewness more images are needed:
    with a skewness of 12 it holds at 89 % of 512 and 92 % of 1024 images.
    """
    mean = total / count
    if count < LEAST_IMAGES:
        return Estimate(mean, np.full_like(mean, np.nan), count)
    return Estimate(mean, t_half_width(count, total, square, level), count)


def few_images(count: int) -> dict[str, str]:
    """Return why means over ``count`` images have no interval, as `warn_nulls` takes it; nothing where they have one."""
    return {"the intervals": f"fewer than {LEAST_IMAGES} images"} if count < LEAST_IMAGES else {}


def where_enough_wrong(half_width: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return ``half_width`` of mean losses, or of their changes, where at least `LEAST_EVENTS` images were answered wrong.

    A few wrong answers carry most of the loss of a good classifier: with fewer of them, Student's interval falls short of the
    truth (of a classifier that is right on 97.5 % it held the truth at 83 % of 128 and 92 % of 512 images).

    Args:
        half_width: Half the width of each interval, of any shape.
        wrong: Number of images that were answered wrong, before a change or after it, of the same shape.
    """
    return np.where(np.asarray(wrong) >= LEAST_EVENTS - 0.5, half_width, np.nan)  # counts come back from means


def t_quantile(count: int, level: float = 0.95) -> float:
    """Return half the width of the two-sided t-interval of a mean of ``count`` > 1 values, in standard errors."""
    return float(stdtrit(count - 1, 0.5 + level / 2))


def t_half_width_of_rows(rows: np.ndarray, least: int = 2) -> np.ndarray:
    """Return half the 95 % t-interval of the mean of ``rows (n, ...)`` over axis 0; NaN with fewer than ``least`` rows."""
    count = len(rows)
    if count < least:
        return np.full(rows.shape[1:], np.nan)
    with np.errstate(invalid="ignore"):  # values that are not finite
        return t_quantile(count) * rows.std(axis=0, ddof=1) / np.sqrt(count)


def t_half_width(count: int, total: np.ndarray, square: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return half the t-interval of a mean from the sum and the sum of squares over ``count`` values; NaN for fewer than two."""
    if count < 2:
        return np.full_like(total, np.nan, dtype=np.float64)
    # rounding may leave a tiny negative number where all images agree; NaN passes through, infinities become NaN
    with np.errstate(invalid="ignore"):
        variance = np.maximum(square - total**2 / count, 0.0) / (count - 1)
    return t_quantile(count, level) * np.sqrt(variance / count)


def share_interval(
    successes: np.ndarray | float, n: np.ndarray | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the interval of shares ``successes / n``; NaN where ``n`` is 0.

    Wilson's (1927), and the exact one of Clopper and Pearson (1934) where there are fewer than `LEAST_COUNT` successes or
    failures, which Wilson's does not cover. At a nominal 95 % it holds any true share at 92 % or more, and at 98 % or less from
    5 expected successes and failures on; nearer to 0 and 1 it errs to the wide side, up to always, as every exact interval does.

    Args:
        successes: Counts from 0 to ``n``.
        n: Trials.
        level: Nominal coverage, in (0, 1).
    """
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    few = np.minimum(k, n - k) < LEAST_COUNT - 1e-6  # a count may come back from a share, with its rounding
    low, high = wilson(k, n, level)
    exact_low, exact_high = exact_ends(k, n, (1 - level) / 2)
    return np.where(few, exact_low, low), np.where(few, exact_high, high)


def wilson(successes: np.ndarray | float, n: np.ndarray | int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the Wilson interval of shares ``successes / n``; NaN where ``n`` is 0.

    At a nominal 95 % it holds a true share at 91 % or more where at least 1 success and 1 failure are to be expected, but at 83 %
    where 0.18 are: what is reported is `share_interval`.
    """
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    z2 = float(ndtri(0.5 + level / 2)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share = k / n
        center = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # the ends of none and of all are exactly 0 and 1, whatever rounding says
    return np.where((k == 0) & (n > 0), 0.0, center - half), np.where((k == n) & (n > 0), 1.0, center + half)


def exact_ends(successes: np.ndarray | float, n: np.ndarray | float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return exact lower and upper bounds of shares, each wrong with a chance of at most ``alpha`` (Clopper and Pearson 1934).

    The lower bound of no success is 0, the upper bound of nothing but successes 1; NaN where ``n`` is 0. Neither number needs to
    be whole.
    """
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    least = np.finfo(np.float64).tiny  # a share without successes is taken below
    low = betaincinv(np.maximum(k, least), n - k + 1, alpha)
    high = betaincinv(k + 1, np.maximum(n - k, least), 1 - alpha)
    low, high = np.where(k <= 0, 0.0, low), np.where(k >= n, 1.0, high)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)
