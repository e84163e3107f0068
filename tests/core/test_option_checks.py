"""Checks of options run before a measure, with its defaults, and without a model."""

from __future__ import annotations

import pytest

import vitscope as vs
from vitscope.core.checks.option_checks import check_options, checks_options
from vitscope.core.measure_options import record_options


def check_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"Expected low < high, received {low} and {high}.")


@record_options
@checks_options(check_order)
def measure(probe: vs.Probe, *, low: float, high: float = 1.0) -> str:
    return f"{low} to {high}"


def test_a_measure_is_not_called_with_refused_options(mlp, mlp_batches) -> None:
    probe = vs.Probe(mlp, mlp_batches)
    assert measure(probe, low=0.0) == "0.0 to 1.0"
    for options in ({"low": 2.0}, {"low": 0.5, "high": 0.5}):
        with pytest.raises(ValueError, match="Expected low < high"):
            measure(probe, **options)


def test_options_are_checked_alone_with_the_defaults_of_the_others() -> None:
    check_options(measure, {"low": 0.0})
    check_options(measure, {"high": -1.0})  # low has no default: the call itself will say so
    with pytest.raises(ValueError, match="received 3 and 1.0"):
        check_options(measure, {"low": 3})


def test_the_first_error_of_a_wrong_call_is_that_of_the_call(mlp, mlp_batches) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lowest'"):
        measure(vs.Probe(mlp, mlp_batches), lowest=1)


@pytest.mark.parametrize("measure", ["hessian_eigenvalues", "similarity", "attention_maps"])
def test_measures_hand_their_checks_on(measure: str) -> None:
    """A signature that lists fields of `CurvatureOptions` and a shared feature pass are decorators of their own."""
    wrong = {"hessian_eigenvalues": {"solver": "qr"}, "similarity": {"measure": "svd"}, "attention_maps": {"heads": ()}}
    with pytest.raises(ValueError, match="Expected"):
        check_options(getattr(vs, measure), wrong[measure])


def test_a_shared_pass_checks_options(mlp, mlp_batches) -> None:
    with pytest.raises(ValueError, match="Expected features to be"):
        vs.one_pass(vs.Probe(mlp, mlp_batches), {"similarity": {"features": "mean"}})
