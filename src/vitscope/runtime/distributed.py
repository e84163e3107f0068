"""Collective operations over ``torch.distributed`` for the measures; one process behaves as a world of size one.

Every measure is called on every rank with the full sequence of batches, works on its share and adds the
shares up, so that each rank returns the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vitscope.runtime import stop_flag
from vitscope.runtime.errors import DistributedError, OtherRankError, first_line
from vitscope.runtime.stop_flag import Interrupted
from vitscope.runtime.torch_internals import default_store

#: names since torch 2.14, and before
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: seconds for which a rank that failed waits for the same failure of the others, and between two looks
PATIENCE_S, _INTERVAL_S = 120.0, 0.05

#: attribute of an error that every rank has heard of: the rank that failed, and the number of collective operations by then
_TOLD = "_vitscope_told"

_n_failures = 0
_n_collectives = 0
_is_waiting = False
_lost_group: Any = None  # whose collective operation failed: another rank is gone, or in another operation


def n_collectives() -> int:
    """Return how many collective operations this process has finished."""
    return _n_collectives


def is_waiting() -> bool:
    """Tell whether this process is in a collective operation, where it may wait for another one."""
    return _is_waiting


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Mark a collective operation for `is_waiting`, and one that fails for `agree_on_failure`."""
    global _is_waiting, _n_collectives, _lost_group
    _is_waiting = True
    try:
        yield
        _n_collectives += 1
    except Exception:
        _lost_group = dist.group.WORLD
        raise
    finally:
        _is_waiting = False


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank, 0 outside ``torch.distributed``."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes, 1 outside ``torch.distributed``."""
    return dist.get_world_size() if _active() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``tensor`` over all ranks (the tensor itself in a single process).

    The sum is made in place where the tensor is contiguous, so pass one that nothing else reads.
    """
    if world_size() > 1:
        tensor = tensor.contiguous()
        with _collective():
            dist.all_reduce(tensor)
    return tensor


def all_gather(part: torch.Tensor) -> torch.Tensor:
    """Return the vectors ``(n,)`` of all ranks, of one length, joined in rank order (the vector itself in a single process)."""
    if world_size() == 1:
        return part
    joined = torch.empty(world_size() * len(part), dtype=part.dtype, device=part.device)
    with _collective():
        _gather(joined, part.contiguous())
    return joined


def gather_rows(part: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return ``(world * n, ...)``, the rows ``part (n, ...)`` of all ranks of a group in rank order."""
    joined = part.new_empty(dist.get_world_size(group) * len(part), *part.shape[1:])
    with _collective():
        _gather(joined, part.contiguous(), group=group)
    return joined


