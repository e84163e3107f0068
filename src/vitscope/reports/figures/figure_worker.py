"""Draw figures from result files, in this process or in a second one, which is why this module imports little."""

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
from vitscope.plotting.figure_note import add_note
from vitscope.plotting.figure_numbers import save_numbers
from vitscope.runs import result_store
from vitscope.runtime.errors import StorageError, first_line
from vitscope.runtime.logging import command_logging
from vitscope.runtime.progress import track

#: number of figures from which on a second process draws too (starting it costs as much as drawing a few)
PARALLEL_FROM = 10


@dataclass(frozen=True)
class Job:
    """A figure to draw.

    Attributes:
        stem: Path of the figure's files without their suffix.
        files: Result files by their names in the figure.
        options: Keyword arguments of the measure's plot function.
        pdf: Whether to write it for print too.
        note: Words below the figure: which of several seeds it shows.
    """

    stem: Path
    files: Mapping[str, Path]
    options: Mapping[str, Any] = field(default_factory=dict)
    pdf: bool = True
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure on disk.

    Attributes:
        png: File of the picture; None if it could not be drawn.
        pdf: File for print; None if it was not requested.
        csv: File of the numbers behind the picture; None without readable results.
        labels: Names of the results in the figure.
        lost: Reasons why results were left out, one text a result.
        interactive: A plotly figure as JSON; None if the measure has none.
        problem: Reason why there is no picture; empty if there is one.
    """

    png: Path | None = None
    pdf: Path | None = None
    csv: Path | None = None
    labels: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    interactive: str | None = None
    problem: str = ""


@contextmanager
def drawing(jobs: Sequence[Job]) -> Iterator[Callable[[], list[Picture]]]:
    """Draw figures, many of them in a second process while the caller goes on; yield a function that waits for all.

    The caller's process draws too once it waits: a third would cost more memory than a report may take.
    """
    if len(jobs) < PARALLEL_FROM or (os.cpu_count() or 1) < 2:
        yield lambda: [draw(job) for job in track(jobs, "figures")]
        return
    # spawned, not forked: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)
    try:
        futures = [pool.submit(_draw_in_worker, job) for job in jobs]
        yield lambda: _draw_alongside(jobs, futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_alongside(jobs: Sequence[Job], futures: Sequence[Future[Picture]]) -> list[Picture]:
    """Draw from the end what the other process has not begun, then wait for what it has."""
    pictures: dict[int, Picture] = {}
    for index in track(range(len(jobs) - 1, -1, -1), "figures"):
        pictures[index] = draw(jobs[index]) if futures[index].cancel() else futures[index].result()
    return [pictures[index] for index in range(len(jobs))]


def _draw_in_worker(job: Job) -> Picture:
    """Draw one figure in the second process, whose warnings and messages are lines like those of the command."""
    with command_logging():
        return draw(job)


def draw(job: Job) -> Picture:
    """Draw one figure as ``<stem>.png`` and, where asked for, ``<stem>.pdf``; write its numbers as ``<stem>.csv``.

    A damaged result is left out and named; a figure that cannot be drawn is a picture with a problem.

    Raises:
        StorageError: The folder cannot be written.
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
        csv = save_numbers(loaded, job.stem)
    except StorageError as error:
        raise StorageError(
            "out", job.stem.parent, error.why, "free space, or choose another folder: out=<folder>"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a layout engine says of a crowded figure is no news to a reader
            figure = plot(loaded, allow_different=True, **job.options)
            if job.note:
                add_note(figure, job.note)
            png, *pdf = save_figure(figure, job.stem, formats=("png", "pdf") if job.pdf else ("png",))
    except OSError as error:
        folder = job.stem.parent
        raise StorageError(
            "out", folder, f"not writable ({error.strerror})", "free space, or choose another folder: out=<folder>"
        ) from None
    except Exception as error:  # one figure that cannot be drawn must not cost the report
        problem = f"not drawn: {type(error).__name__}: {first_line(error)}"
        return Picture(csv=csv, lost=tuple(lost), problem=problem)
    return Picture(png, pdf[0] if pdf else None, csv, tuple(loaded), tuple(lost), _interactive(loaded))


def _interactive(named: Mapping[str, Any]) -> str | None:
    """Return the plotly figure of these results as JSON, None if their measure's subpackage has none."""
    topic, _, measure = type(next(iter(named.values()))).__module__.rpartition(".")
    if not topic.startswith("vitscope.diagnostics."):  # a measure of the user's package
        return None
    plot_interactively = getattr(importlib.import_module(f"{topic}.plot"), f"plotly_{measure}", None)
    if plot_interactively is None:
        return None
    try:
        figure = plot_interactively(named)
        figure.update_layout(template="none")
        return figure.to_json()
    except Exception as error:
        warnings.warn(f"plotly_{measure}: {type(error).__name__}: {first_line(error)}", stacklevel=2)
        return None


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
