"""Figures of docs/findings.md: the statistics of one claim, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.plotting.api import STYLE
from vitscope.reports.claims.claim_verdicts import ClaimVerdict, StatisticResult
from vitscope.reports.figures import claims_figure

#: colors of what a statistic alone says, as in the figure of all claims
_COLORS = {name: color for name, (color, _) in claims_figure.LOOKS.items()}


def draw_claim(verdict: ClaimVerdict, data: Sequence[str], verdict_text: str) -> Figure | None:
    """Draw the statistics of a claim, one panel for each unit: seeds as dots, the mean with its 95 % t-interval.

    The side of zero that the claim predicts is shaded. None where nothing was measured.
    """
    findings = [f for f in verdict.findings if f.interval is not None]
    units = list(dict.fromkeys(f.part.unit for f in findings))
    if not findings:
        return None
    by_unit = [[f for f in findings if f.part.unit == unit] for unit in units]
    rows = [len(group) for group in by_unit]
    with style.context(STYLE):
        figure = Figure(figsize=(6.6, 0.75 + 0.55 * len(units) + 0.26 * sum(rows)), layout="constrained")
        panels = figure.subplots(len(units), squeeze=False, height_ratios=[n + 0.4 for n in rows])[:, 0]
        for axes, unit, group in zip(panels, units, by_unit):
            reach = max(abs(value) for f in group for value in _drawn_values(f)) * 1.12 or 1.0
            for row, finding in enumerate(group):
                _draw_statistic(axes, row, finding, reach)
            axes.axvline(0, color="0.3", linewidth=0.7)
            axes.set(
                xlim=(-reach, reach), ylim=(len(group) - 0.5, -0.5), xlabel=f"effect ({unit}); gray: the claimed side"
            )
            axes.set_yticks(range(len(group)), [f.part.name for f in group], fontsize=6.5)
            axes.tick_params(axis="y", length=0)
        figure.suptitle(f"{verdict.claim.statement}: {verdict_text} ({', '.join(data)})", fontsize=8)
    return figure


def _drawn_values(finding: StatisticResult) -> list[float]:
    assert finding.interval is not None
    below, above = finding.interval.bars
    return [*finding.effect.values.values(), finding.interval.mean - below, finding.interval.mean + above]


def _draw_statistic(axes: Axes, row: int, finding: StatisticResult, reach: float) -> None:
    assert finding.interval is not None
    values = list(finding.effect.values.values())  # one a seed
    color = _COLORS.get(finding.verdict, "0.5")
    axes.fill_betweenx([row - 0.5, row + 0.5], 0, finding.part.sign * reach, color="0.93", linewidth=0, zorder=0)
    axes.plot(values, [row] * len(values), ".", color=color, alpha=0.5, markersize=4)
    bars = np.array(finding.interval.bars)[:, None]  # (2, 1)
    axes.errorbar(finding.interval.mean, row, xerr=bars, fmt="o", color=color, markersize=4.5, linewidth=1.3)
