"""Draw the scalars of analyses over the optimizer steps at which a training measured them."""

from __future__ import annotations

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.plotting.api import STYLE, save_figure
from vitscope.plotting.canvas import COLUMN_WIDTH, result_color
from vitscope.plotting.style import MARKERS
from vitscope.plotting.text_fit import fit_legend, n_legend_lines
from vitscope.reports.figures.figure_captions import DrawnPanel, with_picture
from vitscope.reports.figures.figure_plan import Curve, Panel
from vitscope.reports.figures.figure_worker import Picture
from vitscope.reports.measured_results import Conditions, Measured, step_of_tag
from vitscope.reports.run_entry import Entry
from vitscope.runtime.atomic_write import write_atomically
from vitscope.runtime.errors import StorageError

#: inches of a line of the legend
LEGEND_LINE = 0.15
#: fewer steps show no course of a training
LEAST_STEPS = 3
#: in place of a moment
STEPS = "steps"


@dataclass(frozen=True)
class StepHistory:
    """Results of one analysis over steps, of runs under the same conditions.

    Attributes:
        name: Stem of the figure's files.
        analysis: The configuration's name.
        results: Results by name in the legend, each with its step, in the order of steps.
        entries: The run that is drawn, by name in the legend.
    """

    name: str
    analysis: str
    results: Mapping[str, Sequence[tuple[int, Measured]]]
    entries: Mapping[str, Entry]

    def changing_scalars(self) -> list[str]:
        """Return the `scalars` that change over steps or differ between models; all of them where none does."""
        names = self.scalars()
        results = [result for by_step in self.results.values() for _, result in by_step]
        changing = [name for name in names if len({result.scalars.get(name) for result in results} - {None}) > 1]
        return changing or names

    def scalars(self) -> list[str]:
        """Return the scalars that some result has a number for at ``LEAST_STEPS`` steps or more."""
        names: dict[str, None] = {}
        frequent: set[str] = set()
        for by_step in self.results.values():
            scalars = [result.scalars for _, result in by_step]
            names |= dict.fromkeys(name for of_step in scalars for name in of_step)
            n_steps = Counter(name for of_step in scalars for name, value in of_step.items() if value is not None)
            frequent |= {name for name, n in n_steps.items() if n >= LEAST_STEPS}
        return [name for name in names if name in frequent]


def step_histories(
    entries: Sequence[Entry], analyses: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
) -> list[StepHistory]:
    """Return the histories of analyses that runs measured at several steps, the lowest seed of each experiment.

    Args:
        entries: The runs.
        analyses: Analyses to draw; None for all.
        labels: Names in the legend, by run or by the name that this report gives an experiment.
    """
    histories: dict[tuple[str, Conditions], dict[str, tuple[Entry, list[tuple[int, Measured]]]]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.seed, entry.id), reverse=True):  # the lowest seed comes last
        label = (labels or {}).get(entry.id, (labels or {}).get(entry.label, entry.label))
        for (analysis, conditions), results in _by_analysis(entry).items():
            if len(results) >= LEAST_STEPS and (analyses is None or analysis in analyses):
                histories.setdefault((analysis, conditions), {})[label] = (entry, sorted(results.items()))
    n_of_analysis = {key[0]: 0 for key in histories}
    planned = []
    for (analysis, _), by_label in sorted(histories.items(), key=lambda item: (item[0][0], -len(item[1]))):
        n_of_analysis[analysis] += 1
        number = n_of_analysis[analysis]
        name = f"{analysis}-{STEPS}" + (f"-{number}" if number > 1 else "")
        ordered = dict(sorted(by_label.items()))
        planned.append(
            StepHistory(
                name,
                analysis,
                {label: results for label, (_, results) in ordered.items()},
                {label: entry for label, (entry, _) in ordered.items()},
            )
        )
    return planned


def draw_history(history: StepHistory, folder: Path, *, pdf: bool = True) -> DrawnPanel:
    """Draw a history and write its numbers; return it as a figure of the report.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        png, *print_file = save_figure(
            draw(history), folder / history.name, formats=("png", "pdf") if pdf else ("png",)
        )
    except OSError as error:
        reason = f"not writable ({error.strerror})"
        raise StorageError("out", folder, reason, "free space, or choose another folder: out=<folder>") from None
    table = folder / f"{history.name}.csv"
    write_atomically(table, _numbers(history).encode())
    curves = tuple(Curve(label, history.entries[label], results[-1][1]) for label, results in history.results.items())
    panel = Panel(
        history.name, history.analysis, STEPS, curves, "Scalars that change over optimizer steps; one run per model."
    )
    return with_picture(panel, Picture(png, print_file[0] if print_file else None, table, tuple(history.results)))


def draw(history: StepHistory) -> Figure:
    """Draw a panel a scalar, a line a model, over the number of optimizer steps; scalars of one value are left out."""
    names = history.changing_scalars()
    rows = -(-len(names) // 2)
    with style.context(STYLE):
        labels, n_columns = fit_legend(list(history.results), 3, 2 * COLUMN_WIDTH)
        height = 1.6 * rows + 0.25 + LEGEND_LINE * n_legend_lines(labels, n_columns)
        figure = Figure(figsize=(2 * COLUMN_WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
        for index, (label, results) in enumerate(history.results.items()):
            for ax, name in zip(axes, names):
                points = [(step, m.scalars[name]) for step, m in results if m.scalars.get(name) is not None]
                steps, values = np.array(points, dtype=float).reshape(-1, 2).T
                marker = MARKERS[index % len(MARKERS)]
                ax.plot(steps, values, marker=marker, markersize=2.5, color=result_color(index), label=label)
        for ax, name in zip(axes, names):
            ax.set_ylabel(textwrap.fill(name.replace("_", " "), 20))
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        for ax in axes[max(len(names) - 2, 0) : len(names)]:
            ax.set_xlabel("Optimizer step")
            ax.tick_params(labelbottom=True)
        handles, _ = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=n_columns, frameon=False)
    return figure


def _by_analysis(entry: Entry) -> dict[tuple[str, Conditions], dict[int, Measured]]:
    """Return an entry's results by analysis and conditions, and by step; the newest of several at one step."""
    histories: dict[tuple[str, Conditions], dict[int, Measured]] = {}
    if entry.superseded:
        return histories
    for measured in entry.results:
        step = _step_of(measured)
        if step is not None and not measured.error:
            histories.setdefault((measured.analysis, measured.conditions()), {})[step] = measured
    return histories


def _step_of(measured: Measured) -> int | None:
    if measured.tag == "init":
        return 0
    stated = step_of_tag(measured.tag)
    return stated if stated is not None or measured.card is None else measured.card.step


def _numbers(history: StepHistory) -> str:
    """Return the numbers as a table: a row a model, step and scalar."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "step", "quantity", "value"])
    for label, results in history.results.items():
        for step, measured in results:
            writer.writerows(
                [label, step, name, "" if measured.scalars.get(name) is None else repr(measured.scalars[name])]
                for name in history.scalars()
            )
    return text.getvalue()
