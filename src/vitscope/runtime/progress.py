"""Progress of long work: a rich bar on a terminal, a plain line now and then elsewhere, rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import rank

T = TypeVar("T")

#: seconds between two plain lines where the output is no terminal
PLAIN_INTERVAL = 15.0

#: set to False to silence every bar and line of this process (tests, nested work)
enabled = True


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable`` while showing how far the work is, and poll for termination.

    Args:
        iterable: The items to go through.
        description: A few words shown before the bar, for example ``"loss landscape"``.
        total: The number of items, where ``len`` does not know it.

    Raises:
        Interrupted: Before the next item, once a stop was requested.
    """
    total = total if total is not None else _length(iterable)
    if not enabled or rank() != 0:
        wrapped: Iterable[T] = iterable
    elif sys.stderr.isatty():
        wrapped = _bar(iterable, description, total)
    else:
        wrapped = _lines(iterable, description, total)
    for item in wrapped:
        stop_flag.check()
        yield item


def _length(iterable: Iterable[object]) -> int | None:
    try:
        return len(cast(Sized, iterable))
    except TypeError:
        return None


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)


def _lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    started = last_line_time = time.monotonic()
    for n_done, item in enumerate(iterable):
        now = time.monotonic()
        if now - last_line_time >= PLAIN_INTERVAL and n_done:
            time_left = f", {(now - started) / n_done * (total - n_done):.0f} s left" if total else ""
            print(f"{description}: {n_done}/{total or '?'}{time_left}", file=sys.stderr, flush=True)
            last_line_time = now
        yield item
