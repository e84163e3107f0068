"""Scatter figures: a number of each run over another one or over a configuration key, as means over seeds with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.config import experiment_identity
from vitscope.plotting.api import STYLE
from vitscope.plotting.style import MARKERS
from vitscope.plotting.text_fit import fit_legend, n_legend_lines
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.headline_tables import n_msa
from vitscope.reports.tables.table import LEAST_SEEDS, Cell, Problem, Table, over_seeds, seeds_text
from vitscope.reports.value_lookup import Selection, Value, scalar_of_result
from vitscope.stats.t_tests import Interval

#: axis labels by metric, scalar or configuration key
WORDS = {
    "1-test/accuracy": "test error",
    "test/accuracy": "test accuracy",
    "evaluation.accuracy-test/accuracy": "generalization gap (accuracy)",
    "train/accuracy-test/accuracy": "accuracy in the last epoch, augmented, minus test accuracy",
    "nll_center": "NLL on training images",
    "negative_eigenvalue_proportion": "negative eigenvalue proportion",
    "average_positive_eigenvalue": "average positive eigenvalue",
    "mean_accuracy": "corrupted accuracy",
    "rise_r0.1": "rise of NLL at r=.1",
    "data.fraction": "share of the training data",
    "model.n_msa": "attention blocks in each stage",
    "model.kernel_size": "kernel (tokens)",
    "model.patch_size": "patch (pixels)",
    "model.heads": "heads",
    "model.dim_head": "dimensions of a head",
    "model.placement": "place of attention in a stage",
    "optimizer.rho": "radius of SAM",
    "trainer.max_epochs": "epochs",
}
#: width of the points of one category, as a share of the distance between two categories
MOST_SHIFT = 0.8
#: inches of a line of the legend
LEGEND_LINE = 0.16


@dataclass(frozen=True)
class Point:
    """One experiment.

    Attributes:
        series: Name of the line that connects it: its model, without the key on the x axis.
        label: Name of the experiment in the report.
        x: A number's interval over seeds, or the key's value.
        y: An interval a quantity; None where there is no number.
    """

    series: str
    label: str
    x: Any
    y: tuple[Interval | None, ...]


def collect(selection: Selection, x: str, y: Sequence[str], name: str) -> tuple[list[Point], Table]:
    """Return the experiments' points, and the table of their numbers with every one that is missing.

    A quantity is a metric (``test/accuracy``), one minus it (``1-test/accuracy``), a scalar of an analysis
    (``hessian.average_positive_eigenvalue``), a difference of two of them (``evaluation.accuracy-test/accuracy``), or a
    dotted key of the configuration or ``objective``, its name (x only).

    Args:
        selection: The runs.
        x: The quantity below.
        y: The quantities of the panels.
        name: Name of the table and stem of its files.
    """
    points: list[Point] = []
    rows: list[tuple[Cell, ...]] = []
    problems: list[Problem] = []
    groups = list(selection.groups(lambda entry: entry.trained).values())
    keyed = any(x in _keys(entry) for runs in groups for entry in runs.values())
    quantities = y if keyed else (x, *y)
    for runs in groups:
        first = runs[min(runs)]
        cells = []
        for quantity in quantities:
            values = {f"run {entry.id}": value_of(selection, entry, quantity) for entry in runs.values()}
            cell, cell_problems = over_seeds(values, quantity, ".4g", len(runs))
            cells.append(cell)
            problems += cell_problems
        key = _keys(first).get(x) if keyed else None
        intervals = [cell.interval for cell in cells]
        position, heights = (key, intervals) if keyed else (intervals[0], intervals[1:])
        points.append(Point(_series(first, x), first.label, position, tuple(heights)))
        row = [Cell(first.label), Cell(_key_text(key)), *cells] if keyed else [Cell(first.label), *cells]
        rows.append(tuple(row))
    columns = ("model", x, *y)
    has_few = any(cell.values for row in rows for cell in row)
    note = f"{seeds_text([len(runs) for runs in groups], has_few)}." if groups else "No run."
    return points, Table(
        name,
        f"{', '.join(map(axis_label, y))} over {axis_label(x)}",
        columns,
        columns,
        tuple(rows),
        note,
        tuple(problems),
    )


def value_of(selection: Selection, entry: Entry, quantity: str) -> Value:
    """Return one number of one run, or why there is none."""
    if quantity.startswith("1-"):
        complement = value_of(selection, entry, quantity[2:])
        return complement if complement.number is None else Value(1 - complement.number)
    first, _, second = quantity.partition("-")
    if all("/" in part or "." in part for part in (first, second)):
        values = [value_of(selection, entry, part) for part in (first, second)]
        missing = next((value for value in values if value.number is None), None)
        return missing or Value((values[0].number or 0.0) - (values[1].number or 0.0))
    if "/" in quantity:
        return selection.metric(entry, quantity)
    analysis, _, scalar = quantity.partition(".")
    measured, no_value = selection.of_analysis(entry, analysis)
    return no_value if measured is None else scalar_of_result(measured, scalar)


def is_key(entry: Entry, quantity: str) -> bool:
    """Tell whether a quantity is a key of a run's configuration, or ``objective``."""
    return quantity in _keys(entry)


