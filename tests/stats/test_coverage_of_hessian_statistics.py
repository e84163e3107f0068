"""Intervals of the negative eigenvalue proportion and the average positive eigenvalue hold the truth at their nominal rate."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.fixtures.oracles.coverage import FAST, SLOW, assert_coverage
from vitscope.diagnostics.hessian import _nep_statistics
from vitscope.reports.claims.factorial_analysis import QUANTITIES, _Reader
from vitscope.stats.intervals import (
    LEAST_IMAGES,
)

# ---- negative eigenvalue proportion and average positive eigenvalue, over mini-batches


def spectra(
    rng: np.random.Generator, n_batches: int, share: float, alike: float, k: int = 5, spread: float = 0.4
) -> np.ndarray:
    """Return top-k eigenvalues ``(n_batches, k)``: falling, scaled by batch, negative with a batch's own probability."""
    scale = rng.lognormal(0, spread, (n_batches, 1))
    sizes = scale * 100 * np.exp(-0.35 * np.arange(k)) * rng.lognormal(0, 0.2, (n_batches, k))
    a, b = (p * (1 - alike) / alike for p in (share, 1 - share)) if alike else (1.0, 1.0)
    own = rng.beta(a, b, (n_batches, 1)) if alike else np.full((n_batches, 1), share)
    return np.where(rng.random((n_batches, k)) < own, -0.3, 1.0) * sizes


