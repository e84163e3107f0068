"""Figure of the branch transfer: curves over frequency, contrast over depth, and its mean by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.fourier.branch_transfer import BranchTransferResult
from vitscope.plotting.canvas import kind_color, new_canvas
from vitscope.plotting.depth_axis import shared_legend
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS


def branch_transfer(results: Mapping[str, BranchTransferResult]) -> Figure:
    """Draw, a row a model: each unit's transfer, its high-minus-low contrast over depth, and the mean by kind."""
    canvas = new_canvas(7.0, 2.5 * len(results))
    axes = canvas.grid(len(results), 3, sharey="col", width_ratios=(1.0, 1.2, 0.6))
    for row, (name, result) in zip(axes, results.items()):
        _curves(row[0], result)
        _contrasts(row[1], result)
        _means(row[2], result)
        row[0].set_title(_title(name, result), loc="left")
    shared_legend(canvas, axes[:, 1])
    return canvas.figure


def _curves(ax: Axes, result: BranchTransferResult) -> None:
    for kind, x, y in zip(result.kinds, result.normalized_frequency, result.transfer):
        ax.plot(x[1:], y[1:], color=kind_color(kind), linewidth=0.8, alpha=0.8)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xlim(0, 1)
    ax.set_xlabel(r"Frequency ($\times\pi$ rad/pixel)")
    ax.set_ylabel("ln(|branch output| / |input|)")


def _contrasts(ax: Axes, result: BranchTransferResult) -> None:
    for kind in dict.fromkeys(result.kinds):
        is_of_kind = np.array(result.kinds) == kind
        ax.errorbar(
            result.depths[is_of_kind],
            result.contrast[is_of_kind],
            result.contrast_half_width[is_of_kind],
            **_format(kind),
            markersize=3.5,
            elinewidth=0.8,
            label=KIND_LABELS[kind],
        )
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("Normalized depth of the unit")
    ax.set_ylabel("High minus low third (nats)")


def _means(ax: Axes, result: BranchTransferResult) -> None:
    low, high = result.kind_contrast - result.kind_low, result.kind_high - result.kind_contrast
    for i, kind in enumerate(result.kind_names):
        ends = [[low[i]], [high[i]]]
        ax.errorbar([i], result.kind_contrast[i : i + 1], ends, **_format(kind), markersize=4)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xticks(range(len(result.kind_names)), [KIND_LABELS[kind] for kind in result.kind_names])
    ax.set_xlim(-0.6, len(result.kind_names) - 0.4)
    ax.set_xlabel("Mean by kind")


def _format(kind: str) -> dict[str, Any]:
    return {"marker": KIND_MARKERS[kind], "color": kind_color(kind), "linestyle": "none"}


def _title(name: str, result: BranchTransferResult) -> str:
    if result.reference == "none":
        return name
    return f"{name}, minus initialization" if name else "Minus initialization"
