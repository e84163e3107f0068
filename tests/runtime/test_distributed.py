"""Failures of one rank, told to the others."""

from __future__ import annotations

from typing import Any

import pytest

from vitscope.runtime import distributed
from vitscope.runtime.stop_flag import Interrupted


def test_a_failure_is_raised_as_it_is() -> None:
    failure = ValueError("no images")
    with pytest.raises(ValueError, match="no images") as raised, distributed.failing_together():
        raise failure
    assert raised.value is failure
    assert raised.value.__context__ is None


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_rank_hears_of_the_failure_of_another(has_failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, True])
    expected, message = (ValueError, "no images") if has_failed else (RuntimeError, "another rank failed")
    with pytest.raises(expected, match=message), distributed.failing_together():
        if has_failed:
            raise ValueError("no images")


def test_an_interruption_waits_for_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Any] = []
    monkeypatch.setattr(distributed, "gather_objects", gathered.append)
    with pytest.raises(Interrupted), distributed.failing_together():
        raise Interrupted(15)
    assert not gathered
