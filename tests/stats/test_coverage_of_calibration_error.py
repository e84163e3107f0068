"""The interval of the expected calibration error holds the truth at its nominal rate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.fixtures.oracles.coverage import FAST, assert_coverage
from vitscope.diagnostics.calibration import _bins
from vitscope.diagnostics.calibration._debiased import IMAGES_A_BIN, DebiasedError, debiased_error, gaps

# ---- expected calibration error

CONFIDENCE: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "spread": lambda rng, n: rng.uniform(0.2, 1, n),
    "saturated": lambda rng, n: 1 - 0.9 * rng.beta(0.3, 3, n),
    "unsure": lambda rng, n: 0.05 + 0.9 * rng.beta(2, 8, n),
}
ACCURACY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "calibrated": lambda c: c,
    "slightly off": lambda c: np.clip(c - 0.02, 0, 1),
    "over-confident": lambda c: c**1.5,
    "mixed": lambda c: np.clip(c + 0.1 * np.sin(6 * c), 0, 1),
}


def covered_by_ece(
    n: int, images: int, confidence: str, accuracy: str, n_bins: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    many = CONFIDENCE[confidence](rng, 1_000_000)
    truth = _bins.equal_width(many, ACCURACY[accuracy](many), n_bins).error
    covered, errors = [], []
    for _ in range(n):
        c = CONFIDENCE[confidence](rng, images)
        y = (rng.random(images) < ACCURACY[accuracy](c)).astype(float)
        bins = _bins.equal_width(c, y, n_bins)
        found: DebiasedError = debiased_error(gaps(bins, c, y))
        assert found.low <= found.error <= found.high
        high = max(found.high, bins.error)
        covered.append(found.low <= truth <= high)
        errors.append((found.error - truth, bins.error - truth))
    return np.array(covered), np.array(errors)


@pytest.mark.parametrize("confidence", ["spread", "saturated"])
def test_the_interval_of_the_calibration_error_holds_zero_for_a_calibrated_model(confidence: str) -> None:
    covered, errors = covered_by_ece(FAST, 1000, confidence, "calibrated")
    assert_coverage(covered)
    debiased, plain = errors.mean(axis=0)
    assert 0 <= debiased < 0.5 * plain  # the plain error is nothing but bias here


@pytest.mark.slow
@pytest.mark.parametrize("images", [400, 2000])
@pytest.mark.parametrize("accuracy", ACCURACY)
@pytest.mark.parametrize("confidence", CONFIDENCE)
def test_the_interval_of_the_calibration_error_covers(confidence: str, accuracy: str, images: int) -> None:
    covered, errors = covered_by_ece(1000, images, confidence, accuracy)
    assert_coverage(covered)
    debiased, plain = np.abs(errors.mean(axis=0))
    assert debiased <= plain + 2e-3


def test_few_images_have_a_debiased_error_and_no_interval() -> None:
    rng = np.random.default_rng(0)
    c = rng.uniform(0.5, 0.6, IMAGES_A_BIN - 1)  # one bin
    found = debiased_error(gaps(_bins.equal_width(c, np.ones_like(c), 10), c, np.ones_like(c)))
    assert found.error > 0.3
    assert np.isnan([found.low, found.high]).all()
