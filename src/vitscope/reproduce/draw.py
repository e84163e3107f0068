"""Draw a target of `vitscope reproduce`: its figures, relations and table; missing parts are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from vitscope.config import experiment_identity
from vitscope.plotting.api import save_figure
from vitscope.reports import run_index
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.exports import study_export
from vitscope.reports.figures import (
    claims_figure,
    figure_captions,
    figure_plan,
    figure_worker,
    run_correlations,
    scatter_figures,
)
from vitscope.reports.figures.figure_plan import Panel
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables import baselines, factorial_tables, headline_tables, terminal_table
from vitscope.reports.tables import table as cells
from vitscope.reports.tables.table import Table
from vitscope.reports.value_lookup import Selection
from vitscope.reproduce.plan import Drawing, Relation, Target
from vitscope.runs import run_dir
from vitscope.runs.run_dir import Run


class TrialOutcome(Protocol):
    """Outcome of a trial: its run folder, and its results as ``analysis/tag-settings``."""

    @property
    def run(self) -> Path | None:
        """The run's folder."""
        ...

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the measured results."""
        ...


def draw(target: Target, outcomes: Sequence[TrialOutcome], out: Path) -> list[str]:
    """Write a target's figures and tables to ``<out>/<target>``; return what is missing or failed, a line each.

    Args:
        target: Target to draw.
        outcomes: Outcomes of its trials that have a run.
        out: The folder of all targets.
    """
    if not outcomes:
        return [f"missing: {target.name}: no run"]
    report_entries = entries(outcomes)
    problems: list[str] = []
    for drawing in target.drawings:
        problems += _draw_figures(target, drawing, report_entries, out / target.name)
    return problems + draw_numbers(target, report_entries, out)


def draw_numbers(target: Target, report_entries: Sequence[Entry], out: Path) -> list[str]:
    """Write what a target draws of numbers alone, without arrays: its relations and its table; return what is missing.

    Args:
        target: Target to draw.
        report_entries: The target's runs.
        out: The folder of all targets.
    """
    folder, problems = out / target.name, list[str]()
    for relation in target.relations:
        problems += _draw_relation(target, relation, report_entries, folder)
    if target.table:
        problems += _write_table(target, report_entries, folder)
    return problems


def entries(outcomes: Sequence[TrialOutcome]) -> list[Entry]:
    """Return the runs with those results only that their trials asked for."""
    requested_results: dict[Run, set[str]] = {}
    for outcome in outcomes:
        if outcome.run is not None:
            requested_results.setdefault(run_dir.find(outcome.run), set()).update(outcome.results)
    return [
        replace(e, results=tuple(m for m in e.results if f"{m.analysis}/{m.path.stem}" in requested_results[e.run]))
        for e in run_index.collect(list(requested_results))
    ]


def _draw_figures(target: Target, drawing: Drawing, report_entries: Sequence[Entry], folder: Path) -> list[str]:
    tag = target.tags[0] if len(target.tags) == 1 else "all"
    panels = figure_plan.panels(report_entries, tag=tag, analyses=[drawing.analysis], allow_different=target.different)
    problems = [str(p) for t in target.tags for p in figure_plan.missing_results(report_entries, [drawing.analysis], t)]
    if target.baselines:
        panels, missing_baselines = baselines.panels(report_entries, [drawing.analysis])
        problems += map(str, missing_baselines)
    suffix = "".join(f"-{value}" for value in drawing.options.values())
    for panel in map(_named_by_objective, panels) if target.different else panels:
        picture = figure_worker.draw(
            figure_captions.drawing_job(replace(panel, name=panel.name + suffix), folder, drawing.options)
        )
        if picture.problem:
            problems.append(f"failed: figure {panel.name}: {picture.problem}")
        else:
            print(picture.png)
    if not panels:
        problems.append(f"missing: figure {drawing.analysis} (no result)")
    return [_of_target(target, problem) for problem in problems]


def _named_by_objective(panel: Panel) -> Panel:
    """Return the panel with its curves named by their objectives, where these differ and tell them apart."""
    recipes = [experiment_identity.recipe(curve.entry.config) or "other objective" for curve in panel.curves]
    names = []
    for curve, recipe in zip(panel.curves, recipes):
        parts = [p for p in curve.entry.label.split(", ") if p.partition(" ")[0] not in experiment_identity.REPEATED]
        names.append(", ".join([*parts, recipe] if len(set(recipes)) > 1 else parts))
    if len(set(names)) < len(names):
        return panel
    return replace(panel, curves=tuple(replace(c, label=name) for c, name in zip(panel.curves, names)))


def _draw_relation(target: Target, relation: Relation, report_entries: Sequence[Entry], folder: Path) -> list[str]:
    selection = Selection(report_entries, "end" if "end" in target.tags else target.tags[0])
    name = "numbers"
    points, table = scatter_figures.collect(selection, relation.x, relation.y, name)
    cells.write(table, folder)
    terminal_table.show(table)
    correlation_of = run_correlations.correlations(selection, relation.x, relation.y)
    if correlation_of:
        correlation_table = run_correlations.table(correlation_of, relation.x, "correlations")
        cells.write(correlation_table, folder)
        terminal_table.show(correlation_table)
    if points:
        texts = [run_correlations.text(c) for c in correlation_of.values()]
        print(save_figure(scatter_figures.draw(points, relation.x, relation.y, texts), folder / name)[0])
    return [_of_target(target, str(problem)) for problem in table.problems]


def _write_table(target: Target, report_entries: Sequence[Entry], folder: Path) -> list[str]:
    costs = Costs()
    table: Table
    if target.table == "factors":
        return _write_factors(target, Selection(report_entries), folder)
    if target.table == "claims":
        judged = claim_verdicts.judge(ReportRuns(Selection(report_entries), costs))
        data = study_export.data_names(report_entries)
        table = claim_verdicts.table(judged, data)
        if (figure := claims_figure.draw(judged, data)) is not None:
            print(save_figure(figure, folder / "effects")[0])
    else:
        table = headline_tables.build(str(target.table), Selection(report_entries), costs)
    cells.write(table, folder)
    terminal_table.show(table)
    return [_of_target(target, str(problem)) for problem in table.problems]


def _write_factors(target: Target, selection: Selection, folder: Path) -> list[str]:
    tables = factorial_tables.write_factorial_tables(selection, folder)
    for table in tables.values():
        cells.write(table, folder)
        terminal_table.show(table)
    if picture := tables["factors"].picture:
        print(picture)
    return [_of_target(target, str(problem)) for problem in tables["factors"].problems]


def _of_target(target: Target, problem: str) -> str:
    kind, _, rest = problem.partition(": ")
    return f"{kind}: {target.name}: {rest}"
