"""Figure of the taps and units: how large the maps and how many the parameters are along a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.taps.tap_table import BRANCHES, TapTableResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.depth_axis import shared_legend
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS


def tap_table(results: Mapping[str, TapTableResult]) -> Figure:
    """Draw the side and the channels of each tap's map and the parameters of each unit by index, a column a model.

    Hollow points are units that add to no residual stream.

    Args:
        results: One or more results by name.
    """
    has_units = any(len(result.units) for result in results.values())
    n_rows = 3 if has_units else 2
    canvas = new_canvas(COLUMN_WIDTH * len(results), 1.8 * n_rows)
    axes = canvas.grid(n_rows, len(results), sharex=False, sharey="row")
    for column, (name, result) in zip(axes.T, results.items()):
        side = np.sqrt(result.shapes[:, 1] * result.shapes[:, 2])
        _draw_by_kind(column[0], result.kinds, side)
        _draw_by_kind(column[1], result.kinds, result.shapes[:, 0])
        column[0].set_title(name)
        column[1].sharex(column[0])
        column[0].tick_params(labelbottom=False)
        column[1].set_xlabel("Tap, in the order of the forward pass")
        if has_units:
            is_residual = np.array([branch != BRANCHES[2] for branch in result.unit_branches], dtype=bool)
            _draw_by_kind(column[2], result.unit_kinds, result.unit_parameters, is_residual)
            column[2].set_xlabel("Unit, in the order of the forward pass")
    axes[0, 0].set_ylabel("Map side (positions)")
    axes[1, 0].set_ylabel("Channels")
    if has_units:
        axes[2, 0].set_ylabel("Parameters of the unit")
    for ax in axes[:2].flat:
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes[2:].flat:
        ax.set_yscale("log")
    shared_legend(canvas, axes.flat)
    return canvas.figure


def _draw_by_kind(ax: Axes, kinds: Sequence[str], values: np.ndarray, filled: np.ndarray | None = None) -> None:
    """Draw values over their index, a line through all and a marker of each one's kind, hollow where not ``filled``."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    index = np.arange(len(values))
    values = np.where(np.asarray(values) > 0, values, np.nan)  # no logarithm: a unit without parameters
    filled = np.ones(len(values), dtype=bool) if filled is None else filled
    ax.plot(index, values, color="0.6", linewidth=0.8, zorder=1)
    for kind in dict.fromkeys(kinds):
        is_of_kind = np.array(kinds) == kind
        color = kind_color(kind)
        for is_drawn, face in ((is_of_kind & filled, color), (is_of_kind & ~filled, "none")):
            if not is_drawn.any():
                continue
            label = KIND_LABELS[kind] if face == color else None
            ax.plot(
                index[is_drawn], values[is_drawn], KIND_MARKERS[kind], color=color, markerfacecolor=face, markersize=3.5,
                label=label,
            )  # fmt: skip
