"""Figures over the depth of a model: bands behind attention and pooling, points by kind, one legend beside the panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from vitscope.plotting.canvas import Canvas, kind_color
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS

#: color and label of the bands: gray behind attention, blue behind pooling and subsampling, as in the paper
BANDS = {"msa": ("0.85", "MSA block"), "pool": ("#cfe3f5", "Pooling, subsampling")}

#: label of the horizontal axis: 0 at the first tap, 1 at the last
DEPTH_LABEL = "Normalized depth"


def shade_bands(
    ax: Axes, depths: np.ndarray, kinds: Sequence[str], subsampled: Sequence[bool] | np.ndarray, *, labels: bool = True
) -> None:
    """Shade from the tap before to the tap after each attention, pooling or subsampling.

    Args:
        ax: Axes with depth as x.
        depths: (n_taps,) of the taps.
        kinds: (n_taps) of the taps.
        subsampled: (n_taps,) whether the map of a tap is smaller than that of the tap before.
        labels: Whether the bands have an entry in the legend.
    """
    for i in range(1, len(depths)):
        kind = "pool" if subsampled[i] else kinds[i]
        if kind in BANDS:
            color, label = BANDS[kind]
            span = ax.axvspan(depths[i - 1], depths[i], color=color, linewidth=0, zorder=0)
            if labels:
                span.set_label(label)


def points_by_kind(
    ax: Axes, depths: np.ndarray, kinds: Sequence[str], values: np.ndarray, half_widths: np.ndarray
) -> None:
    """Draw finite values over depth with their intervals, in the marker and color of each kind.

    Args:
        ax: Axes with depth as x.
        depths: (n_taps,) of the taps.
        kinds: (n_taps) of the taps.
        values: (n_taps,) NaN for taps without a value.
        half_widths: (n_taps,) half the interval of each value.
    """
    for kind in dict.fromkeys(kinds):
        taps = np.flatnonzero((np.array(kinds) == kind) & np.isfinite(values))
        if len(taps):
            ax.errorbar(
                depths[taps],
                values[taps],
                half_widths[taps],
                marker=KIND_MARKERS[kind],
                color=kind_color(kind),
                linestyle="none",
                markersize=3.5,
                elinewidth=0.8,
                label=KIND_LABELS[kind],
                zorder=3,
            )


def start_at_zero(ax: Axes, highest: float = np.inf) -> None:
    """Let the vertical axis go from 0 to 8 % above the largest drawn value.

    Matplotlib's own margin is a share of the range of the values, which leaves points at the upper edge where all are alike.

    Args:
        ax: Axes whose curves and intervals are drawn.
        highest: Upper end of the axis at most.
    """
    top = ax.dataLim.y1
    ax.set_ylim(0, min(highest, 1.08 * top) if np.isfinite(top) and top > 0 else min(highest, 1.0))


def shared_legend(canvas: Canvas, axes: Iterable[Axes]) -> None:
    """Put one legend below the panels, each label once."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        # handles of errorbar: a line of four short entries at most fits under one column
        columns = min(len(handles), 4 if canvas.figure.get_figwidth() < 5 else 8)
        canvas.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
