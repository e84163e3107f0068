"""Captions of figures, tables of numbers over seeds below them, and the objective cards that their curves share."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscope.core.objective_card import ObjectiveCard, differing_keys
from vitscope.plotting.style import KIND_COLORS
from vitscope.reports.figures.figure_plan import Curve, Panel
from vitscope.reports.figures.figure_worker import Job, Picture
from vitscope.reports.tables.table import Cell, over_seeds
from vitscope.reports.value_lookup import FAILED, MISSING, Value


@dataclass(frozen=True)
class DrawnPanel:
    """A panel on disk.

    Attributes:
        panel: Planned content; its notice names results that could not be read.
        picture: Files of the figure.
        caption: Definition of the measure, from its module's docstring.
    """

    panel: Panel
    picture: Picture
    caption: str


def drawing_job(
    panel: Panel,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    pdf: bool | None = None,
    colors: Mapping[str, str] | None = None,
) -> Job:
    """Return the job that draws a panel.

    Args:
        panel: The panel.
        folder: Folder of the figure's files.
        options: Options of the measure's figure.
        pdf: Whether to write a PDF; None for all panels but overviews.
        colors: Colors by name in the legend or by kind of unit; names that the panel does not have are passed over.
    """
    files = {c.label: c.measured.path for c in panel.curves}
    own_colors = {name: color for name, color in (colors or {}).items() if name in files or name in KIND_COLORS}
    if own_colors:
        options = {**(options or {}), "colors": own_colors}
    is_printed = not panel.overview if pdf is None else pdf
    return Job(folder / panel.name, files, dict(options or {}), is_printed, seed_note(panel.curves))


def seed_note(curves: Sequence[Curve]) -> str:
    """Return which seed a figure shows where curves have several; empty where none has.

    A figure of arrays shows one result of each name; the means over seeds with their intervals are in the table below it.
    """
    seeds = {
        curve.label: f"seed {curve.entry.seed} of {len(curve.others) + 1} seeds" for curve in curves if curve.others
    }
    if not seeds:
        return ""
    if len(seeds) == len(curves) and len(set(seeds.values())) == 1:
        return f"shown: {next(iter(seeds.values()))}"
    return "shown: " + "; ".join(f"{label}: {words}" for label, words in seeds.items())


def with_picture(panel: Panel, picture: Picture) -> DrawnPanel:
    """Return a panel with its picture, without the curves that could not be read."""
    readable_curves = tuple(c for c in panel.curves if c.label in picture.labels or not picture.labels)
    notice = " ".join([panel.notice, *picture.lost]).strip()
    return DrawnPanel(
        replace(panel, curves=readable_curves, notice=notice), picture, _caption(panel.curves[0].measured.measure)
    )


def numbers_over_seeds(panel: Panel) -> tuple[list[str], list[list[Cell]]]:
    """Return the scalars of a panel's curves over their seeds: headings, and a row a scalar."""
    results_by_curve = [((c.entry, c.measured), *c.others) for c in panel.curves]
    names = dict.fromkeys(name for curve in results_by_curve for _, m in curve for name in m.scalars)
    rows = []
    for name in names:
        cells = [Cell(name)]
        for curve in results_by_curve:
            if not any(name in m.scalars for _, m in curve):
                cells.append(Cell("–"))  # such as a kind of unit that the model does not have
                continue
            values = {e.id: _value(m.scalars.get(name), name in m.scalars) for e, m in curve}
            cells.append(over_seeds(values, name, ".4g", len(curve))[0])
        rows.append(cells)
    return [c.label for c in panel.curves], rows


def shared_conditions(curves: Sequence[Curve]) -> tuple[dict[str, Any], list[str]]:
    """Return the compared values that all cards share, and the keys in which they differ."""
    conditions = [(c.measured.card or ObjectiveCard()).conditions() for c in curves]
    differing = differing_keys(conditions)
    first = {key: value for key, value in conditions[0].items() if all(key in other for other in conditions)}
    return {key: value for key, value in first.items() if key not in differing}, differing


def _value(number: float | None, is_recorded: bool) -> Value:
    if number is not None:
        return Value(number)
    return Value(None, FAILED if is_recorded else MISSING)


def _caption(measure: str) -> str:
    import vitscope

    module = vitscope.measures().get(measure)
    text = inspect.getdoc(importlib.import_module(module)) if module else None
    return " ".join((text or measure).split("\n\n")[0].replace("`", "").split())
