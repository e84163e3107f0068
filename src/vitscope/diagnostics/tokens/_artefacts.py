"""Artefact tokens (Darcet et al. 2024): tokens whose norm lies far above that of most tokens of the same tap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitscope.stats.intervals import LEAST_EVENTS, estimate

#: standard deviations above the median of the logarithm; the spread is 1.4826 times the median absolute deviation
DEVIATIONS = 5.0
#: an artefact's norm is at least this multiple of the median, however alike the other tokens are
LEAST_FACTOR = 2.0
#: share of artefacts from which a tap is counted as one that has them: about one token of an image of 14 x 14
LEAST_SHARE = 0.005
#: median absolute deviation to standard deviation of normal numbers
_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Artefacts:
    """Tokens of one tap above a threshold.

    Attributes:
        threshold: Norm above which a token is an artefact; NaN where no norm is positive and finite.
        share: Mean over images of the share of an image's tokens above it.
        share_half_width: Half its t-interval; NaN with fewer than 128 images, or fewer than 10 with an artefact.
        above: (n_images, n_tokens) whether a token is an artefact.
        frequency: (n_tokens,) share of images whose token at a position is an artefact.
        bimodality: Sarle's coefficient of the logarithms of all norms.
    """

    threshold: float
    share: float
    share_half_width: float
    above: np.ndarray
    frequency: np.ndarray
    bimodality: float


def artefacts(norms: np.ndarray, threshold: float | None, level: float) -> Artefacts:
    """Return the artefacts among tokens with these norms.

    Args:
        norms: (n_images, n_tokens) of one tap.
        threshold: Norm above which a token is an artefact; None for `robust_threshold`.
        level: Coverage of the interval.
    """
    logs = _logarithms(norms)
    limit = robust_threshold(logs) if threshold is None else float(threshold)
    if not np.isfinite(norms).all() or not norms.size or not np.isfinite(limit):
        nothing = np.zeros(norms.shape, bool)
        return Artefacts(limit, np.nan, np.nan, nothing, np.full(norms.shape[1], np.nan), np.nan)
    above = norms > limit
    shares = above.mean(axis=1)
    mean = estimate(len(shares), shares.sum(), np.square(shares).sum(), level)
    has_enough = np.count_nonzero(shares) >= LEAST_EVENTS
    half_width = float(mean.half_width) if has_enough else np.nan
    return Artefacts(limit, float(mean.mean), half_width, above, above.mean(axis=0), bimodality_coefficient(logs))


def robust_threshold(logs: np.ndarray) -> float:
    """Return the norm above which tokens are artefacts, from the logarithms of all norms ``(n,)``.

    ``exp(m + max(5 * 1.4826 * mad, ln 2))`` with the median m and the median absolute deviation mad: five standard
    deviations above the median where the logarithms are normal, and at least twice the median.
    """
    if not len(logs):
        return np.nan
    median = float(np.median(logs))
    deviation = _TO_DEVIATION * float(np.median(np.abs(logs - median)))
    return float(np.exp(median + max(DEVIATIONS * deviation, np.log(LEAST_FACTOR))))


def bimodality_coefficient(values: np.ndarray) -> float:
    """Return Sarle's coefficient ``(g^2 + 1) / (k + 3 (n - 1)^2 / ((n - 2) (n - 3)))`` of values ``(n,)``.

    g is the skewness and k the excess kurtosis, both corrected for the size of the sample. It is 1 for two values alone, 5/9
    for a uniform and 1/3 for a normal distribution; long tails raise it too. NaN with fewer than four values, or with those
    that are equal but for rounding: logarithms of norms in single precision.
    """
    n = len(values)
    if n < 4:
        return np.nan
    centered = values - values.mean()
    squares = np.square(centered)
    variance = squares.mean()
    if not variance > np.finfo(np.float32).eps ** 2:
        return np.nan
    # products: NumPy's powers of three and four take thirty times as long
    skewness = (squares * centered).mean() / variance**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
    kurtosis = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (np.square(squares).mean() / variance**2 - 3) + 6)
    return float((skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


def first_with_artefacts(shares: np.ndarray) -> int:
    """Return the index of the tap at which artefacts appear, from the shares ``(n_taps,)``; -1 where there are none.

    From the tap with the largest share back as far as every tap has at least `LEAST_SHARE`; a tap without a share is passed.
    """
    if not np.isfinite(shares).any() or np.nanmax(shares) < LEAST_SHARE:
        return -1
    first = int(np.nanargmax(shares))
    for index in range(first, -1, -1):
        if shares[index] < LEAST_SHARE:
            break
        if np.isfinite(shares[index]):
            first = index
    return first


def _logarithms(norms: np.ndarray) -> np.ndarray:
    """Return the logarithms of the positive and finite norms, ``(n,)`` in float64."""
    values = norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)
    return np.log(values)
