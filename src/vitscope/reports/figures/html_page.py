"""Write `report.html`, one file that opens without a network: tables, claims, figures with their cards, a comparison of runs."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from plotly.offline import get_plotlyjs

from vitscope import __version__
from vitscope.config.experiment_identity import experiment
from vitscope.core.objective_card import shown_value
from vitscope.reports import run_listing
from vitscope.reports.claims.claim_verdicts import NOT_MEASURED, ClaimVerdict, effect_text
from vitscope.reports.figures import figure_captions
from vitscope.reports.figures.figure_captions import DrawnPanel
from vitscope.reports.figures.figure_plan import Curve
from vitscope.reports.figures.microscope import microscope
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables import factorial_tables
from vitscope.reports.tables.table import Cell, Problem, Table
from vitscope.reports.value_lookup import Selection
from vitscope.runs import result_store
from vitscope.runtime import atomic_write
from vitscope.runtime.errors import StorageError
from vitscope.runtime.text_layout import count_text

#: resolution of figures on the page (CSS pixels per inch) and in their files (dots per inch)
SHOWN_DPI, SAVED_DPI = 116, 300

#: pixels of the widest picture on the page: a screen shows no more; the files keep all
WIDEST = 2200

#: pictures up to this width have their text beside them
NARROW = 480

#: curves over training that the comparison offers, in this order, and metrics of its table
CURVES = ("val/accuracy", "val/nll", "val/loss", "train/loss", "train/accuracy")
METRICS = ("test/accuracy", "test/nll", "test/ece", "test/brier", "val/accuracy", "val/nll", "train/loss")

#: provenance that stands under each figure, beside the compared keys of the card
PROVENANCE = ("input_shape", "seed", "epoch", "checkpoint", "solver", "versions")

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class PageFigure:
    """A figure as the template shows it.

    Attributes:
        drawn: The panel and its files.
        picture: The PNG as a data address; empty where there is none.
        width: Width in CSS pixels.
        height: Height in CSS pixels.
        shared: The card's values that all curves share.
        differing: The card's keys in which they differ.
        cards: ``(label, run, {key: value})`` of each curve: what differs and the provenance.
        heads: Headings of the table of numbers over seeds.
        numbers: Rows of that table.
    """

    drawn: DrawnPanel
    picture: str
    width: int
    height: int
    shared: Mapping[str, Any]
    differing: Sequence[str]
    cards: Sequence[tuple[str, str, Mapping[str, Any]]]
    heads: Sequence[str]
    numbers: Sequence[Sequence[Cell]]

    @property
    def narrow(self) -> bool:
        """Whether text fits beside the picture."""
        return 0 < self.width <= NARROW


def write(
    path: Path,
    entries: Sequence[Entry],
    tables: Mapping[str, Table],
    judged: Sequence[ClaimVerdict],
    drawn: Sequence[DrawnPanel],
    problems: Sequence[Problem],
) -> Path:
    """Write the page; return its path.

    Raises:
        StorageError: The folder cannot be written.
    """
    sections: dict[str, list[PageFigure]] = {}
    for figure in drawn:
        sections.setdefault(figure.panel.analysis, []).append(_page_figure(figure))
    compared = comparison(entries)
    looked_at = microscope(drawn)
    interactive = any(figure.picture.interactive for figure in drawn) or any(run["curves"] for run in compared["runs"])
    counting = [entry for entry in entries if not entry.superseded]
    html = _template().render(
        title="vitscope report",
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        counts=_counts(counting),
        headline=tables["models"],
        tables=[
            (t, *(_embedded(t.picture) if t.picture else ("", 0, 0)))
            for name, t in tables.items()
            if name not in ("models", "claims") and _says_something(t)
        ],
        judged=judged,
        claims_note=tables["claims"].note,
        measured=sum(j.verdict != NOT_MEASURED for j in judged),
        said=effect_text,
        sections=sections,
        microscope=looked_at,
        microscope_images=_script_json(looked_at.images if looked_at else []),
        microscope_pictures=_script_json(looked_at.pictures() if looked_at else []),
        problems=problems,
        entries=entries,
        compared=_script_json(compared),
        plotly=get_plotlyjs() if interactive else "",
        css=(TEMPLATES / "report.css").read_text(),
        js=(TEMPLATES / "report.js").read_text(),
    )
    atomic_write.write_atomically(path, html.encode())
    return path


def comparison(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return what the page needs to compare runs: differing configuration, last metrics, thinned curves."""
    facts = {entry.id: {**experiment(entry.config, entry.facts), "seed": entry.seed} for entry in entries}
    keys = dict.fromkeys(key for fact in facts.values() for key in fact)
    varying = [key for key in keys if len({json.dumps(fact.get(key), default=str) for fact in facts.values()}) > 1]
    return {
        "runs": [
            {
                "id": entry.id,
                "label": entry.label,
                "seed": entry.seed,
                "config": {key: facts[entry.id].get(key) for key in varying},
                "metrics": {name: entry.metrics[name] for name in METRICS if name in entry.metrics},
                "curves": {name: _rounded(entry.curves[name]) for name in CURVES if name in entry.curves},
            }
            for entry in entries
        ],
        "keys": varying,
        "metrics": list(METRICS),
        "curves": [name for name in CURVES if any(name in entry.curves for entry in entries)],
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fact"] = _fact
    environment.filters["metric"] = _metric
    environment.filters["state"] = _state
    environment.filters["anchor"] = anchor
    environment.filters["script_json"] = lambda text: text.replace("<", r"\u003c").replace("\u2028", r"\u2028")
    return environment.get_template("report.html.j2")


def anchor(text: str) -> str:
    """Return an id for a name: letters, digits and dashes."""
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text).strip("-").lower()


