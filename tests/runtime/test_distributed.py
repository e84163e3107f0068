"""Failures of one rank, told to the others."""

from __future__ import annotations

import contextlib
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.fixtures.programs.processes import results_of_ranks
from vitscope.config.error_translation import code_for
from vitscope.runtime import distributed, stop_flag
from vitscope.runtime.errors import DistributedError, OtherRankError
from vitscope.runtime.stop_flag import Interrupted


def test_a_failure_is_raised_as_it_is() -> None:
    failure = ValueError("no images")
    with pytest.raises(ValueError, match="no images") as raised, distributed.failing_together():
        raise failure
    assert raised.value is failure
    assert raised.value.__context__ is None


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_rank_hears_of_the_failure_of_another(has_failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = distributed._Failure("no memory", False)
    monkeypatch.setattr(distributed, "_objects_of_ranks", lambda value: [value, failure])
    expected, message = (ValueError, "no images") if has_failed else (OtherRankError, "failed: rank 1: no memory")
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
    assert "rank 1 failed where the others did not (no memory)" in alone


def heard(block: Callable[[], object]) -> str:
    try:
        with distributed.failing_together():
            block()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def nested_failures() -> list[Any]:
    """Return what a rank hears where rank 1 fails beside, around and inside a gather of the others, and a last gather."""
    is_failing = dist.get_rank() == 1

    def fail_before_gather() -> None:
        if is_failing:
            raise KeyError("blocks")
        distributed.gather_objects("value")

    def fail_inside() -> None:
        with distributed.failing_together():
            if is_failing:
                raise ValueError("no images")

    def handle_and_fail_again() -> None:
        with contextlib.suppress(ValueError):  # of all ranks, which go on together
            fail_inside()
        fail_before_gather()

    def fail_before_sum() -> None:
        with distributed.failing_together(device=torch.device("cpu")):
            if is_failing:
                raise MemoryError

    texts = [heard(block) for block in (fail_before_gather, fail_inside, handle_and_fail_again, fail_before_sum)]
    return [*texts, distributed.gather_objects(len(texts))]


def test_a_rank_fails_where_others_gather(tmp_path: Path) -> None:
    first, second = results_of_ranks(nested_failures, tmp_path)
    of_other = "OtherRankError: trainer.devices: another rank failed: rank 1: {}; see its output"
    of_key, of_memory = of_other.format("'blocks'"), of_other.format("MemoryError")
    assert first == [of_key, "ValueError: another rank failed: rank 1: no images", of_key, of_memory, [4, 4]]
    assert second == ["KeyError: 'blocks'", "ValueError: no images", "KeyError: 'blocks'", "MemoryError: ", [4, 4]]


def agreement_of_unequal_ranks(has_left: bool) -> str:
    """Return what rank 0 hears where rank 1 has left, or where it fails too, but one collective operation later."""
    if dist.get_rank() == 1:
        if has_left:
            return ""
        distributed._n_collectives += 1
    error = MemoryError("no memory")
    if has_left:
        try:
            distributed.gather_objects(None)
        except RuntimeError as closed:
            error = closed
    try:
        distributed.agree_on_failure(error)
    except Exception as lost:
        return f"{code_for(lost)}: {lost}"
    return "goes on"


@pytest.mark.parametrize(("has_left", "reason"), [(True, "onnection"), (False, "failed where the")])
def test_ranks_that_are_not_at_one_place_do_not_go_on(has_left: bool, reason: str, tmp_path: Path) -> None:
    texts = results_of_ranks(lambda: agreement_of_unequal_ranks(has_left), tmp_path)[: 1 if has_left else 2]
    assert all(text.startswith("7: ") and reason in text for text in texts)


def stop_of_failed_rank() -> bool:
    if dist.get_rank() == 0:
        return True
    stop_flag.request(15)
    with pytest.raises(Interrupted):
        distributed.agree_on_failure(MemoryError("no memory"))
    return True


def test_a_rank_that_waits_for_the_failure_of_others_can_be_stopped(tmp_path: Path) -> None:
    assert results_of_ranks(stop_of_failed_rank, tmp_path) == [True, True]


def test_an_error_does_not_keep_what_its_block_held() -> None:
    """The tensors of a pass that ran out of memory are freed once the error is handled, without a garbage collection."""

    class Pass:
        pass

    held: list[weakref.ref[Pass]] = []

    def fail() -> None:
        local = Pass()
        held.append(weakref.ref(local))
        raise MemoryError

    gc.disable()
    try:
        with contextlib.suppress(MemoryError), distributed.failing_together():
            fail()
        assert held[0]() is None
    finally:
        gc.enable()


def test_the_error_of_another_rank_has_the_code_of_the_job() -> None:
    """The launcher takes the exit code of the rank whose own error it is."""
    error = OtherRankError("another rank failed: rank 1: no memory")
    assert code_for(error) == 7
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