def draw(points: Sequence[Point], x: str, y: Sequence[str], texts: Sequence[str] = ()) -> Figure:
    """Draw a panel a quantity; experiments of one model are connected where x is a number of the configuration.

    Points of categories stand beside each other on an axis that includes 0. A note says where no experiment has an interval.

    Args:
        points: Experiments, at least one of them with a number.
        x: Quantity of the x axis.
        y: Quantities of the panels.
        texts: Line above each panel, such as a correlation.

    Raises:
        ValueError: No point.
    """
    if not points:
        raise ValueError("Expected at least one experiment, received none.")
    with style.context(STYLE):
        series = list(dict.fromkeys(point.series for point in points))
        width = max(3.4, 2.6 * len(y))
        names, n_columns = fit_legend(series, 2, width)
        figure = Figure(figsize=(width, 2.3 + LEGEND_LINE * n_legend_lines(names, n_columns)))
        axes = figure.subplots(1, len(y), squeeze=False)[0]
        for panel, (ax, quantity) in enumerate(zip(axes, y)):
            _draw_panel(ax, points, panel, x, series)
            ax.set_ylabel(axis_label(quantity).replace(" (", "\n("))
            ax.set_xlabel(axis_label(x))
            if texts:
                ax.set_title(texts[panel], fontsize="small")
        handles, _ = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=n_columns, frameon=False)
    return figure


def _draw_panel(ax: Axes, points: Sequence[Point], panel: int, x: str, series: Sequence[str]) -> None:
    is_measured = any(isinstance(point.x, Interval) for point in points)  # x too has a number a seed
    categories = [] if is_measured else _categories(points)
    drawn = [point for point in points if point.y[panel] is not None and (point.x is not None or not is_measured)]
    for number, name in enumerate(series):
        series_points = [point for point in drawn if point.series == name]
        # points of one category side by side, within its share of the axis
        distance = min(0.12, MOST_SHIFT / len(series)) if categories else 0.0
        shift = distance * (number - (len(series) - 1) / 2)
        marks = sorted((_mark(point, panel, categories, shift) for point in series_points), key=lambda mark: mark.x)
        line = "none" if is_measured or categories else "-"
        ax.errorbar(
            [mark.x for mark in marks],
            [mark.y for mark in marks],
            yerr=[mark.y_width for mark in marks],
            xerr=[mark.x_width for mark in marks] if is_measured else None,
            fmt=MARKERS[number % len(MARKERS)],
            linestyle=line,
            label=name,
        )
    if not drawn:
        ax.text(0.5, 0.5, "missing", transform=ax.transAxes, ha="center", va="center", color="0.5")
        ax.set_yticks([])
        ax.set_xticks([])
        return
    heights = [point.y[panel] for point in points]
    note = _note_of_intervals([height for height in heights if height is not None])
    if note:
        ax.text(0.02, 0.02, note, transform=ax.transAxes, fontsize="small", color="0.4")
    if categories:
        _set_categories(ax, categories)
    elif not is_measured:
        _set_numbers(ax, points, x)


