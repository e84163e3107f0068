"""The exact tests of paired effects against their definitions, SciPy, and their level under every kind of noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from vitscope.stats import location_tests as tests


def p_by_definition(values: np.ndarray) -> float:
    sums = [sum(s * v for s, v in zip(signs, values)) for signs in itertools.product((1, -1), repeat=len(values))]
    return float(np.mean([abs(total) >= abs(values.sum()) - 1e-9 for total in sums]))


@pytest.mark.parametrize("n", [1, 2, 5, 8, 11])
def test_the_sign_flip_test_is_its_definition_and_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.5, 2.0):
        values = rng.standard_normal(n) + shift
        found = tests.sign_flip_p(values.tolist())
        assert found == pytest.approx(p_by_definition(values), abs=1e-12)
        if n > 1:
            scipys = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
            assert found == pytest.approx(min(1.0, float(scipys.pvalue)), abs=1e-12)


def test_values_with_equal_magnitudes_are_ties_however_they_are_summed() -> None:
    assert tests.sign_flip_p([0.1] * 9 + [-0.1]) == pytest.approx(2 * 11 / 2**10)  # none or one of ten negative
    assert tests.sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a sum that is zero but for rounding


def test_all_of_one_sign_give_the_smallest_p() -> None:
    values = [0.3, 1.0, 2.0, 0.1, 0.7, 1.3]
    assert tests.sign_flip_p(values) == tests.sign_p(values) == tests.smallest_p(6) == 2 / 64
    assert [tests.fewest_values(0.05 / m) for m in (1, 2, 11)] == [6, 7, 9]


def test_a_level_that_the_smallest_p_equals_is_not_passed() -> None:
    """Verdicts need a p-value below the level: of 6 values none is below 2 / 64."""
    assert [tests.fewest_values(2.0**-k) for k in (1, 5, 9)] == [3, 7, 11]
    assert tests.power(6, 2.0**-5, 100.0) == 0.0
    assert tests.power(7, 2.0**-5, 100.0) == 1.0


def test_the_sign_test_is_scipys_in_the_direction_of_the_mean() -> None:
    values = [1.0, 2.0, 0.5, 0.2, -0.4, 3.0, 1.0]
    assert tests.sign_p(values) == pytest.approx(stats.binomtest(6, 7).pvalue)
    assert tests.sign_p([-1.0, -1.0, -1.0, -1.0, -1.0, 60.0]) == 1.0  # the mean is positive, most effects are not
    assert tests.sign_p([1.0, 2.0, 0.5, 0.2, 0.0, 3.0, 1.0]) == pytest.approx(stats.binomtest(6, 7).pvalue)
    assert tests.sign_p([0.0, 0.0]) == 1.0


def test_many_values_are_tested_with_random_signs() -> None:
    values = np.random.default_rng(3).standard_normal(41) + 0.3
    drawn = tests.sign_flip_p(values.tolist())
    normal = 2 * stats.norm.sf(
        abs(values.sum()) / np.sqrt((values**2).sum())
    )  # the limit of the sign-flip distribution
    assert drawn == pytest.approx(normal, rel=0.15)  # p is 0.04: a standard error of 1.5 %, and the limit's own error


def test_effects_without_spread_have_no_p() -> None:
    found = tests.location_tests([0.5] * 6)
    assert np.isnan([found.t, found.sign_flip, found.sign, found.largest]).all()
    found = tests.location_tests([1.0, 1.2, 0.9, 1.1, 0.8])
    assert (found.largest, found.attainable) == (0.0625, 0.0625)
    assert found.t == pytest.approx(stats.ttest_1samp([1.0, 1.2, 0.9, 1.1, 0.8], 0).pvalue)


def test_power_is_that_of_the_sign_test_where_all_signs_must_agree() -> None:
    level = 0.05 / 11  # of 10 seeds only 2 / 1024 is below it, so that the sign test needs all of them
    found = [tests.power(10, level, effect) for effect in (0.0, 1.0, 2.0, 4.0)]
    exact = [stats.norm.cdf(effect) ** 10 + stats.norm.cdf(-effect) ** 10 for effect in (0.0, 1.0, 2.0, 4.0)]
    error = 4 * math.sqrt(0.25 / 4000)
    assert all(f <= e + error for f, e in zip(found, exact))
    assert found[2] == pytest.approx(exact[2], abs=0.1 + error)  # the t-test takes some more
    assert found[3] > 0.99
    assert tests.power(8, level, 100.0) == 0.0  # 2 / 256 is above the level


@pytest.mark.parametrize(("n", "effect"), [(8, 1.0), (10, 1.5), (20, 0.9)])
def test_power_is_the_share_of_studies_whose_tests_all_pass(n: int, effect: float) -> None:
    level = 0.02
    samples = np.random.default_rng(0).standard_normal((500, n)) + effect
    passed = [tests.location_tests(sample.tolist()).largest < level for sample in samples]
    assert 0.2 < np.mean(passed) < 0.95
    assert tests.power(n, level, effect, n_studies=500) == np.mean(passed)


NOISE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
    "differences of skewed runs": lambda rng, shape: rng.lognormal(size=shape) - rng.lognormal(size=shape),
    "skewed about their median": lambda rng, shape: rng.lognormal(size=shape) - 1.0,
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("n", [6, 10])
def test_all_three_together_keep_their_level(noise: str, n: int) -> None:
    samples = NOISE[noise](np.random.default_rng(0), (2000, n))
    rejected = sum(tests.location_tests(x.tolist()).largest < 0.05 for x in samples)
    assert rejected <= stats.binom.isf(1e-4, 2000, 0.05)


def test_a_mean_of_zero_has_no_side() -> None:
    """Zeros on the side of a mean of zero once gave the sign test 2 (1 + 22 + 231) / 2^22 = 1.2e-4."""
    values = [0.0] * 20 + [1.0, -1.0]
    found = tests.location_tests(values)
    assert (found.t, found.sign_flip, found.sign) == (1.0, 1.0, 1.0)
    assert not found.is_one_sign


def test_effects_of_one_sign_are_told_from_others() -> None:
    assert tests.location_tests([1.0, 1.2, 0.9, 1.1, 0.8]).is_one_sign
    assert not tests.location_tests([1.0, 1.2, 0.9, 1.1, -0.1]).is_one_sign
    assert not tests.location_tests([1.0, 1.2, 0.9, 1.1, 0.0]).is_one_sign
