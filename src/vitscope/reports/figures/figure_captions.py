"""A figure with what belongs to it: its panel, its caption, the numbers over seeds, the objective cards."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscope.core.objective_card import ObjectiveCard, differing_keys
from vitscope.reports.figures.figure_plan import Curve, Panel
from vitscope.reports.figures.figure_worker import Job, Picture
from vitscope.reports.tables.table import Cell, over_seeds
from vitscope.reports.value_lookup import FAILED, MISSING, Value


@dataclass(frozen=True)
class DrawnPanel:
    """A panel on disk.

    Attributes:
        panel: what is in it; results that could not be read are named in its notice.
        picture: the files.
        caption: what the measure is, in its module's words.
    """

    panel: Panel
    picture: Picture
    caption: str


def job(panel: Panel, folder: Path, options: Mapping[str, Any] | None = None, pdf: bool | None = None) -> Job:
    """Return what has to be drawn for a panel; ``pdf`` None leaves the PDF of overviews out."""
    files = {c.label: c.measured.path for c in panel.curves}
    return Job(folder / panel.name, files, dict(options or {}), not panel.overview if pdf is None else pdf)


def drawn(panel: Panel, picture: Picture) -> DrawnPanel:
    """Return a panel with its picture, without the curves that could not be read."""
    kept = tuple(c for c in panel.curves if c.label in picture.labels or not picture.labels)
    notice = " ".join([panel.notice, *picture.lost]).strip()
    return DrawnPanel(replace(panel, curves=kept, notice=notice), picture, _caption(panel.curves[0].measured.measure))


def numbers(panel: Panel) -> tuple[list[str], list[list[Cell]]]:
    """Return the scalars of a panel's curves over their seeds: headings, and a row a scalar."""
    everyone = [((c.entry, c.measured), *c.others) for c in panel.curves]
    names = dict.fromkeys(name for curve in everyone for _, m in curve for name in m.scalars)
    rows = []
    for name in names:
        cells = [Cell(name)]
        for curve in everyone:
            if not any(name in m.scalars for _, m in curve):
                cells.append(Cell("–"))  # such as a kind of unit that the model does not have
                continue
            values = {e.id: _value(m.scalars.get(name), name in m.scalars) for e, m in curve}
            cells.append(over_seeds(values, name, ".4g", len(curve))[0])
        rows.append(cells)
    return [c.label for c in panel.curves], rows


def common(curves: Sequence[Curve]) -> tuple[dict[str, Any], list[str]]:
    """Return the compared values that all cards share, and the keys in which they differ."""
    stated = [(c.measured.card or ObjectiveCard()).conditions() for c in curves]
    differing = differing_keys(stated)
    first = {key: value for key, value in stated[0].items() if all(key in other for other in stated)}
    return {key: value for key, value in first.items() if key not in differing}, differing


def _value(number: float | None, there: bool) -> Value:
    return Value(number) if number is not None else Value(None, FAILED if there else MISSING)


def _caption(measure: str) -> str:
    import vitscope

    module = vitscope.measures().get(measure)
    text = inspect.getdoc(importlib.import_module(module)) if module else None
    return " ".join((text or measure).split("\n\n")[0].replace("`", "").split())
