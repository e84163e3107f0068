"""`metrics.jsonl`: one line per log call, appended and flushed at once; the authoritative log, which every table reads.

Weights & Biases is a mirror that may lose rows; this file may not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.runs.result_store import finite
from vitscope.runtime import safe_files
from vitscope.runtime.errors import StorageError

if TYPE_CHECKING:
    import pandas as pd

FILE = "metrics.jsonl"


class Journal:
    """Appends rows ``{"step", "epoch", "time", metric: value, ...}`` to a run's journal.

    Each row is a single write of the operating system in append mode, so that rows of several processes never mix and a
    killed process loses at most the row it was writing. Floats keep all their digits; values that are not finite are null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def append(self, step: int, epoch: int | None, metrics: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            StorageError: The disk is full or gone; rows before this one are safe.
        """
        row = {"step": step, "epoch": epoch, "time": time.time(), **metrics}
        line = (json.dumps(finite(row)) + "\n").encode()
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            if os.write(self._descriptor, line) != len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            self.close()  # the file may end in the middle of this row: opened again, the next one begins a line
            raise StorageError(
                "paths.runs", self.path, f"row not written ({error.strerror})", "free space, then resume"
            ) from None

    def close(self) -> None:
        """Close the file; a later row opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        safe_files.refuse_links(self.path)
        torn = is_torn(self.path)
        descriptor = safe_files.open_to_append(self.path)
        if torn:  # a kill cut the last row short: keep it apart from ours
            os.write(descriptor, b"\n")
        return descriptor


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal in the order they were written; a row that a kill cut short is left out."""
    rows = []
    if path.is_file():
        for line in safe_files.read_text(path, safe_files.LARGEST_METRICS).splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def series(path: Path) -> pd.DataFrame:
    """Return the journal as a table with one row per step, later values winning (a resumed run writes steps again)."""
    import pandas as pd  # a training does not need it

    table = pd.DataFrame(read(path))
    if table.empty:
        return table
    return table.groupby("step").last().sort_index()


def last_values(path: Path) -> dict[str, Any]:
    """Return the last value of each metric of a journal; one whose last value was not finite is left out."""
    return last_values_of(read(path))


def last_values_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last value of each key of some rows; one whose last value was not finite, which is null there, is left out."""
    values: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            if value is not None:
                values[key] = value
            elif key != "epoch":  # rows between epochs have none
                values.pop(key, None)
    return values


def is_torn(path: Path) -> bool:
    """Tell whether the last line of a file was cut short by a kill or a full disk."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