def _page_figure(drawn: DrawnPanel) -> PageFigure:
    picture, width, height = "", 0, 0
    if drawn.picture.png is not None:
        picture, width, height = _embedded(drawn.picture.png)
    curves = drawn.panel.curves
    shared, differing = figure_captions.shared_conditions(curves) if curves else ({}, [])
    heads, numbers = figure_captions.numbers_over_seeds(drawn.panel)
    cards = [(curve.label, curve.entry.id, _card(curve, differing)) for curve in curves]
    return PageFigure(drawn, picture, width, height, shared, differing, cards, heads, numbers)


def _embedded(png: Path) -> tuple[str, int, int]:
    """Return a picture as a data address, and the size to show it at."""
    content = png.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        width, height = (round(side * SHOWN_DPI / SAVED_DPI) for side in image.size)
        if image.width > WIDEST:
            image.thumbnail((WIDEST, image.height))
            smaller = io.BytesIO()
            image.save(smaller, "png")
            content = smaller.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode(), width, height


def _card(curve: Curve, differing: Sequence[str]) -> dict[str, Any]:
    card = curve.measured.card
    if card is None:
        return {}
    compared = card.conditions()
    return {key: shown_value(compared, key) for key in differing} | {key: getattr(card, key) for key in PROVENANCE}


def _counts(entries: Sequence[Entry]) -> str:
    numbers = (len(entries), len({e.group for e in entries}), len({e.data_name for e in entries}))
    words = ("run", "experiment", "data set")
    return ", ".join(map(count_text, numbers, words))


def _says_something(table: Table) -> bool:
    """Whether a table adds something to the headline one: another row of a comparison, or a measure."""
    if table.name == "buildup":
        return len(table.rows) > 1
    if table.name in factorial_tables.NAMES:
        return bool(table.rows)
    measures = [i for i, key in enumerate(table.ids) if "/" in key and not key.startswith("test/")]
    return any(row[i].interval for row in table.rows for i in measures)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value)) or "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None or value == "" else str(value)


def _metric(entry: Entry, name: str) -> str:
    """Return a metric of a run; of one that was not trained here that of its newest `vs.evaluation` of the split."""
    value = Selection([entry], or_newest=True).metric(entry, name).number
    return "–" if value is None else f"{value:z.3f}"


def _state(entry: Entry) -> str:
    """Return the state of a run; of one whose process was killed ``stopped``, although its provenance says ``running``."""
    try:
        return run_listing.state(entry)
    except StorageError:  # its lock is no regular file
        return entry.status


def _rounded(curve: tuple[list[float], list[float]]) -> list[list[float]]:
    xs, ys = curve
    return [xs, [float(f"{y:.5g}") for y in ys]]


def _script_json(value: Any) -> str:
    return json.dumps(result_store.finite(value), separators=(",", ":"), default=str)
