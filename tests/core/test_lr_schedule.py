"""The schedule against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from vitscope.core.lr_schedule import factor

CASE = {"steps_per_epoch": 10, "total_epochs": 12, "warmup_epochs": 2}


def test_warm_up_rises_by_iteration_and_starts_moving() -> None:
    assert [factor(step, **CASE) for step in (0, 9, 19)] == pytest.approx([1 / 20, 0.5, 1.0])


def test_warm_up_in_steps_does_not_depend_on_the_length_of_an_epoch() -> None:
    for steps_per_epoch in (1, 10, 300):
        case = {"steps_per_epoch": steps_per_epoch, "total_epochs": 40 / steps_per_epoch, "warmup_epochs": 2}
        rates = [factor(step, **case, warmup_steps=4) for step in (0, 3, 4, 22, 40)]
        assert rates == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0], abs=1e-15)
    assert factor(0, **CASE, warmup_steps=0) == 1.0
    assert [factor(s, **CASE, warmup_steps=20) for s in range(120)] == [factor(s, **CASE) for s in range(120)]


def test_cosine() -> None:
    assert factor(20, **CASE) == 1.0
    assert factor(70, **CASE) == pytest.approx(0.5)
    assert factor(119, **CASE) == pytest.approx(0.5 * (1 + math.cos(math.pi * 9.9 / 10)))
    assert factor(120, **CASE, min_factor=0.1) == pytest.approx(0.1)
    assert [factor(step, **CASE, min_factor=0.1) for step in (121, 180, 219)] == pytest.approx(
        [0.1] * 3
    )  # past its end
    assert factor(77, **CASE, per_epoch=True) == pytest.approx(0.5)


def test_milestones_count_from_the_end_of_warm_up() -> None:
    steps = {19: 1.0, 20 + 29: 1.0, 20 + 30: 0.2, 20 + 59: 0.2, 20 + 60: 0.04}
    for step, expected in steps.items():
        assert factor(step, **CASE, kind="multistep", milestones=[3, 6], gamma=0.2) == pytest.approx(expected)


def test_constant_and_unknown() -> None:
    assert factor(500, **CASE, kind="constant") == 1.0
    with pytest.raises(ValueError, match="Expected kind"):
        factor(500, **CASE, kind="step")
