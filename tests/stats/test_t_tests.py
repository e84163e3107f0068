from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vitscope.reports.tables.table import Cell, Table, frame, interval_text
from vitscope.stats.t_tests import Interval, holm, t_interval


def test_the_interval_of_three_seeds_is_four_point_three_standard_errors() -> None:
    found = t_interval([1.0, 2.0, 4.0])
    standard_error = stats.sem([1.0, 2.0, 4.0])  # an independent implementation
    assert found.mean == pytest.approx(7 / 3, rel=1e-15)
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)  # of t with two degrees of freedom, in closed form
    assert quantile == pytest.approx(4.30, abs=0.005)
    assert found.half_width / standard_error == pytest.approx(quantile, rel=1e-10)
    assert found.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 4.0], 0).pvalue, rel=1e-12)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_one_seed_has_no_interval_and_equal_seeds_no_p() -> None:
    assert math.isnan(t_interval([3.0]).half_width)
    assert math.isnan(t_interval([]).mean)
    assert math.isnan(t_interval([0.2, 0.2, 0.2]).half_width)


@pytest.mark.parametrize(
    ("values", "magnitude"),
    [
        ([0.2] * 5, 0.0),
        ([0.0] * 5, 0.0),
        ([0.05, 0.9 - 0.85, 0.8 - 0.75, 0.7 - 0.65, 0.6 - 0.55], 0.0),  # equal but for the rounding of float64
        ([float(np.float32(0.3)) + i * float(np.finfo(np.float32).eps) / 4 for i in range(5)], 0.0),
        ([1e-17, 3e-17, 2e-17, 1e-17, 2e-17], 1.0),  # what is left of differences of numbers of magnitude 1
    ],
)
def test_equal_seeds_have_neither_interval_nor_p(values: list[float], magnitude: float) -> None:
    found = t_interval(values, magnitude)
    assert found.mean == pytest.approx(values[0], rel=1e-6, abs=1e-16)
    assert found.n == 5
    assert np.isnan([found.half_width, found.p]).all()


def test_seeds_that_differ_by_more_than_rounding_have_an_interval() -> None:
    found = t_interval([1.0, 1.0 + 1e-5, 1.0 - 1e-5])
    assert found.half_width == pytest.approx(4.3026527 * 1e-5 / 3**0.5, rel=1e-6)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite values, received"):
        t_interval([1.0, math.nan])


def test_holm_by_hand_and_against_its_definition() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert adjusted["a"] == pytest.approx(0.03)
    assert adjusted["c"] == pytest.approx(0.06)
    assert adjusted["b"] == pytest.approx(0.06)  # 1 x 0.04 is raised to the one before
    assert math.isnan(adjusted["d"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_an_interval_with_ends_of_its_own_shows_them() -> None:
    nan = float("nan")
    found = Interval(2.0, nan, nan, 1, (1.5, 4.0))
    assert (found.low, found.high, found.bars) == (1.5, 4.0, (0.5, 2.0))
    assert interval_text(found, ".3g") == "2 [1.5, 4]"
    row = frame(Table("t", "T", ("APE",), ("ape",), ((Cell("", found),),))).iloc[0]
    assert (row["ape"], row["ape_low"], row["ape_high"]) == (2.0, 1.5, 4.0)
    assert "ape_half_width" not in row
    assert Interval(2.0, 0.5, nan, 3).bars == (0.5, 0.5)
    assert Interval(2.0, nan, nan, 1).bars == (0.0, 0.0)  # nothing to draw