def scatter_summed_rows(rows: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return this rank's share ``(n, ...)`` of the sum over a group of ``rows (world * n, ...)``."""
    share = rows.new_empty(len(rows) // dist.get_world_size(group), *rows.shape[1:])
    with _collective():
        _scatter_sum(share, rows.contiguous(), group=group)
    return share


def broadcast(tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Return rank ``source``'s values of ``tensor`` on every rank (in place)."""
    if world_size() > 1:
        with _collective():
            dist.broadcast(tensor, source)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's picklable ``value`` as a list in rank order, on every rank.

    Raises:
        OtherRankError: Another rank failed in a block of `failing_together` around this call, or in one that ends here.
        ValueError: The same, where that rank's error is a ValueError.
    """
    values = _objects_of_ranks(value)
    for number, failure in enumerate(values):
        if isinstance(failure, _Failure) and not isinstance(value, _Failure):
            raise failure.of_other_rank(number)
    return values


def _objects_of_ranks(value: Any) -> list[Any]:
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class _Failure:
    """What a rank that failed sends in place of the value for which the others wait.

    Attributes:
        text: First line of its error.
        is_value_error: Whether the error is a ValueError: a caller that handles one has to do so on all ranks.
    """

    text: str
    is_value_error: bool

    def of_other_rank(self, number: int) -> Exception:
        """Return the error that the other ranks raise."""
        reason = f"another rank failed: rank {number}: {self.text}"
        error = ValueError(reason) if self.is_value_error else OtherRankError(reason)
        setattr(error, _TOLD, (number, _n_collectives))
        return error


def is_of_other_rank(error: BaseException) -> bool:
    """Tell whether an error is that of another rank, which has the traceback."""
    return getattr(error, _TOLD, (rank(), 0))[0] != rank()


def _is_told(error: BaseException | None) -> bool:
    """Tell whether every rank has just heard of an error, or of the one that it was raised from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return any(getattr(cause, _TOLD, (0, -1))[1] == _n_collectives for cause in chain)


def _is_group_lost() -> bool:
    return _lost_group is not None and _lost_group is dist.group.WORLD


@contextlib.contextmanager
def failing_together(of_all_ranks: bool = True, *, device: torch.device | None = None) -> Iterator[None]:
    """Raise an exception of the block on the ranks where it occurred, and one that names it on the others.

    A rank that failed alone would leave the others waiting for its share in the next collective operation. The block may
    call `gather_objects` and have such blocks inside, but no operation on tensors: a rank that fails sends its error where
    the others wait for objects. An interruption passes at once: a signal stops all ranks.

    Args:
        of_all_ranks: Whether every rank enters the block and none sums tensors in it; else nothing is exchanged.
        device: Where the ranks exchange one number at the end of the block, in place of objects, which takes eight times as
            long: for a block without a gather inside that is entered for every product.

    Raises:
        OtherRankError: Another rank failed.
        ValueError: The same, where that rank's error is a ValueError.

    Example:
        ``with failing_together(): sums = read_local_batches()``
    """
    error: Exception | None = None
    try:
        yield
    except Interrupted:
        raise
    except Exception as raised:
        error = raised
    if not of_all_ranks and error is None:
        return
    try:
        if error is None:
            if device is None or _any_failed(False, device):
                gather_objects(None)
            return
        if of_all_ranks and not _is_told(error) and not _is_group_lost():
            with contextlib.suppress(RuntimeError):  # ranks that are gone: the error says more than their silence
                if device is not None:
                    _any_failed(True, device)
                gather_objects(_Failure(first_line(error), isinstance(error, ValueError)))
            setattr(error, _TOLD, (rank(), _n_collectives))
        raise error
    finally:
        del error  # its traceback holds this frame: the cycle would keep the tensors of the pass that failed


def _any_failed(failed: bool, device: torch.device) -> bool:
    return bool(all_reduce_sum(torch.tensor(float(failed), device=device)).item())


def agree_on_failure(error: Exception) -> None:
    """Return where every rank has failed and can go on with the next step; raise where this rank failed alone.

    The others would take its next collective operation for the one in which they wait, and add numbers of two steps up. The
    ranks tell each other of their failures, and of how many collective operations they have made, through the process group's
    store, which needs no collective operation.

    Raises:
        Interrupted: A stop was asked for.
        DistributedError: Another rank has not failed within `PATIENCE_S` seconds, failed in another place, or is gone.
        Exception: The error itself, where another rank is gone or hangs: no collective operation can follow.
    """
    global _n_failures
    if world_size() == 1:
        return
    _n_failures += 1
    if _is_group_lost():
        raise error
    try:
        has_failed_everywhere = _is_told_by_all(f"{_n_collectives} {first_line(error)}")
    except RuntimeError:  # torch.distributed.DistError: the rank that holds the store is gone
        raise _lost(f"another process died, after: {first_line(error)}") from error
    if not has_failed_everywhere:
        raise _lost(f"rank {rank()} failed where the others did not ({first_line(error)})") from error
    gather_objects(None)  # the store is one rank's: it stays until all have looked


def _is_told_by_all(text: str) -> bool:
    """Tell the other ranks of a failure; return whether all of them tell of one at the same collective operation."""
    store, keys = default_store(), [f"vitscope/failure/{_n_failures}/{number}" for number in range(world_size())]
    store.set(keys[rank()], text)
    end = time.monotonic() + PATIENCE_S
    while not store.check(keys):
        if (signum := stop_flag.requested()) is not None:
            raise Interrupted(signum)
        if time.monotonic() > end:
            return False
        time.sleep(_INTERVAL_S)
    return len({store.get(key).split()[0] for key in keys}) == 1


def _lost(reason: str) -> DistributedError:
    return DistributedError("trainer.devices", world_size(), reason, "see the traceback in the run's log")
