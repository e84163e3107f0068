"""Kendall's tau by counting pairs, and its bootstrap interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vitscope.stats.rank_correlation import LEAST_PAIRS, _tau, kendall_tau


def test_tau_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=12), rng.normal(size=12)
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i in range(12) for j in range(i)]
    r = kendall_tau(x, y)
    assert r.tau == pytest.approx(np.mean(signs), abs=1e-12)
    assert r.low < r.tau < r.high
    assert kendall_tau(x, -y).tau == pytest.approx(-r.tau, abs=1e-12)
    assert kendall_tau(x, y) == r  # its own generator


def test_ties_are_those_of_tau_b() -> None:
    # concordant pairs 3, discordant 1, ties in x 1, ties in y 1: (3 - 1) / sqrt(5 * 5)
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 2]).tau == pytest.approx(2 / 5, abs=1e-12)


def test_resamples_have_scipys_tau_b() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(3, size=(50, 12)), rng.integers(8, size=(50, 12))  # many ties on one side, few on the other
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b)]
    np.testing.assert_allclose(_tau(a.astype(float), b.astype(float)), expected, rtol=1e-12, atol=1e-15)
    assert _tau(np.ones((1, 4)), np.arange(4.0)[None]) == 0


def test_interval_is_the_percentiles_of_resampled_pairs() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    taus = []
    for _ in range(2000):
        i = rng.integers(20, size=20)
        a, b = (np.sign(v[i][:, None] - v[i]) for v in (x, y))
        taus.append((a * b).sum() / np.sqrt(np.abs(a).sum() * np.abs(b).sum()))
    r = kendall_tau(x, y)
    # both are percentiles of 2000 resamples with other draws: standard errors of about 0.01
    assert [r.low, r.high] == pytest.approx(list(np.percentile(taus, [2.5, 97.5])), abs=0.05)
    half = kendall_tau(x, y, level=0.5)
    assert [half.low, half.high] == pytest.approx(list(np.percentile(taus, [25, 75])), abs=0.02)


def test_no_interval_where_there_is_none() -> None:
    few = kendall_tau(range(LEAST_PAIRS - 1), [0, 2, 1, 3, 4, 6, 5])
    assert math.isfinite(few.tau)
    assert math.isnan(few.low)
    assert math.isnan(kendall_tau(range(20), range(20)).high)
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]).tau)
    assert math.isnan(kendall_tau([], []).tau)
    with pytest.raises(ValueError, match="of one length, received shapes"):
        kendall_tau([1, 2], [1])
    with pytest.raises(ValueError, match="finite numbers"):
        kendall_tau([1, np.nan], [1, 2])
