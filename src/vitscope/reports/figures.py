"""Figures on disk: each panel drawn by its measure's room, with the numbers and the cards that belong to it."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscope.errors import StorageError
from vitscope.plotting import plot, save_figure
from vitscope.probe import COMPARED, ObjectiveCard
from vitscope.reports.cells import Cell, over_seeds
from vitscope.reports.panels import Curve, Panel
from vitscope.reports.selection import FAILED, MISSING, Value


@dataclass(frozen=True)
class Drawn:
    """A panel on disk.

    Attributes:
        panel: what is in it.
        png: the picture; None where it could not be drawn.
        pdf: the same for print.
        caption: what the measure is, in its module's words.
        interactive: a plotly figure as JSON, where the room has one.
        problem: why there is no picture.
        labels: of the curves in it.
    """

    panel: Panel
    png: Path | None
    pdf: Path | None
    caption: str
    interactive: str | None = None
    problem: str = ""
    labels: tuple[str, ...] = ()


def draw(panel: Panel, folder: Path, options: Mapping[str, Any] | None = None) -> Drawn:
    """Draw a panel as ``<name>.png`` and ``<name>.pdf``.

    Args:
        panel: what to draw.
        folder: where.
        options: of the room's plot function.

    Raises:
        StorageError: the folder cannot be written.
    """
    kept: list[Curve] = []
    loaded: dict[str, Any] = {}
    lost: list[str] = []
    for curve in panel.curves:
        try:
            loaded[curve.label] = curve.measured.load()
            kept.append(curve)
        except StorageError as error:
            lost.append(str(error))
    caption = _caption(panel.curves[0].measured.measure)
    panel = replace(panel, curves=tuple(kept), notice=" ".join([panel.notice, *lost]).strip())
    if not loaded:
        return Drawn(panel, None, None, caption, problem=" ".join(lost))
    named = loaded if len(loaded) > 1 or next(iter(loaded)) else {"": next(iter(loaded.values()))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a layout engine says of a crowded figure is no news to a reader
            png, pdf = save_figure(plot(named, allow_different=True, **dict(options or {})), folder / panel.name)
    except OSError as error:
        raise StorageError("out", folder, f"not writable ({error.strerror})", "free space or choose another") from None
    except Exception as error:  # one figure that cannot be drawn must not cost the report
        return Drawn(panel, None, None, caption, problem=f"not drawn: {type(error).__name__}: {_first_line(error)}")
    return Drawn(panel, png, pdf, caption, _interactive(named), labels=tuple(loaded))


def numbers(panel: Panel) -> tuple[list[str], list[list[Cell]]]:
    """Return the scalars of a panel's curves over their seeds: headings, and a row a scalar."""
    everyone = [((c.entry, c.measured), *c.others) for c in panel.curves]
    names = dict.fromkeys(name for curve in everyone for _, m in curve for name in m.scalars)
    rows = []
    for name in names:
        cells = [Cell(name)]
        for curve in everyone:
            values = {e.id: _value(m.scalars.get(name), name in m.scalars) for e, m in curve}
            cells.append(over_seeds(values, name, ".4g", len(curve))[0])
        rows.append(cells)
    return [c.label for c in panel.curves], rows


def common(curves: Sequence[Curve]) -> tuple[dict[str, Any], list[str]]:
    """Return the compared values that all cards share, and the keys in which they differ."""
    cards = [c.measured.card or ObjectiveCard() for c in curves]
    shared = {k: getattr(cards[0], k) for k in COMPARED if len({getattr(card, k) for card in cards}) == 1}
    return shared, [key for key in COMPARED if key not in shared]


def _value(number: float | None, there: bool) -> Value:
    return Value(number) if number is not None else Value(None, FAILED if there else MISSING)


def _caption(measure: str) -> str:
    import vitscope

    module = vitscope.measures().get(measure)
    text = inspect.getdoc(importlib.import_module(module)) if module else None
    return " ".join((text or measure).split("\n\n")[0].split())


def _interactive(named: Mapping[str, Any]) -> str | None:
    """Return the room's plotly figure of these results, where it offers one."""
    room, _, measure = type(next(iter(named.values()))).__module__.rpartition(".")
    make = getattr(importlib.import_module(f"{room}.plot"), f"plotly_{measure}", None)
    if make is None:
        return None
    try:
        figure = make(named)
        figure.update_layout(template="none")
        return figure.to_json()
    except Exception as error:
        warnings.warn(f"plotly_{measure}: {type(error).__name__}: {_first_line(error)}", stacklevel=2)
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
