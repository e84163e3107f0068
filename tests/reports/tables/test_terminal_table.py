"""Tables on a terminal: within its width, with all columns of numbers; elsewhere they are Markdown."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from vitscope.reports.tables import table as cells
from vitscope.reports.tables import terminal_table
from vitscope.reports.tables.table import Cell, Table

NAME = "log APE against a control of equal cost at the matched NLL, [red]not markup"
REASON = "needs the same network with another mixer in the place of attention, " * 4
TABLE = Table(
    "claims", "Claims of the paper", ("claim", "verdict", "effect", "seeds", "why"), ("claim", "verdict", "effect", "n", "why"),
    ((Cell(NAME), Cell("inconclusive"), Cell("0.0725 [-0.042, 0.187] ln"), Cell("2"), Cell(REASON)),), "A note on the numbers.",
)  # fmt: skip


def shown(width: int, table: Table = TABLE) -> list[str]:
    stream = StringIO()
    terminal_table.show(table, Console(file=stream, force_terminal=True, width=width, color_system=None))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 110, 160])
def test_the_overview_fits_the_terminal(width: int) -> None:
    lines = shown(width)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    for word in ("inconclusive", "0.0725", "0.187]", "ln", "claim", "verdict", "effect", "seeds"):
        assert word in text
    assert "[red]not" in text
    assert "claims.md has all columns and whole texts" in text
    assert "A note on the numbers." in text


def test_prose_is_shortened_and_left_out_where_there_is_no_room() -> None:
    assert "why" in " ".join(shown(160)).split()
    assert any("…" in line for line in shown(160))
    assert "why" not in " ".join(shown(80)).split()


def test_short_tables_are_whole() -> None:
    small = Table("t", "A title", ("model", "accuracy"), ("model", "accuracy"), ((Cell("vit"), Cell("0.5 ± 0.1")),))
    text = "\n".join(shown(60, small))
    assert "0.5 ± 0.1" in text
    assert "Shortened" not in text
    assert "A title" in "\n".join(shown(60, Table("t", "A title", ("model",), ("model",), ())))


def test_other_outputs_get_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    terminal_table.show(TABLE)
    assert capsys.readouterr().out == cells.markdown(TABLE)
