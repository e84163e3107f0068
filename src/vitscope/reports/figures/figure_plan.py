"""Plan the figures of a report: results of one measure at one moment under one objective, one curve for each experiment."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitscope.reports.measured_results import Conditions, Measured, differing, moment, stated, step_of_tag
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.table import Problem
from vitscope.reports.value_lookup import FAILED, MISSING

#: analysis, measure and moment
FigureKey = tuple[str, str, str]
#: results of a figure by the name in its legend
ResultsByLabel = dict[str, list[tuple[Entry, Measured]]]

#: in place of a moment: results of several moments, each run's newest
NEWEST = "newest"
#: experiments in one figure; more are spread over several
PER_FIGURE = 6


@dataclass(frozen=True)
class Curve:
    """One named curve of a figure.

    Attributes:
        label: Name in the legend.
        entry: The run that is drawn.
        measured: The result of that run.
        others: The results of the other seeds, for the table of numbers.
    """

    label: str
    entry: Entry
    measured: Measured
    others: tuple[tuple[Entry, Measured], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One figure that is to be drawn: results of one measure, at one moment or along training.

    Attributes:
        name: Stem of the figure's files.
        analysis: The configuration's name.
        tag: The moment, or ``training`` where a model's moments are overlaid.
        curves: Curves of the figure.
        notice: Reasons why expected results are not in it.
        overview: Whether it is one of more than two parts: something to look through, not to print.
    """

    name: str
    analysis: str
    tag: str
    curves: tuple[Curve, ...]
    notice: str = ""
    overview: bool = False


def panels(
    entries: Sequence[Entry],
    *,
    tag: str | None = None,
    analyses: Sequence[str] | None = None,
    group_by: str = "model",
    labels: Mapping[str, str] | None = None,
    order: Sequence[str] = (),
    allow_different: bool = False,
) -> list[Panel]:
    """Return the figures to draw, by analysis and moment.

    Several seeds of one experiment give one name: the figure shows the lowest seed that has the result, its table of
    numbers all of them. Results whose objective cards differ stand in figures of their own, with a notice that names the
    keys.

    Args:
        entries: The runs.
        tag: A moment; ``all``: each moment, and each model's moments overlaid; None: ``end``, or where a run has nothing
            there its newest result, all in one figure.
        analyses: Analyses to draw; None for all.
        group_by: ``model`` (an experiment) or ``run``.
        labels: Names in the legend, by run or by the name that this report gives an experiment.
        order: Names in the legend of the curves that come first.
        allow_different: Whether to overlay results whose cards differ, the differing keys in their names.
    """
    results_by_figure = _results_by_figure(entries, tag, analyses, group_by, labels or {})
    if tag == "all":
        results_by_figure = _without_crowded_steps(results_by_figure)
    results_by_figure = {_with_shared_tag(key, results): results for key, results in results_by_figure.items()}
    ranks = {name: rank for rank, name in enumerate(order)}
    planned: list[Panel] = []
    for (analysis, _, result_tag), by_label in sorted(
        results_by_figure.items(), key=lambda item: (item[0][0], moment(item[0][2]))
    ):
        by_rank = dict(sorted(by_label.items(), key=lambda item: ranks.get(item[0], len(ranks))))
        planned += _panels_of_moment(analysis, result_tag, by_rank, allow_different)
    if tag == "all":
        planned += _panels_along_training(results_by_figure)
    return _with_unique_names(planned)


def _results_by_figure(
    entries: Sequence[Entry],
    tag: str | None,
    analyses: Sequence[str] | None,
    group_by: str,
    labels: Mapping[str, str],
) -> dict[FigureKey, ResultsByLabel]:
    """Return the results to draw; arguments are those of `panels`."""
    results_by_figure: dict[FigureKey, ResultsByLabel] = {}
    for entry in entries:
        if entry.superseded:
            continue
        label = entry.label if group_by == "model" else f"{entry.label}, {entry.id}"
        label = labels.get(entry.id, labels.get(label, label))
        for measured in entry.results_at(tag):
            if not measured.error and (analyses is None or measured.analysis in analyses):
                key = (measured.analysis, measured.measure, NEWEST if tag is None else measured.tag)
                results_by_figure.setdefault(key, {}).setdefault(label, []).append((entry, measured))
    return results_by_figure


def _with_unique_names(planned: Sequence[Panel]) -> list[Panel]:
    """Return panels of which those with a name that is in use, as of two measures of one analysis, are named by measure too."""
    used_names: set[str] = set()
    renamed = []
    for panel in planned:
        name = panel.name if panel.name not in used_names else f"{panel.name}-{panel.curves[0].measured.measure}"
        used_names.add(name)
        renamed.append(replace(panel, name=name))
    return renamed


