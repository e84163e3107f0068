"""A table on standard output: an overview that fits the width of a terminal, and Markdown elsewhere."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Column
from rich.table import Table as Layout
from rich.text import Text

from vitscope.reports.tables import table as cells
from vitscope.reports.tables.table import PROSE, Table

#: characters that are shown of a cell of prose, whose column is wrapped
SHOWN = 90
#: characters up to which a cell is a number or a word that is not wrapped
UNBROKEN = 16
#: the narrowest column of prose; where the terminal has no room for all of them the last ones are left out
LEAST_WIDTH = 24
_SEPARATOR = 2


def show(table: Table, console: Console | None = None) -> None:
    """Print a table.

    Args:
        table: Table to print.
        console: Terminal; by default standard output, to which Markdown is written where it is none, such as a file or a pipe.
    """
    console = console or Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        print(cells.markdown(table), end="")
        return
    longest = [
        max(len(text) for text in (heading, *(row[i].text for row in table.rows)))
        for i, heading in enumerate(table.columns)
    ]
    visible_columns = _columns_that_fit(longest, console.width)
    columns = [
        Column(
            Text(table.columns[i]),
            justify="left" if i == 0 or longest[i] > PROSE else "right",
            no_wrap=longest[i] <= UNBROKEN,
            ratio=1 if longest[i] > PROSE else None,
        )
        for i in visible_columns
    ]
    layout = Layout(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title=Text(table.title), title_justify="left")
    for row in table.rows:
        layout.add_row(*(_shortened(row[i].text) for i in visible_columns))
    console.print(layout)
    if len(visible_columns) < len(longest) or any(longest[i] > SHOWN for i in visible_columns):
        console.print(Text(f"Shortened for the terminal; {table.name}.md has all columns and whole texts."))
    if table.note:
        console.print(Text(table.note))


def _columns_that_fit(longest: list[int], width: int) -> list[int]:
    """Return the columns to show: all of numbers, and those of prose for which the width is enough; the first one always."""
    visible_columns = list(range(len(longest)))
    for last in reversed(visible_columns[1:]):
        prose = [i for i in visible_columns if longest[i] > PROSE]
        room = width - sum(longest[i] for i in visible_columns if i not in prose) - _SEPARATOR * len(visible_columns)
        if not prose or room >= LEAST_WIDTH * len(prose):
            break
        if last in prose:
            visible_columns.remove(last)
    return visible_columns


def _shortened(text: str) -> Text:
    return Text(text if len(text) <= SHOWN else f"{text[: SHOWN - 2].rstrip(' ,;')} …")
