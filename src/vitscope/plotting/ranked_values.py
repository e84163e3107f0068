"""Figures of values by their rank, such as the largest eigenvalues of several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def ranked_values(results: Mapping[str, Any], label: str) -> Figure:
    """Draw ``.eigenvalues`` of each result by rank, with ``.residuals`` as bars; ``label`` names the vertical axis."""
    figure = sized_figure(results)
    axes = figure.subplots()
    for name, result in results.items():
        ranks = np.arange(1, len(result.eigenvalues) + 1)
        axes.errorbar(ranks, result.eigenvalues, yerr=result.residuals, fmt="o", elinewidth=0.8, label=name)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Rank by magnitude")
    axes.set_ylabel(label)
    add_legend(figure, results)
    return figure


def sized_figure(results: Mapping[str, Any]) -> Figure:
    """Return a figure of one column's width with space for a legend of all results."""
    return Figure(figsize=(3.4, 2.1 + 0.14 * len(results)))


def add_legend(figure: Figure, results: Mapping[str, Any]) -> None:
    """Add a legend above the axes, where results have names."""
    if any(results):
        figure.legend(loc="outside upper left", ncols=2)
