"""Figures of docs/findings.md: the statistics of one claim, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.plotting.api import STYLE
from vitscope.reports.claims.claim_verdicts import ClaimVerdict, StatisticResult
from vitscope.reports.figures import claims_figure
from vitscope.stats.t_tests import Interval, t_interval

#: color and marker of a network's own row below the statistic that is a mean over networks
_NETWORK = ("0.55", "d")


@dataclass(frozen=True)
class _Row:
    """A row of a panel: a statistic, or below it one of the networks that it is a mean over."""

    name: str
    values: Sequence[float]
    interval: Interval
    sign: int
    color: str
    marker: str
    is_network: bool = False

    def drawn_values(self) -> list[float]:
        """Return what the row shows: values of seeds, and the ends of the interval."""
        below, above = self.interval.bars
        return [*self.values, self.interval.mean - below, self.interval.mean + above]


def draw_claim(verdict: ClaimVerdict, data: Sequence[str], verdict_text: str) -> Figure | None:
    """Draw the statistics of a claim, one panel for each unit: seeds as dots, the mean with its 95 % t-interval.

    The networks that a statistic is a mean over have rows of their own below it. The side of zero that the claim predicts is
    shaded. Colors and markers, as in the figure of all claims, are the verdicts of the statistics alone. None where nothing was
    measured.
    """
    findings = [f for f in verdict.findings if f.interval is not None]
    units = list(dict.fromkeys(f.part.unit for f in findings))
    if not findings:
        return None
    by_unit = [[row for f in findings if f.part.unit == unit for row in _rows(f)] for unit in units]
    counts = [len(rows) for rows in by_unit]
    with style.context(STYLE):
        figure = Figure(figsize=(6.6, 1.25 + 0.55 * len(units) + 0.26 * sum(counts)), layout="constrained")
        panels = figure.subplots(len(units), squeeze=False, height_ratios=[n + 0.4 for n in counts])[:, 0]
        for axes, unit, rows in zip(panels, units, by_unit):
            reach = max(abs(value) for row in rows for value in row.drawn_values()) * 1.12 or 1.0
            for place, row in enumerate(rows):
                _draw_row(axes, place, row, reach)
            axes.axvline(0, color="0.3", linewidth=0.7)
            axes.set(
                xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5), xlabel=f"effect ({unit}); gray: the claimed side"
            )
            axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=6.5)
            for label, row in zip(axes.get_yticklabels(), rows):
                label.set(color="0.4" if row.is_network else "black", fontsize=6 if row.is_network else 6.5)
            axes.tick_params(axis="y", length=0)
        conditions = ", ".join((*data, claims_figure.seeds_text([verdict])))
        figure.suptitle(f"{verdict.claim.statement}: {verdict_text}\n{conditions}", fontsize=8)
        _add_legend(figure, panels[0], findings, any(row.is_network for rows in by_unit for row in rows))
    return figure


def _add_legend(figure: Figure, axes: Axes, findings: Sequence[StatisticResult], has_networks: bool) -> None:
    """State what markers, colors and bars are."""
    verdicts = [name for name in claims_figure.LOOKS if any(f.verdict == name for f in findings)]
    looks = {f"{name} alone": claims_figure.LOOKS[name] for name in verdicts}
    looks |= {"one network of the mean": _NETWORK} if has_networks else {}
    handles = [
        axes.plot([], [], marker, color=color, markersize=4, label=name)[0] for name, (color, marker) in looks.items()
    ]
    figure.legend(
        handles=handles, title="large: mean with 95 % t-interval over seeds; small: seeds", title_fontsize=6.5, fontsize=6.5,
        loc="outside lower center", ncols=len(handles),
    )  # fmt: skip


def _rows(finding: StatisticResult) -> list[_Row]:
    assert finding.interval is not None
    sign, look = finding.part.sign, claims_figure.LOOKS[finding.verdict]
    rows = [_Row(finding.part.name, list(finding.effect.values.values()), finding.interval, sign, *look)]
    for name, values_by_seed in finding.effect.parts:
        if " − " not in name:  # pairs have names of a line and more; the page lists their means
            values = list(values_by_seed.values())
            rows.append(_Row(name, values, t_interval(values), sign, *_NETWORK, is_network=True))
    return rows


def _draw_row(axes: Axes, place: int, row: _Row, reach: float) -> None:
    axes.fill_betweenx([place - 0.5, place + 0.5], 0, row.sign * reach, color="0.93", linewidth=0, zorder=0)
    axes.plot(row.values, [place] * len(row.values), ".", color=row.color, alpha=0.5, markersize=4)
    bars = np.array(row.interval.bars)[:, None]  # (2, 1)
    size, width = (3.2, 1.0) if row.is_network else (4.5, 1.3)
    axes.errorbar(
        row.interval.mean, place, xerr=bars, fmt=row.marker, color=row.color, markersize=size, linewidth=width
    )
