"""Figure of the taps: how large and how deep in channels the maps are along a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.taps.tap_table import TapTableResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.depth_axis import shared_legend
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS


def tap_table(results: Mapping[str, TapTableResult]) -> Figure:
    """Draw the side and the channels of each tap's map over its index, a column a model."""
    canvas = new_canvas(COLUMN_WIDTH * len(results), 3.6)
    axes = canvas.grid(2, len(results), sharex="col", sharey="row")
    for column, (name, result) in zip(axes.T, results.items()):
        index = np.arange(len(result.taps))
        side = np.sqrt(result.shapes[:, 1] * result.shapes[:, 2])
        for ax, values in zip(column, (side, result.shapes[:, 0])):
            ax.plot(index, values, color="0.6", linewidth=0.8, zorder=1)
            for kind in dict.fromkeys(result.kinds):
                at = np.array(result.kinds) == kind
                ax.plot(
                    index[at],
                    values[at],
                    KIND_MARKERS[kind],
                    color=kind_color(kind),
                    markersize=3.5,
                    label=KIND_LABELS[kind],
                )
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:g}")
        column[0].set_title(name)
        column[1].set_xlabel("Tap, in the order of the forward pass")
    axes[0, 0].set_ylabel("Map side (positions)")
    axes[1, 0].set_ylabel("Channels")
    shared_legend(canvas, axes[0])
    return canvas.figure
