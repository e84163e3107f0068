"""Figures of values by their rank, such as the largest eigenvalues of several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.style import MARKERS


def ranked_values(results: Mapping[str, Any], label: str) -> Figure:
    """Draw ``.eigenvalues`` of each result by rank, with ``.residuals`` as bars; ``label`` names the vertical axis."""
    canvas = sized_canvas(results)
    axes = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        ranks = np.arange(1, len(result.eigenvalues) + 1)
        axes.errorbar(
            ranks,
            result.eigenvalues,
            yerr=result.residuals,
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            color=result_color(index),
            elinewidth=0.8,
            label=name or None,
        )
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Rank by magnitude")
    axes.set_ylabel(label)
    add_legend(canvas, results)
    return canvas.figure


def sized_canvas(results: Mapping[str, Any]) -> Canvas:
    """Return a canvas of one column's width with space for a legend of all results."""
    return new_canvas(COLUMN_WIDTH, 2.1 + 0.14 * len(results))


def add_legend(canvas: Canvas, results: Mapping[str, Any]) -> None:
    """Add a legend above the axes, where results have names."""
    if any(results):
        canvas.legend(loc="outside upper left", ncols=2)
