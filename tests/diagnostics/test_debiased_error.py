"""Parts of the debiased calibration error against their definitions: sums over images, integrals and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vitscope.diagnostics.calibration import _bins
from vitscope.diagnostics.calibration._debiased import Gaps, _expected_sizes, _folded_mean, _Model, debiased_error, gaps


def test_gaps_and_variances_are_those_of_each_bins_images() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1.0, 60)
    correct = (rng.random(60) < confidence).astype(float)
    found = gaps(_bins.equal_width(confidence, correct, 5), confidence, correct)
    members = [(confidence > k / 5) & (confidence <= (k + 1) / 5) for k in range(1, 5)]  # the first bin is empty
    differences = [confidence[m] - correct[m] for m in members]
    np.testing.assert_allclose(found.weight, [m.sum() / 60 for m in members], rtol=1e-13)
    np.testing.assert_allclose(found.gap, [d.mean() for d in differences], rtol=1e-12)
    pseudo_image = [(confidence[m] * (1 - confidence[m])).mean() for m in members]
    expected = [(d.var() * len(d) + p) / len(d) ** 2 for d, p in zip(differences, pseudo_image)]
    np.testing.assert_allclose(found.variance, expected, rtol=1e-12)
    assert found.n_images == 60


def test_a_folded_normal_has_scipys_mean() -> None:
    mean, deviation = np.array([0.0, 0.1, 0.5, 2.0, 9.0]), np.array([0.3, 0.3, 1.0, 0.1, 0.2])
    expected = [stats.foldnorm(m / s, scale=s).mean() for m, s in zip(mean, deviation)]
    np.testing.assert_allclose(_folded_mean(mean, deviation), expected, rtol=1e-12)
    exact = np.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(_folded_mean(exact, np.zeros(3)), exact, rtol=1e-15)


def test_a_bin_of_saturated_wrong_answers_counts_in_the_expectation() -> None:
    """Confidences of exactly 1 that are all wrong are a gap of 1 without noise, which once counted as 0: the upper end was 1."""
    rng = np.random.default_rng(0)
    unsure = rng.uniform(0.5, 0.6, 440)
    confidence = np.append(unsure, np.ones(60))
    correct = np.append((rng.random(440) < unsure).astype(float), np.zeros(60))
    found = debiased_error(gaps(_bins.equal_width(confidence, correct, 10), confidence, correct))
    # the calibrated images add nothing to the true error, whose share of 60 of 500 images is known to 0.015
    assert found.error == pytest.approx(0.12, abs=0.01)
    assert (found.low, found.high) == pytest.approx((0.12 - 0.03, 0.12 + 0.03), abs=0.025)


def test_gaps_that_spread_no_more_than_noise_have_one_size() -> None:
    gap, noise = np.array([0.05, 0.03, 0.06, 0.02]), np.full(4, 0.02**2)
    assert gap.var() < noise[0]
    found = _expected_sizes(Gaps(np.full(4, 0.25), gap, noise, 400))
    np.testing.assert_allclose(found, np.full(4, gap.mean()), rtol=1e-12)


def test_gaps_beyond_noise_are_shrunk_towards_the_common_one() -> None:
    """Empirical Bayes: the prior variance is what the spread of the gaps has beyond their noise."""
    weight, gap = np.array([0.5, 0.3, 0.2]), np.array([0.3, -0.1, 0.1])
    variance = np.array([0.001, 0.004, 0.002])
    common = weight @ gap
    prior = weight @ (gap - common) ** 2 - weight @ variance
    assert prior > 0
    mean = (gap / variance + common / prior) / (1 / variance + 1 / prior)  # of the posterior of each true gap
    deviation = (1 / variance + 1 / prior) ** -0.5
    expected = [stats.foldnorm(abs(m) / s, scale=s).mean() for m, s in zip(mean, deviation)]
    np.testing.assert_allclose(_expected_sizes(Gaps(weight, gap, variance, 300)), expected, rtol=1e-10)


def model() -> _Model:
    weight = np.array([0.1, 0.2, 0.3, 0.4])
    return _Model(Gaps(weight, np.array([0.2, 0.02, 0.1, 0.04]), np.array([4e-4, 2e-4, 1e-4, 1e-4]), 500))


def test_mean_and_deviation_are_those_of_a_simulation() -> None:
    """Shares of bins are multinomial, gaps normal with the noise that they have at the expected shares."""
    rng, found, error, n = np.random.default_rng(0), model(), 0.08, 40_000
    shares = rng.multinomial(found._n, found._weight, n) / found._n
    gap = rng.normal(error * found._shape, found._scale, (n, 4))
    # to first order in the noise of the shares they weigh the true gaps
    x = (found._weight * np.abs(gap)).sum(1) + ((shares - found._weight) * error * found._shape).sum(1)
    assert found.mean(error) == pytest.approx(x.mean(), abs=4 * x.std() / np.sqrt(n))
    assert found.deviation(error) == pytest.approx(x.std(), rel=4 / np.sqrt(2 * n))


@pytest.mark.parametrize("error", [0.0, 0.002, 0.01, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("observed", [0.5, 0.9, 1.1, 1.5, 4.0])
def test_a_p_value_integrates_the_outcomes_of_no_larger_likelihood_ratio(error: float, observed: float) -> None:
    """Feldman and Cousins: outcomes z ~ N(t, 1), t >= 0, in the order of their likelihood over that at the best t."""
    found = model()
    found.observed = observed * found.at_zero
    deviation = found.deviation(error)
    t, z = (found.mean(error) - found.at_zero) / deviation, (found.observed - found.at_zero) / deviation
    step = 1e-4
    outcomes = np.arange(-9.0, t + 9.0, step)

    def log_ratio(values: np.ndarray) -> np.ndarray:
        return stats.norm.logpdf(values, t) - stats.norm.logpdf(values, np.maximum(values, 0.0))

    included = log_ratio(outcomes) <= log_ratio(np.array([z])) + 1e-12
    # each end of the outcomes that count is off by at most a step, of density 0.4 at most
    expected = (stats.norm.pdf(outcomes, t) * included).sum() * step
    assert found.p_value(error) == pytest.approx(expected, abs=4 * 0.4 * step)
