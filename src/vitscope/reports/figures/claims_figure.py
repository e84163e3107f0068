"""The figure of the claims: the effect of every statistic in standard deviations between seeds, and each claim's verdict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.plotting.api import STYLE
from vitscope.reports.claims.claim_verdicts import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_MEASURED,
    SUGGESTED,
    SUGGESTED_AGAINST,
    SUPPORTED,
    ClaimVerdict,
    StatisticResult,
)
from vitscope.runtime.text_layout import count_text

#: color and marker of each verdict, so that color is not all that tells them apart
LOOKS = {
    SUPPORTED: ("#009E73", "o"),
    SUGGESTED: ("#56B4E9", "D"),
    INCONCLUSIVE: ("0.45", "s"),
    SUGGESTED_AGAINST: ("#E69F00", "D"),
    CONTRADICTED: ("#D55E00", "X"),
}
#: the axis is linear up to so many standard deviations, logarithmic beyond
LINEAR = 2.0
#: inches of a row
ROW_HEIGHT = 0.155


def draw(judged: Sequence[ClaimVerdict], data: Sequence[str] = ()) -> Figure | None:
    """Draw a row for each measured statistic below its claim; None where nothing was measured.

    A point is the mean over seeds with its 95% t-interval, divided by the standard deviation between the seeds, positive where
    it has the sign that the claim predicts; small dots are the seeds.

    Args:
        judged: The verdicts.
        data: Names of the data sets, for the title.
    """
    if not any(_is_drawn(finding) for j in judged for finding in j.findings):
        return None
    n_rows = sum(1 + sum(map(_is_drawn, j.findings)) for j in judged)
    with style.context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + ROW_HEIGHT * n_rows))
        axes = figure.subplots()
        row, ticks = 0, []
        for j in judged:
            ticks.append((row, j.claim.statement))
            color = LOOKS.get(j.verdict, ("0.6", ""))[0]
            axes.text(
                1.01,
                row,
                j.verdict,
                color=color,
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=7,
                weight="bold",
            )
            axes.axhspan(row - 0.5, row + 0.5, color="0.93", linewidth=0, zorder=0)
            row += 1
            for finding in filter(_is_drawn, j.findings):
                _draw_statistic(axes, row, finding)
                ticks.append((row, finding.part.name))
                row += 1
        _label(axes, ticks, row, {j.claim.statement for j in judged})
        axes.set_title(f"Claims of the paper: {', '.join((*data, seeds_text(judged)))}")
        names = [name for name in LOOKS if any(f.verdict == name for j in judged for f in j.findings)]
        handles = [
            axes.plot([], [], LOOKS[name][1], color=LOOKS[name][0], markersize=4, label=name)[0] for name in names
        ]
        figure.legend(
            handles, names, title="each statistic alone, before the correction over claims", title_fontsize=7, fontsize=7,
            loc="outside lower center", ncols=len(names),
        )  # fmt: skip
    return figure


def seeds_text(judged: Sequence[ClaimVerdict]) -> str:
    """Return in words on how many seeds the measured statistics are, such as ``10 seeds`` or ``10 to 11 seeds``."""
    counts = sorted({f.interval.n for j in judged for f in j.findings if f.interval is not None})
    return count_text(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _is_drawn(finding: StatisticResult) -> bool:
    """Whether a statistic has a spread between seeds to be measured by."""
    return finding.verdict != NOT_MEASURED and finding.interval is not None and bool(finding.interval.half_width > 0)


def _draw_statistic(axes: Axes, row: int, finding: StatisticResult) -> None:
    assert finding.interval is not None
    values = finding.part.sign * np.array(list(finding.effect.values.values()))  # (seeds,)
    deviation = values.std(ddof=1)
    color, marker = LOOKS.get(finding.verdict, ("0.6", "|"))
    axes.plot(values / deviation, np.full(len(values), row), ".", color=color, alpha=0.35, markersize=2.5, zorder=2)
    half_width = finding.interval.half_width / deviation
    axes.errorbar(
        values.mean() / deviation, row, xerr=half_width, fmt=marker, color=color, markersize=4, linewidth=1, zorder=3
    )


def _label(axes: Axes, ticks: Sequence[tuple[int, str]], n_rows: int, statements: set[str]) -> None:
    axes.set_yticks([row for row, _ in ticks], [text for _, text in ticks], fontsize=6)
    for label in axes.get_yticklabels():
        if label.get_text() in statements:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(n_rows - 0.5, -0.5)
    axes.axvline(0.0, color="0.3", linewidth=0.7, zorder=1)
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.9)
    reach = max(3.0, *np.abs(axes.dataLim.intervalx)) * 1.3 if np.isfinite(axes.dataLim.intervalx).all() else 3.0
    axes.set_xlim(-reach, reach)
    places = [place for place in (1, 2, 5, 20, 100, 1000) if place <= reach]
    axes.set_xticks(
        [*(-p for p in reversed(places)), 0, *places], [*(f"−{p}" for p in reversed(places)), "0", *map(str, places)]
    )
    axes.minorticks_off()
    axes.set_xlabel(
        "effect in standard deviations between seeds (right of 0: as claimed)\n"
        "large: mean with 95 % t-interval over seeds; small: seeds", fontsize=7,
    )  # fmt: skip