def covered_by_pooled(n: int, n_batches: int, share: float, alike: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    many = spectra(rng, 400_000, share, alike)
    truth = many[many > 0].mean()
    nep, ape = [], []
    for _ in range(n):
        values = spectra(rng, n_batches, share, alike)
        zero = np.zeros_like(values)
        for found, interval, statistic, true in (
            (nep, _nep_statistics.proportion_interval, _nep_statistics.negative_proportion, share),
            (ape, _nep_statistics.average_interval, _nep_statistics.positive_average, truth),
        ):
            low, high = interval(values, zero)
            if np.isfinite(low):
                assert low <= statistic(values, zero) <= high
                found.append(low <= true <= high)
    return np.array(nep), np.array(ape)


def test_nep_and_ape_cover_with_few_batches() -> None:
    for n_batches in (8, 16):
        nep, ape = covered_by_pooled(FAST, n_batches, 0.2, 0.1)
        assert_coverage(nep, highest=1.0)
        assert_coverage(ape)


@pytest.mark.slow
@pytest.mark.parametrize("alike", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("n_batches", [4, 8, 16, 64])
def test_nep_and_ape_cover(n_batches: int, share: float, alike: float) -> None:
    nep, ape = covered_by_pooled(SLOW, n_batches, share, alike)
    assert len(nep) == (SLOW if n_batches >= _nep_statistics.NEP_BATCHES else 0)
    assert len(ape) >= 0.99 * SLOW
    assert_coverage(ape)
    if len(nep):
        assert_coverage(nep, highest=1.0)


def covered_by_ape(n: int, n_batches: int, spread: float, share: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(18)
    many = spectra(rng, 400_000, share, 0.0, spread=spread)
    zero = np.zeros((n_batches, 5))
    ends = np.array(
        [_nep_statistics.average_interval(spectra(rng, n_batches, share, 0.0, spread=spread), zero) for _ in range(n)]
    )
    truth = many[many > 0].mean()
    return (ends[:, 0] <= truth) & (truth <= ends[:, 1])


def test_ape_covers_where_batches_differ_much() -> None:
    assert_coverage(covered_by_ape(SLOW, 16, 1.2))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.2, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("n_batches", [4, 8, 16, 64])
def test_ape_covers_at_any_spread_of_batches(n_batches: int, spread: float) -> None:
    assert_coverage(covered_by_ape(SLOW, n_batches, spread))


def covered_by_nep(n: int, n_batches: int, share: float, alike: float) -> np.ndarray:
    rng = np.random.default_rng(11)
    zero = np.zeros((n_batches, 5))
    ends = np.array(
        [_nep_statistics.proportion_interval(spectra(rng, n_batches, share, alike), zero) for _ in range(n)]
    )
    return (ends[:, 0] <= share) & (share <= ends[:, 1])


@pytest.mark.parametrize(("n_batches", "share"), [(8, 0.2), (64, 0.05)])
def test_nep_covers_where_the_eigenvalues_of_a_batch_are_alike(n_batches: int, share: float) -> None:
    assert_coverage(covered_by_nep(500, n_batches, share, 0.5), lowest=0.95, highest=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("alike", [0.5, 0.8])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("n_batches", [8, 16, 64])
def test_nep_covers_in_its_worst_cases(n_batches: int, share: float, alike: float) -> None:
    assert_coverage(covered_by_nep(SLOW, n_batches, share, alike), highest=1.0)
    assert_coverage(covered_by_nep(SLOW, n_batches, 1 - share, alike), highest=1.0)  # where positive ones are as rare


def test_below_the_stated_number_of_batches_there_is_no_interval() -> None:
    values = spectra(np.random.default_rng(0), 64, 0.2, 0.0)
    for n, interval in (
        (_nep_statistics.NEP_BATCHES, _nep_statistics.proportion_interval),
        (_nep_statistics.APE_BATCHES, _nep_statistics.average_interval),
    ):
        assert np.isnan(interval(values[: n - 1], np.zeros((n - 1, 5)))).all()
        assert np.isfinite(interval(values[:n], np.zeros((n, 5)))).all()
    none = np.abs(values)
    low, high = _nep_statistics.proportion_interval(none[:16], np.zeros((16, 5)))
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 16))  # as if the eigenvalues of a batch were one
    assert np.isnan(_nep_statistics.average_interval(np.ones((8, 5)), np.zeros((8, 5)))).all()  # no spread to judge by
    assert np.isnan(_nep_statistics.average_interval(-none[:8], np.zeros((8, 5)))).all()  # nothing positive


# ---- factors, over mini-batches of a single seed


def covered_by_factors(n: int, n_batches: int, spread: float) -> dict[str, np.ndarray]:
    """Return which of n simulations hold each model's APE and their difference; models see the same mini-batches."""
    rng = np.random.default_rng(16)
    (quantity,) = (q for q in QUANTITIES if q.key == "ape")
    size = {"vit": 1.0, "convnet": 0.8}
    condition = ("weak", "clean", "nll")

    def eigenvalues(n: int) -> dict[str, np.ndarray]:
        shared = rng.lognormal(0, 0.3, (n, 1))
        return {family: by * shared * spectra(rng, n, 0.1, 0.0, spread=spread) for family, by in size.items()}

    many = {family: v[v > 0].mean() for family, v in eigenvalues(400_000).items()}
    truth = {**many, "difference": many["vit"] - many["convnet"]}
    covered: dict[str, list[bool]] = {column: [] for column in truth}
    for _ in range(n):
        zero = np.zeros((n_batches, 5))
        results = {
            (family, training, f"hessian{end}", 0): SimpleNamespace(eigenvalues=v, residuals=zero, l2_contribution=zero)
            for family, v in eigenvalues(n_batches).items()
            for training in ("weak", "strong")
            for end in ("", "_clean")
        }
        read = _Reader(quantity, results, [0])
        assert read.complete
        for column, true in truth.items():
            found = read.interval({condition: 1.0}, column)
            if np.isfinite(found.low):
                assert found.low <= found.mean <= found.high
                covered[column].append(found.low <= true <= found.high)
    return {column: np.array(hits) for column, hits in covered.items()}


@pytest.mark.parametrize(
    ("n_batches", "spread"),
    [(4, 0.4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 0.8), (16, 1.0)))],
)
def test_each_model_s_ape_of_one_seed_covers_and_few_mini_batches_tell_no_difference(
    n_batches: int, spread: float
) -> None:
    covered = covered_by_factors(400, n_batches, spread)
    assert not len(covered["difference"])
    for column in ("vit", "convnet"):
        assert len(covered[column]) == 400
        assert_coverage(covered[column])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_batches", "spread"), [(4, 0.8), (8, 0.4), (8, 1.0), (16, 0.8), (LEAST_IMAGES, 0.4), (LEAST_IMAGES, 0.8)]
)
def test_factors_over_mini_batches_of_one_seed_cover(n_batches: int, spread: float) -> None:
    covered = covered_by_factors(SLOW, n_batches, spread)
    assert len(covered["difference"]) == (SLOW if n_batches >= LEAST_IMAGES else 0)
    for hits in covered.values():
        if len(hits):
            assert_coverage(hits)
