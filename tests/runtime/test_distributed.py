"""Failures of one rank, told to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.processes import results_of_ranks
from vitscope.runtime import distributed
from vitscope.runtime.errors import DistributedError
from vitscope.runtime.stop_flag import Interrupted


def test_a_failure_is_raised_as_it_is() -> None:
    failure = ValueError("no images")
    with pytest.raises(ValueError, match="no images") as raised, distributed.failing_together():
        raise failure
    assert raised.value is failure
    assert raised.value.__context__ is None


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_rank_hears_of_the_failure_of_another(has_failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, "no memory"])
    expected, message = (ValueError, "no images") if has_failed else (RuntimeError, "failed: rank 1: no memory")
    with pytest.raises(expected, match=message), distributed.failing_together():
        if has_failed:
            raise ValueError("no images")


def test_an_interruption_waits_for_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[Any] = []
    monkeypatch.setattr(distributed, "gather_objects", gathered.append)
    with pytest.raises(Interrupted), distributed.failing_together():
        raise Interrupted(15)
    assert not gathered


def test_one_process_goes_on_after_a_failure() -> None:
    distributed.agree_on_failure(ValueError("no images"))


def two_failures(fails_alone: bool) -> list[str]:
    """Return what a rank hears of a failure of all ranks, and of another one, of all ranks or of rank 1 alone."""
    distributed.PATIENCE_S = 1.0 if fails_alone else 60.0
    texts = []
    for number in range(2):
        if number == 0 or not fails_alone or dist.get_rank() == 1:
            try:
                distributed.agree_on_failure(MemoryError("no memory"))
                texts.append("goes on")
            except DistributedError as error:
                texts.append(str(error))
    return texts


def test_ranks_that_all_fail_go_on(tmp_path: Path) -> None:
    assert results_of_ranks(lambda: two_failures(False), tmp_path) == [["goes on"] * 2] * 2


def test_a_rank_that_fails_alone_ends(tmp_path: Path) -> None:
    """Its next collective operation would meet one of the step that the others are still in."""
    first, (agreed, alone) = results_of_ranks(lambda: two_failures(True), tmp_path)
    assert first == [agreed] == ["goes on"]
    assert "rank 1 failed alone (no memory)" in alone
