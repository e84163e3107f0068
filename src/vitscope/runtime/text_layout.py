"""Texts for terminals and messages: rows of cells in columns, counts, durations and sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return rows of cells as lines, each column as wide as its widest cell, with two spaces between columns.

    Args:
        rows: Rows of equal length; the first one may be the head.
        right: Columns whose cells are at the right, as numbers are; the others are at the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def count_text(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 run``, ``3 runs``; ``plural`` is given where it is not the noun with an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def duration_text(seconds: float) -> str:
    """Return a duration with one to three digits: ``0.4 s``, ``45 s``, ``12 min``, ``3.4 h``, ``5 d``."""
    if seconds <= 0:
        return "0 s"
    if seconds < 9.5:
        return f"{max(seconds, 0.001):.1g} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.2g} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} d"


def size_text(n_bytes: float) -> str:
    """Return a size in bytes with its unit: ``512 B``, ``3.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1023.95 or (unit == "B" and n_bytes < 1024):  # above, one digit after the point rounds to 1024.0
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
