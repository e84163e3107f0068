"""Rank correlations of numbers over the single runs of a relation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitscope.reports.figures import scatter_figures
from vitscope.reports.tables.table import Cell, Table
from vitscope.reports.value_lookup import Selection
from vitscope.stats.rank_correlation import LEAST_PAIRS, RankCorrelation, kendall_tau


def correlations(selection: Selection, x: str, y: Sequence[str]) -> dict[str, RankCorrelation]:
    """Return Kendall's tau of each quantity with ``x`` over all runs that have both numbers; nothing where x is a key.

    Runs of one experiment that differ in their seeds count as runs of their own.

    Args:
        selection: The runs.
        x: The quantity below, such as ``evaluation.accuracy-test/accuracy``.
        y: The quantities of the panels.
    """
    entries = [entry for runs in selection.groups(lambda entry: entry.trained).values() for entry in runs.values()]
    if any(scatter_figures.is_key(entry, x) for entry in entries):
        return {}
    below = [scatter_figures.value_of(selection, entry, x).number for entry in entries]
    correlation_of = {}
    for quantity in y:
        above = [scatter_figures.value_of(selection, entry, quantity).number for entry in entries]
        pairs = [(a, b) for a, b in zip(below, above) if a is not None and b is not None]
        correlation_of[quantity] = kendall_tau([a for a, _ in pairs], [b for _, b in pairs])
    return correlation_of


def table(correlation_of: Mapping[str, RankCorrelation], x: str, name: str) -> Table:
    """Return the table of correlations with ``x``.

    Args:
        correlation_of: The result of `correlations`.
        x: The quantity that all are correlated with.
        name: Stem of its files.
    """
    columns = ("quantity", "Kendall tau", "95 % low", "95 % high", "p", "runs")
    rows = []
    for quantity, c in correlation_of.items():
        numbers = (_number(c.tau), _number(c.low), _number(c.high), _number(c.p_value, ".2g"), str(c.n))
        rows.append((Cell(scatter_figures.axis_label(quantity)), *map(Cell, numbers)))
    note = (
        f"tau-b over single runs; percentile interval of a bootstrap over runs, none below {LEAST_PAIRS} runs or where all "
        "agree; p: two-sided, of no association, not corrected for the number of rows. Correlation is not causation: runs that "
        "differ in several settings may agree for another reason."
    )
    ids = ("quantity", "kendall_tau", "low", "high", "p", "runs")
    return Table(name, f"Rank correlation with {scatter_figures.axis_label(x)}", columns, ids, tuple(rows), note)


def text(correlation: RankCorrelation) -> str:
    """Return a correlation as it stands in a panel."""
    if correlation.tau != correlation.tau:
        return f"no tau ({correlation.n} runs)"
    has_interval = correlation.low == correlation.low
    interval = f" [{correlation.low:z.2f}, {correlation.high:z.2f}]" if has_interval else ", no interval"
    return f"tau = {correlation.tau:z.2f}{interval} ({correlation.n} runs)"


def _number(value: float, style: str = ".2f") -> str:
    return format(value, f"z{style}") if value == value else "–"
