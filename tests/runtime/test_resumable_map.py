"""Rows that survive an interruption."""

from __future__ import annotations

from typing import Any

import pytest

from vitscope.runtime import distributed
from vitscope.runtime.resumable_map import map_resumably, merge_rows, stored_row


def test_only_missing_rows_are_computed_and_each_is_stored_at_once() -> None:
    partial: dict[str, Any] = {"key 2": {"value": 20}}
    computed = []

    def compute(key: int) -> dict[str, int]:
        if key == 3 and "key 3" not in computed:
            computed.append("key 3")
            raise KeyboardInterrupt
        computed.append(key)
        return {"value": 10 * key}

    def run() -> list:
        return map_resumably([1, 2, 3], compute, name="key {}".format, partial=partial, description="test")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert partial == {"key 1": {"value": 10}, "key 2": {"value": 20}}
    assert run() == [{"value": 10}, {"value": 20}, {"value": 30}]
    assert computed == [1, "key 3", 3]
    assert run() == [{"value": 10}, {"value": 20}, {"value": 30}]
    assert computed == [1, "key 3", 3]


def test_without_a_store_every_row_is_computed() -> None:
    rows = map_resumably([2, 1], lambda key: {"value": key}, name=str, partial=None, description="test")
    assert rows == [{"value": 2}, {"value": 1}]


def test_a_stored_row_that_lacks_a_value_is_computed_again() -> None:
    partial: dict[str, Any] = {"a": {"nodes": 1}}
    assert stored_row(partial, "a", lambda: {"nodes": 2}) == {"nodes": 1}
    complete = {"nodes": 2, "residuals": 3}
    assert stored_row(partial, "a", lambda: complete, required=["residuals"]) == complete
    assert partial == {"a": complete}
    assert stored_row(None, "a", lambda: {"nodes": 4}) == {"nodes": 4}


def test_one_rank_merges_its_own_rows() -> None:
    assert merge_rows({3: {"value": 1}, 1: {"value": 2}}) == {3: {"value": 1}, 1: {"value": 2}}


def test_the_failure_of_another_rank_is_raised_and_finished_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = distributed._Failure("no images", is_value_error=False)
    monkeypatch.setattr(distributed, "_objects_of_ranks", lambda value: [value, failure] if value is None else [value])
    partial: dict[str, dict[str, Any]] = {}
    with pytest.raises(RuntimeError, match="another rank failed"):
        map_resumably([1, 2], lambda key: {"value": key}, name=str, partial=partial, description="rows")
    assert partial == {"1": {"value": 1}, "2": {"value": 2}}
