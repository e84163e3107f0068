"""The expected calibration error without its bias, and an interval that holds where a model is calibrated too.

The binned error x = sum_b w_b |D_b|, with D_b the mean of confidence minus correctness in bin b, is far above zero for a
calibrated model: the absolute value turns noise into error (Kumar et al. 2019; Roelofs et al. 2022). Here D_b is taken as normal
around the true gap, with the variance of its images; then x has the mean

    mu(e) = sum_b w_b E|N(e g_b, s_b^2)|

of folded normals at true error e, where the shape g (sum_b w_b g_b = 1) is that of the gaps' sizes as far as they exceed
their noise. The estimate solves mu(e) = x, and is 0 where x is below mu(0). The interval holds every e >= 0 that the
likelihood-ratio ordering of Feldman and Cousins (1998) accepts for the normal x: it is two-sided far from 0 and one-sided at 0,
so that a calibrated model's 0 is in it at the nominal rate.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from vitscope.diagnostics.calibration._bins import Bins, bin_of

#: images for each bin that has any, on average, below which there is no interval: the gaps are then not nearly normal
IMAGES_A_BIN = 30


class DebiasedError(NamedTuple):
    """The estimate and both ends of its interval, all in [0, 1]; NaN ends with fewer images than `IMAGES_A_BIN` says."""

    error: float
    low: float
    high: float


class Gaps(NamedTuple):
    """Numbers of each bin that has images: share of them, mean of confidence minus correctness, its variance ``(n,)``."""

    weight: np.ndarray
    gap: np.ndarray
    variance: np.ndarray
    n_images: int


def gaps(bins: Bins, confidence: np.ndarray, correct: np.ndarray) -> Gaps:
    """Return the gaps of ``bins`` and their variances over the images ``(n,)``.

    The variance in a bin is that of its images' differences with one pseudo-image of the variance p (1 - p) that a calibrated
    confidence p has: a bin of one image, or whose images are all right, is not without noise.
    """
    member = bin_of(confidence, bins.edges)
    n = len(bins.count)
    full = np.maximum(bins.count, 1)
    difference = confidence - correct
    mean = np.bincount(member, difference, minlength=n) / full
    spread = np.bincount(member, (difference - mean[member]) ** 2, minlength=n)
    calibrated = np.bincount(member, confidence * (1 - confidence), minlength=n) / full
    is_occupied = bins.count > 0
    variance = (spread + calibrated) / full**2
    gap = bins.confidence - bins.accuracy
    return Gaps(
        bins.count[is_occupied] / bins.count.sum(), gap[is_occupied], variance[is_occupied], int(bins.count.sum())
    )


def debiased_error(bin_gaps: Gaps, level: float = 0.95) -> DebiasedError:
    """Return the debiased error of binned gaps with its interval of coverage ``level``."""
    model = _Model(bin_gaps)
    high = model.estimate()
    if bin_gaps.n_images < IMAGES_A_BIN * len(bin_gaps.weight):
        return DebiasedError(high, float("nan"), float("nan"))

    def accepted(error: float) -> float:
        return model.p_value(error) - (1 - level)

    low = 0.0 if high == 0.0 or accepted(0.0) >= 0 else _crossing(accepted, 0.0, 0.0, high)
    # bins of few images that are off by more than the rest are shrunk towards it, which takes their error for noise: the upper
    # end is also that of the shape of the gaps as they were observed
    observed = _Model(bin_gaps, np.abs(bin_gaps.gap))
    ends = (
        _crossing(lambda error, m=m: 1 - level - m.p_value(error), 0.0, max(high, m.estimate()), 1.0)
        for m in (model, observed)
    )
    return DebiasedError(high, low, max(ends))


class _Model:
    """The distribution of the binned error x at a true error e."""

    def __init__(self, bin_gaps: Gaps, shape: np.ndarray | None = None) -> None:
        self._weight, self._scale = bin_gaps.weight, np.sqrt(bin_gaps.variance)
        self._n = bin_gaps.n_images
        shape = _expected_sizes(bin_gaps) if shape is None else shape
        total = float(bin_gaps.weight @ shape)
        self._shape = shape / total if total > 0 else np.ones_like(shape)
        self.observed = float(bin_gaps.weight @ np.abs(bin_gaps.gap))
        self.at_zero = self.mean(0.0)

    def estimate(self) -> float:
        """Return the error at which x is expected where it was observed; 0 where it is below what noise makes."""
        return _crossing(self.mean, self.observed, 0.0, 1.0) if self.observed > self.at_zero else 0.0

    def mean(self, error: float) -> float:
        """Return the expectation of x."""
        return float(self._weight @ self._folded(error))

    def deviation(self, error: float) -> float:
        """Return the standard deviation of x: of the gaps, and of the shares of the bins."""
        true = error * self._shape
        folded = self._weight**2 @ (true**2 + self._scale**2 - self._folded(error) ** 2)
        shares = (self._weight @ true**2 - error**2) / self._n
        return float(np.sqrt(max(folded, 0.0) + max(shares, 0.0)))

    def _folded(self, error: float) -> np.ndarray:
        """Return each bin's E|N(e g, s^2)|."""
        return _folded_mean(error * self._shape, self._scale)

    def p_value(self, error: float) -> float:
        """Return the probability at ``error`` of outcomes with a likelihood ratio no larger than that of the observed x.

        In units of the standard deviation: z ~ N(t, 1), t >= 0. The ratio to the best t is -(z - t)^2 / 2 in logarithms for
        z >= 0, and z t - t^2 / 2 below, where the best t is 0.
        """
        deviation = self.deviation(error)
        if deviation == 0:
            return float(self.observed == self.mean(error))
        t, z = ((v - self.at_zero) / deviation for v in (self.mean(error), self.observed))
        ratio = -((z - t) ** 2) / 2 if z >= 0 else z * t - t**2 / 2
        upper = t + np.sqrt(-2 * ratio) if ratio < 0 else t
        mirrored = 2 * t - upper
        lower = -np.inf
        if mirrored >= 0:
            lower = mirrored
        elif t > 0:
            lower = (ratio + t**2 / 2) / t
        return float(ndtr(lower - t) + ndtr(t - upper))


def _expected_sizes(bin_gaps: Gaps) -> np.ndarray:
    """Return each bin's expected |gap| given what was observed, the gaps normal around a common one (empirical Bayes)."""
    common = float(bin_gaps.weight @ bin_gaps.gap)
    between = max(float(bin_gaps.weight @ ((bin_gaps.gap - common) ** 2 - bin_gaps.variance)), 0.0)
    trust = between / np.maximum(between + bin_gaps.variance, 1e-300)
    return _folded_mean(np.abs(common + trust * (bin_gaps.gap - common)), np.sqrt(trust * bin_gaps.variance))


def _folded_mean(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return E|N(mean, deviation^2)| for means of at least 0."""
    # beyond 40 deviations the normal is all on one side, as without any; the quotient of a tiny deviation would overflow
    ratio = mean / np.maximum(deviation, np.maximum(mean / 40, 1e-300))
    return deviation * np.sqrt(2 / np.pi) * np.exp(-0.5 * ratio**2) + mean * (2 * ndtr(ratio) - 1)


def _crossing(function, level: float, low: float, high: float) -> float:
    """Return where an increasing function reaches ``level`` in [low, high]; the end that is nearest where it does not."""
    if function(low) >= level:
        return low
    if function(high) <= level:
        return high
    return cast(float, brentq(lambda x: function(x) - level, low, high, xtol=1e-9))
