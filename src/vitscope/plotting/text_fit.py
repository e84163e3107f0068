"""Breaks of labels, titles and legends that are longer than the figure has space for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

#: width of a character on average, as a share of the font's size
_CHARACTER = 0.54

#: characters that the handle of a legend's entry and the spaces around it take
_HANDLE = 6

#: a formula in a text of matplotlib
_FORMULA = re.compile(r"\$[^$]*\$")

#: share of a panel's cell that labels may take
_SHARE = 0.8


def fit_labels(figure: Figure) -> None:
    """Break the labels of axes and the titles of a figure into lines that their panels have space for."""
    for axes in figure.axes:
        width, height = _cell(axes)
        for text, length in (
            (axes.xaxis.label, width),
            (axes.yaxis.label, height),
            (axes.title, width),
        ):
            _wrap(text, _SHARE * length)


def fit_legend(labels: Sequence[str], n_columns: int, width: float) -> tuple[list[str], int]:
    """Return the labels of a legend, broken into lines, and how many columns, at most ``n_columns``, fit into the width.

    Args:
        labels: Texts of the entries.
        n_columns: Number of columns that the figure asks for.
        width: Width in inches.
    """
    most = most_characters(width, FontProperties(size=rcParams["legend.fontsize"]).get_size_in_points())
    fitted = [broken_lines(label, max(8, most - _HANDLE)) for label in labels]
    lengths = [max(map(_length, label.split("\n"))) + _HANDLE for label in fitted]
    for columns in range(min(n_columns, len(lengths)), 1, -1):
        rows = -(-len(lengths) // columns)
        if sum(max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)) <= most:
            return fitted, -(-len(lengths) // rows)
    return fitted, 1


def n_legend_lines(labels: Sequence[str], n_columns: int) -> int:
    """Return the number of lines that a legend of these labels has, which fill its columns one after another.

    Args:
        labels: Texts of the entries, broken into lines.
        n_columns: Number of columns.
    """
    n_rows = max(1, -(-len(labels) // n_columns))
    columns = [labels[start : start + n_rows] for start in range(0, len(labels), n_rows)]
    return max((sum(label.count("\n") + 1 for label in column) for column in columns), default=0)


def _cell(axes: Axes) -> tuple[float, float]:
    """Return width and height in inches of the cell in which axes stand; of the whole figure for axes without one."""
    parent: Any = axes.get_figure(root=False)
    figure: Any = axes.get_figure(root=True)
    box = parent.bbox.width / figure.dpi, parent.bbox.height / figure.dpi
    cell = axes.get_subplotspec()
    if cell is None:
        return box
    grid: Any = cell.get_gridspec()
    widths, heights = list(grid.get_width_ratios()), list(grid.get_height_ratios())
    columns = slice(cell.colspan.start, cell.colspan.stop)
    rows = slice(cell.rowspan.start, cell.rowspan.stop)
    return box[0] * sum(widths[columns]) / sum(widths), box[1] * sum(heights[rows]) / sum(heights)


def _wrap(text: Text, inches: float) -> None:
    text.set_text(broken_lines(text.get_text(), max(8, most_characters(inches, float(text.get_fontsize())))))


def broken_lines(text: str, most: int) -> str:
    """Return a text with lines of at most ``most`` characters, broken at spaces; formulas and words are not broken."""
    lines = text.split("\n")
    if max(map(_length, lines)) <= most:
        return text
    return "\n".join(part for line in lines for part in _broken(line, most))


def broken_names(text: str, most: int) -> str:
    """Return a text whose lines have at most ``most`` characters where they can be, broken at spaces and after dots of names.

    Args:
        text: Names of modules such as ``layers.3.blocks.1.attn``, and words.
        most: Most characters of a line; a longer part between two dots is not broken.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        current = ""
        for part in line.replace(".", ".\0").replace(" ", " \0").split("\0"):
            if current and len(current) + len(part.rstrip()) > most:
                lines.append(current.rstrip())
                current = ""
            current += part
        lines.append(current)
    return "\n".join(lines)


def _broken(line: str, most: int) -> list[str]:
    # a formula counts as the characters that it shows
    plain = _FORMULA.sub(lambda match: "\0" * max(1, _length(match.group())), line)
    wrapped = textwrap.wrap(plain, most, break_long_words=False, break_on_hyphens=False)
    formulas = iter(_FORMULA.findall(line))
    return [re.sub("\0+", lambda _: next(formulas), part) for part in wrapped]


def _length(text: str) -> int:
    """Return the number of characters shown: a command of a formula is one."""
    return len(re.sub(r"\\[a-z]+|[{}$^_\\]", lambda match: "x" if match.group()[1:] else "", text))


def most_characters(inches: float, size: float) -> int:
    """Return how many characters of a font of a size in points stand in so many inches."""
    return int(72 * inches / (_CHARACTER * size))