def _without_crowded_steps(
    by_figure: Mapping[FigureKey, ResultsByLabel],
) -> dict[FigureKey, ResultsByLabel]:
    """Leave at most `PER_FIGURE` steps of each analysis, evenly spaced from the first to the last.

    The course over all steps is in the figure of its scalars; ``tag=step-000120`` draws a step that is left out.
    """
    steps: dict[tuple[str, str], list[str]] = {}
    for analysis, measure, tag in sorted(by_figure, key=lambda key: moment(key[2])):
        if step_of_tag(tag) is not None:
            steps.setdefault((analysis, measure), []).append(tag)
    spaced_steps = {
        (*key, tags[round(i * (len(tags) - 1) / max(PER_FIGURE - 1, 1))])
        for key, tags in steps.items()
        for i in range(PER_FIGURE)
    }
    return {key: results for key, results in by_figure.items() if step_of_tag(key[2]) is None or key in spaced_steps}


def _with_shared_tag(
    key: tuple[str, str, str], by_label: Mapping[str, Sequence[tuple[Entry, Measured]]]
) -> tuple[str, str, str]:
    """Return the key of a figure with the moment that all of its results share, where it is of the newest ones."""
    tags = {m.tag for results in by_label.values() for _, m in results}
    return (*key[:2], tags.pop()) if key[2] == NEWEST and len(tags) == 1 else key


def missing_results(entries: Sequence[Entry], analyses: Sequence[str], tag: str | None) -> list[Problem]:
    """Return a problem for each named analysis that a run does not have at a moment, at any with None."""
    absent = "not measured" if tag in (None, "all") else f"not measured at {tag}"
    problems = []
    for entry in entries:
        if entry.superseded:
            continue
        for analysis in analyses:
            attempts = [measured for measured in entry.results_at(tag) if measured.analysis == analysis]
            if all(measured.error for measured in attempts):
                kind, reason = (FAILED, attempts[-1].error) if attempts else (MISSING, absent)
                problems.append(Problem(kind, f"run {entry.id}", analysis, reason))
    return problems


def _panels_of_moment(
    analysis: str, tag: str, by_label: Mapping[str, Sequence[tuple[Entry, Measured]]], allow_different: bool
) -> list[Panel]:
    classes: dict[Conditions, dict[str, list[tuple[Entry, Measured]]]] = {}
    for label, results in by_label.items():
        for entry, m in results:
            classes.setdefault(m.conditions(), {}).setdefault(label, []).append((entry, m))
    keys = differing(classes)
    ordered = sorted(classes.items(), key=lambda item: -len(item[1]))
    if allow_different and keys:
        merged = {
            f"{label}, {stated(key, keys)}": labeled_results
            for key, labels in ordered
            for label, labeled_results in labels.items()
        }
        ordered, notice = [((), merged)], f"Objective cards differ in {', '.join(keys)} (overlaid as asked)."
        keys = []
    else:
        notice = ""
    planned = []
    for index, (key, labels) in enumerate(ordered):
        stem = f"{analysis}-{tag}" + (f"-{index + 1}" if len(ordered) > 1 else "")
        if keys:
            notice = (
                f"Shown apart: objective cards differ in {', '.join(keys)}; here {stated(key, keys)}. "
                "allow_different=true overlays them."
            )
        curves = [curve_of(label, labeled_results) for label, labeled_results in labels.items()]
        planned += _divide(Panel(stem, analysis, tag, tuple(curves), notice))
    return planned


def curve_of(label: str, results: Sequence[tuple[Entry, Measured]]) -> Curve:
    """Return the curve of an experiment's results: the newest of each run, the lowest seed drawn."""
    newest: dict[str, tuple[Entry, Measured]] = {entry.id: (entry, m) for entry, m in results}  # results are by age
    first, *others = sorted(newest.values(), key=lambda pair: (pair[0].seed, pair[0].id))
    return Curve(label, *first, tuple(others))


def _divide(panel: Panel) -> list[Panel]:
    """Divide a crowded panel; its parts have nearly equal numbers of curves."""
    n = len(panel.curves)
    parts = -(-n // PER_FIGURE)
    if parts <= 1:
        return [panel]
    ends = [round(i * n / parts) for i in range(parts + 1)]
    return [
        replace(panel, name=f"{panel.name}-part{i + 1}", curves=panel.curves[start:end], overview=parts > 2)
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def _panels_along_training(
    results_by_figure: Mapping[tuple[str, str, str], Mapping[str, Sequence[tuple[Entry, Measured]]]],
) -> list[Panel]:
    moments: dict[tuple[str, str], list[tuple[str, Entry, Measured]]] = {}
    for (analysis, _, tag), by_label in sorted(results_by_figure.items(), key=lambda item: moment(item[0][2])):
        for label, results in by_label.items():
            curve = curve_of(label, results)
            moments.setdefault((analysis, label), []).append((tag, curve.entry, curve.measured))
    planned = []
    for (analysis, label), steps in moments.items():
        run = steps[0][1].id
        curves = tuple(Curve(tag, entry, m) for tag, entry, m in steps if entry.id == run)
        if len(curves) > 1:
            planned += _divide(
                Panel(f"{analysis}-training-{slug(label)}", analysis, "training", curves, f"{label}, {run}")
            )
    return planned


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")
