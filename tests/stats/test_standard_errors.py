"""Standard errors that are printed as such: their squares are right on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscope.diagnostics.cka._hsic import hsic
from vitscope.diagnostics.cka.cka import _jackknife, _ratio
from vitscope.diagnostics.corruption.corruption import standard_error
from vitscope.stats.intervals import t_half_width_of_rows

# ---- standard errors that are printed as such: their squares are right on average


def calibrated(squares: np.ndarray, numbers: np.ndarray, lowest: float = 1.0, highest: float = 1.0) -> None:
    """Assert that mean ``squares`` of standard errors over the variance of ``numbers`` lies in [lowest, highest].

    Give or take 3.3 standard errors of that ratio (1 in 1000), from the spread of both over the simulations.
    """
    n = len(numbers)
    deviation = np.square(numbers - numbers.mean())
    variance = deviation.mean() * n / (n - 1)
    ratio = squares.mean() / variance
    noise = ratio * np.std(squares / squares.mean() - deviation / deviation.mean()) / np.sqrt(n)
    assert lowest - 3.3 * noise <= ratio <= highest + 3.3 * noise, f"{ratio:.3f} ± {noise:.3f}"


@pytest.mark.parametrize(
    ("batches", "images"), [(2, 16), (4, 16), pytest.param(16, 16, marks=pytest.mark.slow), (6, 40)]
)
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_the_jackknife_of_cka_is_calibrated(batches: int, images: int, alike: float) -> None:
    """The jackknife's variance errs upward (Efron and Stein 1981)."""
    rng = np.random.default_rng(14)
    n = 400
    scale = 0.7 ** np.arange(6)
    a = rng.normal(size=(n * batches, images, 6)) * scale
    b = alike * a + (1 - alike) * rng.normal(size=a.shape) * scale
    grams = torch.from_numpy(
        np.stack([x @ x.swapaxes(1, 2) for x in (a, b)], axis=1)
    )  # (n * batches, 2, images, images)
    values = np.stack([hsic(g, g).numpy() for g in grams]).reshape(n, batches, 2, 2)
    weights = np.full(batches, float(images))
    numbers = np.array([_ratio(np.tensordot(weights, v, 1), 2, False)[0, 1] for v in values])
    errors = np.array([_jackknife(weights, v, 2, False)[0, 1] for v in values])
    calibrated(np.square(errors), numbers, highest=1.2)


@pytest.mark.parametrize("images", [2, 10, 100])
def test_the_standard_error_of_the_mean_accuracy_under_corruption_is_calibrated(images: int) -> None:
    """An image's 15 conditions go right or wrong together: it is easy or hard for all of them."""
    rng = np.random.default_rng(15)
    by_image = rng.binomial(15, rng.beta(2, 1, (5000, images))) / 15
    errors = np.array([standard_error(row) for row in by_image])
    none = np.isnan(errors)
    assert (none == (np.ptp(by_image, axis=1) == 0)).all()
    calibrated(np.where(none, 0.0, np.square(errors)), by_image.mean(1))  # where all images agree there is none


def test_images_that_agree_have_no_standard_error() -> None:
    for agreeing in (np.ones(50), np.zeros(3), np.full(7, 0.1), np.ones(1), np.ones(0)):
        assert np.isnan(standard_error(agreeing))


def test_two_rows_have_an_interval_and_fewer_than_asked_for_have_none() -> None:
    rows = np.array([[1.0, 5.0], [2.0, 5.0]])
    np.testing.assert_allclose(t_half_width_of_rows(rows), [np.tan(np.pi * 0.475) / 2, 0.0], rtol=1e-12)  # Cauchy
    assert np.isnan(t_half_width_of_rows(rows, least=3)).all()
    assert np.isnan(t_half_width_of_rows(rows[:1])).all()