class _Mark(NamedTuple):
    """A point of a panel and the half widths of its intervals."""

    x: float
    x_width: float
    y: float
    y_width: float


def _mark(point: Point, panel: int, categories: Sequence[str], shift: float) -> _Mark:
    """Return the mark of a point that has a number in a panel, ``shift`` beside its place on the x axis."""
    height = point.y[panel]
    assert height is not None
    x_width = _width(point.x) if isinstance(point.x, Interval) else 0.0
    return _Mark(_place(point.x, categories) + shift, x_width, height.mean, _width(height))


def _set_categories(ax: Axes, categories: Sequence[str]) -> None:
    """Name the categories on the x axis, and let the y axis include 0."""
    ax.set_xticks(range(len(categories)), categories, rotation=30 if max(map(len, categories)) > 6 else 0)
    ax.set_xlim(-0.5, len(categories) - 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.0), max(high, 0.0))


def _set_numbers(ax: Axes, points: Sequence[Point], x: str) -> None:
    """Mark the values of a numeric key on the x axis."""
    ax.set_xscale("log" if x == "data.fraction" else "linear")
    values = sorted({float(point.x) for point in points})
    ax.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def _note_of_intervals(heights: Sequence[Interval]) -> str:
    """Return why no number of a panel has an interval, or that some have none for lack of seeds; else an empty text."""
    if not any(map(_width, heights)):
        has_single_seeds = max(height.n for height in heights) == 1
        return "No interval: one seed" if has_single_seeds else f"No interval: fewer than {LEAST_SEEDS} seeds"
    has_few_seeds = any(height.n < LEAST_SEEDS for height in heights)
    return f"Without bar: fewer than {LEAST_SEEDS} seeds" if has_few_seeds else ""


def _categories(points: Sequence[Point]) -> list[str]:
    """Return the names of the places on the x axis where the key's values are no numbers, else nothing."""
    values = [p.x for p in points]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return []
    numbers = sorted({v for v in values if isinstance(v, int | float)})
    others = dict.fromkeys(_key_text(v) for v in values if not isinstance(v, int | float))
    return [*map(_key_text, numbers), *others]


def _place(x: Any, categories: Sequence[str]) -> float:
    if isinstance(x, Interval):
        return x.mean
    return float(categories.index(_key_text(x))) if categories else float(x)


def _width(interval: Interval | None) -> float:
    """Return the half width of an interval; 0 where there is none, or where it is of too few seeds."""
    if interval is None or interval.n < LEAST_SEEDS:
        return 0.0
    return interval.half_width if interval.half_width > 0 else 0.0


def _keys(entry: Entry) -> Mapping[str, Any]:
    keys = experiment_identity.flattened({k: v for k, v in entry.config.items() if isinstance(v, Mapping)})
    named: dict[str, Any] = {"objective": experiment_identity.recipe(entry.config) or "other"}
    if entry.family == "alternet":
        named["model.n_msa"] = list(n_msa(entry))  # also where the model's default counts were taken
    return {**keys, **named}


def _series(entry: Entry, x: str) -> str:
    """Return the model's name with what sets its experiment apart, but for the key on the x axis."""
    name, *rest = entry.label.split(", ")
    keys = ("objective", *experiment_identity.REPEATED) if x == "objective" else (x.rpartition(".")[2],)
    return ", ".join([name, *(part for part in rest if part.partition(" ")[0] not in keys)])


def axis_label(quantity: str) -> str:
    """Return a quantity as it stands at an axis."""
    analysis, _, scalar = quantity.partition(".")
    if quantity in WORDS:
        return WORDS[quantity]
    if scalar in WORDS:
        return WORDS[scalar] + (" (clean images)" if analysis.endswith("_clean") else "")
    return (scalar or analysis).replace("_", " ")


def _key_text(value: Any) -> str:
    if isinstance(value, list | tuple) and all(isinstance(entry, int) and entry < 10 for entry in value):
        return "".join(map(str, value))  # digits, such as the counts of attention blocks by stage
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)
