"""The numbers behind a figure, as a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitscope.core.results.result_table import csv_of
from vitscope.runtime.atomic_write import write_atomically


def save_numbers(results: Any, stem: Path) -> Path:
    """Write the numbers of a figure's results as ``<stem>.csv``; return its path.

    A row a number: the result's name where there is one, the quantity, its coordinates and the value, at full precision.

    Args:
        results: A result, or results by the names in the figure.
        stem: Path of the figure's files without their ending.

    Raises:
        StorageError: The disk is full or not writable.
    """
    named: Mapping[str, Any] = results if isinstance(results, Mapping) else {"": results}
    target = stem.with_name(f"{stem.name}.csv")
    write_atomically(target, csv_of(named).encode())
    return target
