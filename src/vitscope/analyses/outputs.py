"""Write the outputs of an analysis: scalars to the metrics log and W&B, its figure and numbers, or why it failed."""

from __future__ import annotations

import json
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis
from vitscope.config import loading
from vitscope.plotting.api import plot, save_figure
from vitscope.plotting.figure_numbers import save_numbers
from vitscope.runs import metrics_log, result_store
from vitscope.runs.metrics_log import Journal
from vitscope.runtime import atomic_write, redaction, safe_files
from vitscope.runtime.distributed import is_of_other_rank, rank
from vitscope.runtime.errors import StorageError


def failure(analysis: Analysis, place: AnalysisContext, folder: Path, stem: str, error: Exception) -> None:
    """Record a null result with its reason, and the traceback of every rank whose own error it is."""
    text = redaction.masked(str(error)).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    warnings.warn(f"analysis.{analysis.name} failed at {place.tag}: {reason}; recorded as null", stacklevel=3)
    if rank() == 0:
        record = {"measure": analysis.measure.__name__, "error": reason, "scalars": None}
        atomic_write.write_atomically(folder / f"{stem}.json", loading.json.dumps(record, indent=2).encode())
    if rank() == 0 or not is_of_other_rank(error):
        of_rank = f", rank {rank()}" if rank() else ""
        trace = redaction.masked("".join(traceback.format_exception(error)))
        safe_files.append_text(place.run.log, f"analysis.{analysis.name} at {place.tag}{of_rank}\n{trace}\n")


def store(analysis: Analysis, place: AnalysisContext, folder: Path, stem: str, result: Any) -> None:
    """Save a result and publish it; a mark beside it says that this is not done yet, until it is.

    A kill or a full disk in between leaves the mark, and `complete` does what is left when the result is asked for again.
    """
    atomic_write.write_atomically(_mark(folder, stem), b"")
    result_store.save(folder, stem, result)
    publish(analysis, place, result)
    _mark(folder, stem).unlink(missing_ok=True)


def complete(analysis: Analysis, place: AnalysisContext, folder: Path, stem: str, result: Any) -> None:
    """Do what a stop left undone for a result on the disk: its ``.json``, its row, its figure and numbers, its copy in W&B."""
    figure = _figure_stem(analysis, place)
    endings = ("csv", "png", "pdf") if _is_drawn(analysis, place) else ()
    files = [figure.with_name(f"{figure.name}.{ending}") for ending in endings]
    whole = not _mark(folder, stem).exists() and result_store.has_readable_copy(folder, stem, result)
    if whole and _has_row(analysis, place, result) and all(file.is_file() for file in files):
        return
    atomic_write.write_atomically(_mark(folder, stem), b"")
    result_store.save_readable_copy(folder, stem, result)
    publish(analysis, place, result)
    _mark(folder, stem).unlink(missing_ok=True)


def _mark(folder: Path, stem: str) -> Path:
    return folder / f".unpublished-{stem}"


def _is_drawn(analysis: Analysis, place: AnalysisContext) -> bool:
    return place.draws or analysis.lists_step(place.step)


def _figure_stem(analysis: Analysis, place: AnalysisContext) -> Path:
    return place.run.figures / f"{analysis.name}-{place.tag}"


def _row(analysis: Analysis, place: AnalysisContext, result: Any) -> dict[str, Any]:
    return {**{f"{analysis.name}/{name}": value for name, value in result.scalars().items()}, "tag": place.tag}


def _has_row(analysis: Analysis, place: AnalysisContext, result: Any) -> bool:
    """Tell whether the metrics log ends, for this analysis at this moment, with the result's numbers."""
    expected_row = json.loads(json.dumps(result_store.finite(_row(analysis, place, result))))
    rows = [
        row
        for row in metrics_log.read(place.run.journal)
        if row.get("tag") == place.tag and expected_row.keys() <= row.keys()
    ]
    return bool(rows) and all(rows[-1][name] == value for name, value in expected_row.items())


def publish(analysis: Analysis, place: AnalysisContext, result: Any) -> None:
    """Metrics log first (unless its last row of this analysis says the same), then W&B, the numbers and the figure."""
    row = _row(analysis, place, result)
    scalars = {name: value for name, value in row.items() if name != "tag"}
    with place.run.exclusive():  # another process may have measured the same at the same time
        if not _has_row(analysis, place, result):
            book = Journal(place.run.journal)
            book.append(place.step, place.epoch, row)
            book.close()
    place.mirror.log({k: v for k, v in scalars.items() if np.isfinite(v)}, place.step)
    eigenvalues = getattr(result, "eigenvalues", None)
    if eigenvalues is not None and np.isfinite(eigenvalues).any():
        place.mirror.histogram(f"{analysis.name}/eigenvalues", eigenvalues[np.isfinite(eigenvalues)], place.step)
    if not _is_drawn(analysis, place):
        return
    save_numbers(result, _figure_stem(analysis, place))
    try:
        png, _ = save_figure(plot(result), _figure_stem(analysis, place))
    except Exception as error:  # a figure that cannot be drawn must not cost the numbers
        if isinstance(error, OSError):
            raise StorageError("paths.runs", place.run.figures, str(error.strerror), "free space") from error
        warnings.warn(f"analysis.{analysis.name}: no figure ({type(error).__name__}: {error})", stacklevel=3)
        return
    place.mirror.image(f"{analysis.name}/figure", png, place.step)
