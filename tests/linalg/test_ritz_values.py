"""Errors and tolerances of Ritz values by hand, and when the wanted ones count as settled."""

from __future__ import annotations

import numpy as np
import pytest

from vitscope.linalg.ritz_values import Ritz, errors, settled, tolerances


def ritz(values: list[float], residuals: list[float]) -> Ritz:
    return Ritz(np.array(values), np.array(residuals), np.eye(len(values)))


def test_an_error_is_the_residual_or_its_square_over_the_nearest_gap() -> None:
    found = errors(ritz([0.0, 1.0, 5.0, 5.5], [0.1, 2.0, 0.2, 0.3]))
    # the gaps are 1, 1, 0.5 and 0.5; 2^2 / 1 is above the residual
    np.testing.assert_allclose(found, [0.01, 2.0, 0.08, 0.18], rtol=1e-12)
    assert errors(ritz([3.0], [0.4])).tolist() == [0.4]  # nothing to be apart from


def test_values_closer_than_their_residuals_share_a_bound() -> None:
    found = errors(ritz([0.0, 1.0, 1.1, 5.0], [0.1, 0.2, 0.3, 0.1]))
    shared = 0.2**2 + 0.3**2  # over the gap of 1 below 1.0; that above 1.1 is 3.9
    np.testing.assert_allclose(found, [0.01, shared, shared, 0.01 / 3.9], rtol=1e-12)


def test_a_tolerance_is_relative_to_the_value_and_at_least_to_a_thousandth_of_the_largest() -> None:
    values = np.array([-8.0, 0.001, 0.5, 10.0])
    np.testing.assert_allclose(tolerances(values, np.array([3, 0, 2, 1]), 0.1), [1.0, 0.8, 0.05, 0.001], rtol=1e-12)


@pytest.mark.parametrize(
    ("which", "values", "residuals", "is_settled"),
    [
        ("LA", [1.0, 1.99, 2.0], [0.0, 0.1, 0.0], False),  # the second may be 2.09
        ("LA", [1.0, 1.99, 2.0], [0.0, 0.01, 0.0], True),
        ("SA", [1.0, 1.01, 2.0], [0.0, 0.1, 0.0], False),
        ("LM", [-1.99, 1.0, 2.0], [0.1, 0.0, 0.0], False),
        ("LM", [-1.99, 1.0, 2.0], [0.0, 0.1, 0.0], True),
        ("LA", [0.0, 1.0, 2.0], [0.0, 0.0, 0.5], False),  # 0.5^2 / 1 is above 2 % of 2
    ],
)
def test_no_other_value_may_reach_among_the_wanted_ones(
    which: str, values: list[float], residuals: list[float], is_settled: bool
) -> None:
    assert settled(ritz(values, residuals), 1, which, 0.02)[1] == is_settled
