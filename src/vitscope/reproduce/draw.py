"""A target of `vitscope reproduce` drawn: its figures, its relations, its table; what is missing is named."""

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
from vitscope.reports.figures import figure_captions, figure_plan, figure_worker, scatter_figures
from vitscope.reports.figures.figure_plan import Panel
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_index import Entry
from vitscope.reports.tables import baselines, factorial_tables, headline_tables
from vitscope.reports.tables import table as cells
from vitscope.reports.tables.table import Table
from vitscope.reports.value_lookup import Selection
from vitscope.reproduce.plan import Drawing, Relation, Target
from vitscope.runs import run_dir


class TrialOutcome(Protocol):
    """What a trial left: its run and its results as ``analysis/tag-settings``."""

    @property
    def run(self) -> Path | None:
        """The run's folder."""
        ...

    @property
    def results(self) -> tuple[str, ...]:
        """What was measured."""
        ...


def draw(target: Target, made: Sequence[TrialOutcome], out: Path) -> list[str]:
    """Write a target's figures and tables to ``<out>/<target>``; return what is missing or failed, a line each.

    Args:
        target: what to draw.
        made: its trials that have a run.
        out: the folder of all targets.
    """
    if not made:
        return [f"missing: {target.name}: no run"]
    folder = out / target.name
    found = entries(made)
    problems: list[str] = []
    for wanted in target.drawings:
        problems += _figures(target, wanted, found, folder)
    for relation in target.relations:
        problems += _relation(target, relation, found, folder)
    if target.table:
        problems += _table(target, found, folder)
    return problems


def entries(made: Sequence[TrialOutcome]) -> list[Entry]:
    """Return the runs with those results only that their trials asked for."""
    asked: dict[str, set[str]] = {}
    for outcome in made:
        if outcome.run is not None:
            asked.setdefault(outcome.run.name, set()).update(outcome.results)
    found = run_index.collect([run_dir.find(path) for path in dict.fromkeys(o.run for o in made if o.run is not None)])
    return [
        replace(e, results=tuple(m for m in e.results if f"{m.analysis}/{m.path.stem}" in asked[e.id])) for e in found
    ]


def _figures(target: Target, wanted: Drawing, found: Sequence[Entry], folder: Path) -> list[str]:
    tag = target.tags[0] if len(target.tags) == 1 else "all"
    made = figure_plan.panels(found, tag=tag, analyses=[wanted.analysis], allow_different=target.different)
    problems = [str(p) for t in target.tags for p in figure_plan.absent(found, [wanted.analysis], t)]
    if target.baselines:
        made, lacking = baselines.panels(found, [wanted.analysis])
        problems += map(str, lacking)
    suffix = "".join(f"-{value}" for value in wanted.options.values())
    for panel in map(_named, made) if target.different else made:
        picture = figure_worker.draw(
            figure_captions.job(replace(panel, name=panel.name + suffix), folder, wanted.options)
        )
        if picture.problem:
            problems.append(f"failed: figure {panel.name}: {picture.problem}")
        else:
            print(picture.png)
    if not made:
        problems.append(f"missing: figure {wanted.analysis} (no result)")
    return [_of(target, problem) for problem in problems]


def _named(panel: Panel) -> Panel:
    """Return the panel with its curves named by their objectives, where these differ and tell them apart."""
    recipes = [experiment_identity.recipe(curve.entry.config) or "other objective" for curve in panel.curves]
    names = []
    for curve, recipe in zip(panel.curves, recipes):
        parts = [p for p in curve.entry.label.split(", ") if p.partition(" ")[0] not in experiment_identity.REPEATED]
        names.append(", ".join([*parts, recipe] if len(set(recipes)) > 1 else parts))
    if len(set(names)) < len(names):
        return panel
    return replace(panel, curves=tuple(replace(c, label=name) for c, name in zip(panel.curves, names)))


def _relation(target: Target, relation: Relation, found: Sequence[Entry], folder: Path) -> list[str]:
    selection = Selection(found, "end" if "end" in target.tags else target.tags[0])
    name = "numbers"
    points, table = scatter_figures.collect(selection, relation.x, relation.y, name)
    cells.write(table, folder)
    print(cells.markdown(table), end="")
    if points:
        print(save_figure(scatter_figures.draw(points, relation.x, relation.y), folder / name)[0])
    return [_of(target, str(problem)) for problem in table.problems]


def _table(target: Target, found: Sequence[Entry], folder: Path) -> list[str]:
    costs = Costs()
    table: Table
    if target.table == "factors":
        return _factors(target, Selection(found), folder)
    if target.table == "claims":
        table = claim_verdicts.table(claim_verdicts.judge(ReportRuns(Selection(found), costs)))
    else:
        table = headline_tables.build(str(target.table), Selection(found), costs)
    cells.write(table, folder)
    print(cells.markdown(table), end="")
    return [_of(target, str(problem)) for problem in table.problems]


def _factors(target: Target, selection: Selection, folder: Path) -> list[str]:
    made = factorial_tables.write_factorial_tables(selection, folder)
    for table in made.values():
        cells.write(table, folder)
        print(cells.markdown(table), end="\n")
    if picture := made["factors"].picture:
        print(picture)
    return [_of(target, str(problem)) for problem in made["factors"].problems]


def _of(target: Target, problem: str) -> str:
    kind, _, rest = problem.partition(": ")
    return f"{kind}: {target.name}: {rest}"
