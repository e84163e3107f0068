"""Figures drawn from result files, in this process or in others. Imports little: each process pays for it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.plotting.api import plot, save_figure
from vitscope.runs import result_store
from vitscope.runtime.errors import StorageError, first_line
from vitscope.runtime.progress import track

#: from this many figures on, another process helps (starting one costs as much as drawing a few)
MANY = 10


@dataclass(frozen=True)
class Job:
    """A figure to draw.

    Attributes:
        stem: of its files.
        files: the results by their names in the figure.
        options: of the room's plot function.
        pdf: whether to write it for print too.
    """

    stem: Path
    files: Mapping[str, Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    pdf: bool = True


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        png: the picture; None where it could not be drawn.
        pdf: the same for print; None where it was not asked for.
        labels: of the results in it.
        lost: why results that belong in it are not.
        interactive: a plotly figure as JSON, where the room has one.
        problem: why there is no picture.
    """

    png: Path | None = None
    pdf: Path | None = None
    labels: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    interactive: str | None = None
    problem: str = ""


@contextmanager
def drawing(jobs: Sequence[Job]) -> Iterator[Callable[[], list[Picture]]]:
    """Draw figures, many of them in a second process while the caller goes on; yield a function that waits for all.

    The caller's process draws too once it waits: a third would cost more memory than a report may take.
    """
    if len(jobs) < MANY or (os.cpu_count() or 1) < 2:
        yield lambda: [draw(job) for job in track(jobs, "figures")]
        return
    # spawned, not forked: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)
    try:
        futures = [pool.submit(draw, job) for job in jobs]
        yield lambda: _shared(jobs, futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _shared(jobs: Sequence[Job], futures: Sequence[Future[Picture]]) -> list[Picture]:
    """Draw from the end what the other process has not begun, then wait for what it has."""
    pictures: dict[int, Picture] = {}
    for index in track(range(len(jobs) - 1, -1, -1), "figures"):
        pictures[index] = draw(jobs[index]) if futures[index].cancel() else futures[index].result()
    return [pictures[index] for index in range(len(jobs))]


def draw(job: Job) -> Picture:
    """Draw one figure as ``<stem>.png`` and, where asked for, ``<stem>.pdf``.

    A damaged result is left out and named; a figure that cannot be drawn is a picture with a problem.

    Raises:
        StorageError: the folder cannot be written.
    """
    loaded: dict[str, Any] = {}
    lost: list[str] = []
    for label, file in job.files.items():
        try:
            loaded[label] = result_store.load(file)
        except StorageError as error:
            lost.append(str(error))
    if not loaded:
        return Picture(lost=tuple(lost), problem=" ".join(lost))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a layout engine says of a crowded figure is no news to a reader
            figure = plot(loaded, allow_different=True, **job.options)
            png, *pdf = save_figure(figure, job.stem, formats=("png", "pdf") if job.pdf else ("png",))
    except OSError as error:
        where = job.stem.parent
        raise StorageError("out", where, f"not writable ({error.strerror})", "free space or choose another") from None
    except Exception as error:  # one figure that cannot be drawn must not cost the report
        problem = f"not drawn: {type(error).__name__}: {first_line(error)}"
        return Picture(lost=tuple(lost), problem=problem)
    return Picture(png, pdf[0] if pdf else None, tuple(loaded), tuple(lost), _interactive(loaded))


def _interactive(named: Mapping[str, Any]) -> str | None:
    """Return the room's plotly figure of these results, where it offers one."""
    room, _, measure = type(next(iter(named.values()))).__module__.rpartition(".")
    make = getattr(importlib.import_module(f"{room}.plot"), f"plotly_{measure}", None)
    if make is None:
        return None
    try:
        figure = make(named)
        figure.update_layout(template="none")
        return figure.to_json()
    except Exception as error:
        warnings.warn(f"plotly_{measure}: {type(error).__name__}: {first_line(error)}", stacklevel=2)
        return None


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
