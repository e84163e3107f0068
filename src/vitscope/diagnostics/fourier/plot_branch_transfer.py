"""Figure of the branch transfer: curves over frequency, contrast over depth, and its mean by kind."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from vitscope.diagnostics.fourier.branch_transfer import BranchTransferResult
from vitscope.plotting.depth_axis import shared_legend
from vitscope.plotting.style import KIND_COLORS, KIND_FORMATS


def branch_transfer(results: Mapping[str, BranchTransferResult]) -> Figure:
    """Draw, a row a model: each unit's transfer, its high-minus-low contrast over depth, and the mean by kind."""
    figure = Figure(figsize=(7.0, 2.5 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 3, squeeze=False, sharey="col", width_ratios=(1.0, 1.2, 0.6))
    for row, (name, result) in zip(axes, results.items()):
        _curves(row[0], result)
        _contrasts(row[1], result)
        _means(row[2], result)
        row[0].set_title(name if result.reference == "none" else f"{name} minus initial".strip(), loc="left")
    shared_legend(figure, axes[:, 1])
    return figure


def _curves(ax: Axes, result: BranchTransferResult) -> None:
    for kind, x, y in zip(result.kinds, result.normalized_frequency, result.transfer):
        ax.plot(x[1:], y[1:], color=to_rgba(KIND_COLORS[kind]), linewidth=0.8, alpha=0.8)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xlim(0, 1)
    ax.set_xlabel(r"frequency ($\times\pi$ rad/pixel)")
    ax.set_ylabel("log |out| / |in|")


def _contrasts(ax: Axes, result: BranchTransferResult) -> None:
    for kind in dict.fromkeys(result.kinds):
        at = np.array(result.kinds) == kind
        style = {"fmt": KIND_FORMATS[kind], "markersize": 3.5, "elinewidth": 0.8, "label": kind}
        ax.errorbar(result.depths[at], result.contrast[at], result.contrast_half_width[at], **style)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel("normalised depth of the unit")
    ax.set_ylabel("high minus low third")


def _means(ax: Axes, result: BranchTransferResult) -> None:
    low, high = result.kind_contrast - result.kind_low, result.kind_high - result.kind_contrast
    for i, kind in enumerate(result.kind_names):
        ends = [[low[i]], [high[i]]]
        ax.errorbar([i], result.kind_contrast[i : i + 1], ends, fmt=KIND_FORMATS[kind], markersize=4)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_xticks(range(len(result.kind_names)), result.kind_names)
    ax.set_xlim(-0.6, len(result.kind_names) - 0.4)
    ax.set_xlabel("mean by kind")
