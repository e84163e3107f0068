"""Intervals of the negative eigenvalue proportion and of the average positive eigenvalue against the formulas they cite."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from vitscope.diagnostics.hessian import _nep_statistics


def batches(n_negative: list[int], k: int) -> np.ndarray:
    """Return eigenvalues ``(n_batches, k)`` of which the first ones of each batch are negative."""
    return np.array([[-1.0] * n + [2.0] * (k - n) for n in n_negative])


def clopper_pearson(successes: float, n: float, level: float) -> list[float]:
    tail = (1 - level) / 2
    return [stats.beta.ppf(tail, successes, n - successes + 1), stats.beta.ppf(1 - tail, successes + 1, n - successes)]


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_proportion_has_the_interval_of_korn_and_graubard(level: float) -> None:
    n_negative, k = [0, 1, 1, 2, 4, 5, 0, 3, 1, 6], 8
    found = _nep_statistics.proportion_interval(batches(n_negative, k), np.zeros((10, k)), level)
    shares = np.array(n_negative) / k
    share = shares.mean()
    effect = shares.var(ddof=1) / 10 / (share * (1 - share) / (10 * k))
    assert 1 < effect < k
    # Satterthwaite: of the variance of the mean only the part above that of independent eigenvalues is estimated
    freedom = 9 * (effect / (effect - 1)) ** 2
    quantiles = stats.norm.ppf(0.5 + level / 2) / stats.t.ppf(0.5 + level / 2, freedom)
    effective = 10 * k / effect * quantiles**2
    np.testing.assert_allclose(found, clopper_pearson(share * effective, effective, level), rtol=1e-9)


def test_eigenvalues_that_are_more_alike_over_batches_than_drawn_ones_count_as_independent() -> None:
    found = _nep_statistics.proportion_interval(batches([2] * 10, 8), np.zeros((10, 8)))
    np.testing.assert_allclose(found, clopper_pearson(20, 80, 0.95), rtol=1e-9)


def test_eigenvalues_within_their_residual_are_not_negative() -> None:
    values = batches([2] * 10, 8)
    residuals = np.full_like(values, 0.5)
    residuals[:, 0] = 1.5
    found = _nep_statistics.proportion_interval(values, residuals)
    np.testing.assert_allclose(found, clopper_pearson(10, 80, 0.95), rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_average_has_halls_upper_end_where_it_is_wider(sign: int) -> None:
    """Hall's end solves ``t + a t^2 + a^2 t^3 / 3 + a / 2 = -q`` with ``a = skewness / (3 sqrt(n))`` and Student's quantile q."""
    n, level = 12, 0.9
    values = np.exp(sign * stats.gamma.ppf((np.arange(n) + 0.5) / n, 0.5))[:, None]
    low, high = _nep_statistics.average_interval(values, np.zeros((n, 1)), level)
    rest = np.log((values.sum() - values[:, 0]) / (n - 1))
    deviations = rest.mean() - rest
    error = np.sqrt((n - 1) / n * np.square(deviations).sum())
    skewness = stats.skew(deviations)
    assert np.sign(skewness) == sign
    a, quantile = skewness / (3 * np.sqrt(n)), stats.t.ppf(0.5 + level / 2, n - 1)
    hall = -brentq(lambda t: t + a * t**2 + a**2 * t**3 / 3 + a / 2 + quantile, -100, 100, xtol=1e-13)
    assert (hall > quantile) == (sign > 0)
    assert low == pytest.approx(values.mean() * np.exp(-quantile * error), rel=1e-9)
    assert high == pytest.approx(values.mean() * np.exp(max(hall, quantile) * error), rel=1e-9)
