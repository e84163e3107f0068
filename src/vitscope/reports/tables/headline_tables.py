"""Headline tables: models, curvature, robustness, build-up. Missing cells are listed and left empty; no value is imputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitscope.config.model_facts import UNRECORDED
from vitscope.models.alternet_layout import DEFAULT_MSA
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables import headline_notes
from vitscope.reports.tables.headline_columns import METRIC, MODEL, TABLES, TITLES, Column
from vitscope.reports.tables.table import Cell, Problem, Table, over_seeds
from vitscope.reports.value_lookup import FAILED, MISSING, Selection, Value


def build(
    name: str,
    selection: Selection,
    costs: Costs,
    expect_models: Sequence[str] = (),
    expect_seeds: Sequence[int] = (),
    labels: Mapping[str, str] | None = None,
    order: Sequence[str] = (),
) -> Table:
    """Return one of `TABLES`: a row an experiment, means and 95% t-intervals over its seeds, values of fewer than 3 seeds.

    Args:
        name: Name of the table, a key of `TABLES`.
        selection: The runs.
        costs: Parameters and operations of models.
        expect_models: Families that must have a row; one that no run has is a row of missing cells.
        expect_seeds: Seeds that every row must have.
        labels: Names of rows, by run or by the name that the report gives an experiment.
        order: Names of the rows that come first.
    """
    groups = _groups(name, selection)
    columns = _columns(name, groups, selection)
    row_names = [_row_name(_first(runs), labels or {}) for runs in groups]
    ranks = {row_name: rank for rank, row_name in enumerate(order)}
    ranked = sorted(zip(row_names, groups), key=lambda row: ranks.get(row[0], len(ranks)))
    has_several_datasets = len({entry.data for runs in groups for entry in runs.values()}) > 1
    rows: list[tuple[Cell, ...]] = []
    problems: list[Problem] = []
    run_rows: list[dict[str, object]] = []
    for row_name, runs in ranked:
        cells, row_problems = _row(runs, columns, selection, costs, expect_seeds)
        rows.append((*_head(name, row_name, _first(runs), has_several_datasets), *cells))
        problems += row_problems
        run_rows += _run_rows(row_name, runs, columns, selection, costs)
    families = {entry.family for runs in groups for entry in runs.values()}
    head = _heading(name, has_several_datasets)
    for model in [model for model in expect_models if model not in families]:
        rows.append((Cell(model), *(Cell("") for _ in head[1:]), *(Cell(MISSING, None, MISSING) for _ in columns)))
        problems += [Problem(MISSING, model, column.id, "no run of this model") for column in columns]
    return Table(
        name=name,
        title=TITLES[name],
        columns=(*head, *(c.title for c in columns)),
        ids=(*head, *(c.id for c in columns)),
        rows=tuple(rows),
        note=headline_notes.note(
            name, groups, columns, selection, any(cell.values for cells in rows for cell in cells)
        ),
        problems=tuple(dict.fromkeys(problems)),
        runs=tuple(run_rows),
    )


def _groups(name: str, selection: Selection) -> list[Mapping[int, Entry]]:
    """Return the runs of each row by seed: of the build-up its models in the order of their attention, else trained models."""
    if name == "buildup":
        groups = list(selection.groups(_in_build_up).values())
        return sorted(groups, key=lambda runs: (_first(runs).data, sum(n_msa(_first(runs))), n_msa(_first(runs))))
    groups = selection.groups(lambda entry: entry.trained or _has_any(entry, TABLES[name], selection))
    return list(groups.values())


def _columns(name: str, groups: Sequence[Mapping[int, Entry]], selection: Selection) -> list[Column]:
    """Return the columns of a table without optional ones that nobody measured and metrics that nobody asked for."""
    columns = []
    for column in TABLES[name]:
        is_wanted = not column.optional or _is_measured(selection, column)
        if is_wanted and (column.source != METRIC or _is_expected(groups, selection, column)):
            columns.append(column)
    return columns


def _run_rows(
    row_name: str, runs: Mapping[int, Entry], columns: Sequence[Column], selection: Selection, costs: Costs
) -> list[dict[str, object]]:
    """Return the numbers of each run of a row, by seed."""
    return [
        {
            "model": row_name,
            "data": entry.data,
            "run": entry.id,
            "seed": seed,
            **{column.id: column_value(column, entry, selection, costs).number for column in columns},
        }
        for seed, entry in sorted(runs.items())
    ]


def column_value(column: Column, entry: Entry, selection: Selection, costs: Costs) -> Value:
    """Return a column's number of one run, or why there is none."""
    if column.source == METRIC:
        return selection.metric(entry, column.key)
    if column.source == MODEL:
        cost = costs.of(entry)
        cost_value: Any = getattr(cost, column.key)
        if cost_value is not None:
            return Value(float(cost_value))
        return Value(None, MISSING if cost.why == UNRECORDED else FAILED, cost.why)
    return selection.scalar(entry, column.source, column.key)


