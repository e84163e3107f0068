"""Results that were saved from Python, as entries of a report's figures beside those of runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vitscope.config import loading
from vitscope.core.results import result_file
from vitscope.reports.measured_results import Measured
from vitscope.reports.run_entry import END, Entry
from vitscope.runs import result_store
from vitscope.runs.run_dir import Run

#: ending of the files that ``result.save`` writes
SUFFIX = ".npz"


def saved_entries(paths: Sequence[Path], tag: str | None, entries: Sequence[Entry]) -> list[Entry]:
    """Return an entry for each saved result, named by its file.

    It has the moment of the report, so that it shares figures with results of runs, and no metrics: tables are of runs alone.

    Args:
        paths: Files of ``result.save``.
        tag: Moment of the report; ``end`` for ``all`` and None.
        entries: Runs of the report, whose names are not used again.

    Raises:
        StorageError: A file that is no result.
    """
    labels = {entry.label for entry in entries}
    saved = []
    for path in dict.fromkeys(paths):
        label = path.stem if path.stem not in labels else f"{path.parent.name}/{path.name}"
        labels.add(label)
        saved.append(_entry(path, label, END if tag in (None, "all") else tag))
    return saved


def _entry(path: Path, label: str, tag: str) -> Entry:
    result = result_store.load(path)
    measure = type(result).__module__.rpartition(".")[2]
    card = getattr(result, "card", None)
    measured = Measured(
        analysis=_analysis(measure),
        tag=tag,
        measure=measure,
        path=path,
        scalars=result_file.finite(result.scalars()),
        card=card,
        error="",
        time=path.stat().st_mtime,
    )
    config = {"data": {"name": card.data if card is not None else "unknown"}}
    return Entry(Run(path.with_suffix("")), config, {"command": "analyze"}, {}, {}, (measured,), str(path), label)


def _analysis(measure: str) -> str:
    """Return the name of the configuration that makes a measure, the shortest of several; else the measure's."""
    target = re.compile(rf"^_target_: vitscope\.{measure}$", re.MULTILINE)
    names = [path.stem for path in (loading.folder() / "analysis").glob("*.yaml") if target.search(path.read_text())]
    return min(names, key=lambda name: (len(name), name), default=measure)
