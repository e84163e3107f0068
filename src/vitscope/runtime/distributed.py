"""Collective operations over ``torch.distributed`` for the measures; one process behaves as a world of size one.

Every measure is called on every rank with the full sequence of batches, works on its share and adds the
shares up, so that each rank returns the same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from vitscope.runtime.errors import DistributedError, first_line
from vitscope.runtime.stop_flag import Interrupted
from vitscope.runtime.torch_internals import default_store

#: names since torch 2.14, and before
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: seconds for which a rank that failed waits for the same failure of the others, and between two looks
PATIENCE_S, _INTERVAL_S = 120.0, 0.05

_n_failures = 0
_n_collectives = 0
_is_waiting = False


def n_collectives() -> int:
    """Return how many collective operations this process has finished."""
    return _n_collectives


def is_waiting() -> bool:
    """Tell whether this process is in a collective operation, where it may wait for another one."""
    return _is_waiting


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Mark a collective operation for `is_waiting`."""
    global _is_waiting, _n_collectives
    _is_waiting = True
    try:
        yield
        _n_collectives += 1
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
    """Return every rank's picklable ``value`` as a list in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _collective():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together(of_all_ranks: bool = True) -> Iterator[None]:
    """Raise an exception of the block on the ranks where it occurred, and a RuntimeError on the others.

    A rank that failed alone would leave the others waiting for its share in the next collective operation. An interruption
    passes at once: a signal stops all ranks.

    Args:
        of_all_ranks: whether every rank enters the block; where this rank works alone nothing is exchanged.

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
    texts = gather_objects(None if error is None else first_line(error)) if of_all_ranks else []
    if error is not None:
        raise error
    for number, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"another rank failed: rank {number}: {text}")


def agree_on_failure(error: Exception) -> None:
    """Return where every rank has failed and can go on with the next step; raise where this rank failed alone.

    The others would take its next collective operation for the one in which they wait, and add numbers of two steps up. The
    ranks tell each other of their failures through the process group's store, which needs no collective operation.

    Raises:
        DistributedError: another rank has not failed within `PATIENCE_S` seconds.
    """
    global _n_failures
    if world_size() == 1:
        return
    _n_failures += 1
    store, keys = default_store(), [f"vitscope/failure/{_n_failures}/{number}" for number in range(world_size())]
    store.set(keys[rank()], first_line(error))
    end = time.monotonic() + PATIENCE_S
    while not store.check(keys):
        if time.monotonic() > end:
            reason = f"rank {rank()} failed alone ({first_line(error)}); the others cannot go on without it"
            raise DistributedError(
                "trainer.devices", world_size(), reason, "see the traceback in the run's log"
            ) from error
        time.sleep(_INTERVAL_S)