def _row(
    runs: Mapping[int, Entry], columns: Sequence[Column], selection: Selection, costs: Costs, seeds: Sequence[int]
) -> tuple[list[Cell], list[Problem]]:
    cells, problems = [], []
    absent = [seed for seed in seeds if seed not in runs]
    for column in columns:
        values = {f"run {entry.id}": column_value(column, entry, selection, costs) for entry in runs.values()}
        values |= {f"{_first(runs).label}, seed {seed}": Value(None, MISSING, "no run") for seed in absent}
        cell, cell_problems = over_seeds(values, column.id, column.style, len(runs) + len(absent))
        cells.append(cell)
        problems += cell_problems
    return cells, problems


def _heading(name: str, several: bool) -> list[str]:
    heading = ["model"]
    if several:
        heading.append("data")
    if name == "buildup":
        heading.append("MSAs")
    return heading


def _row_name(entry: Entry, labels: Mapping[str, str]) -> str:
    return labels.get(entry.id, labels.get(entry.label, entry.label))


def _head(name: str, row_name: str, entry: Entry, several: bool) -> list[Cell]:
    texts = [row_name]
    if several:
        texts.append(entry.data)
    if name == "buildup":
        texts.append(",".join(map(str, n_msa(entry))))
    return [Cell(text) for text in texts]


def _first(runs: Mapping[int, Entry]) -> Entry:
    return runs[min(runs)]


def _is_measured(selection: Selection, column: Column) -> bool:
    """Return whether some run has the scalar, or a failed analysis of it."""
    tag = None if selection.or_newest else selection.tag
    attempts = (m for e in selection.entries for m in e.results_at(tag) if m.measure == column.source)
    return any(m.error or column.key in m.scalars for m in attempts)


def _is_expected(groups: Sequence[Mapping[int, Entry]], selection: Selection, column: Column) -> bool:
    """Return whether some run of the rows was trained here, or its evaluation has the metric: else nobody asked for it."""
    entries = [entry for runs in groups for entry in runs.values()]
    return not entries or any(e.trained or selection.evaluation(e, column.key) is not None for e in entries)


def _has_any(entry: Entry, columns: Sequence[Column], selection: Selection) -> bool:
    """Return whether a trained model that was analyzed has a number for one of the columns that are measured."""
    if entry.untrained:
        return False
    measures = {column.source for column in columns}
    return any(not m.error and m.measure in measures for m in entry.results) or any(
        selection.evaluation(entry, column.key) is not None for column in columns if column.source == METRIC
    )


def _in_build_up(entry: Entry) -> bool:
    return entry.trained and entry.family in ("alternet", "preresnet")


def n_msa(entry: Entry) -> tuple[int, ...]:
    """Return the number of attention blocks in each stage of an AlterNet or a ResNet; none where another mixer replaces them."""
    node = entry.config.get("model") or {}
    if entry.family != "alternet" or (node.get("mixer") or "msa") != "msa":
        return (0, 0, 0, 0)
    return tuple(node.get("n_msa") or DEFAULT_MSA.get(node.get("depth", 18), ()))
