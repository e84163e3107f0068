"""Figures of oversmoothing: similarity of tokens and of attention over depth, and matrices of layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.tokens.oversmoothing import OversmoothingResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, shade_bands, shared_legend, start_at_zero
from vitscope.plotting.style import MARKERS

#: largest over smallest value from which the axis of residuals is logarithmic
_WIDE = 30.0


def oversmoothing(results: Mapping[str, OversmoothingResult], *, view: str = "depth") -> Figure:
    """Draw tokens and attention over depth, or a matrix of the similarity of layers' attention for each result.

    Args:
        results: Results by the name in the legend and the titles.
        view: ``depth``, or ``layers`` for the matrices.

    Raises:
        ValueError: An unknown view, or no attention for ``view="layers"``.
    """
    if view not in ("depth", "layers"):
        raise ValueError(f"Expected view to be one of depth, layers, received {view!r}.")
    attending = {name: result for name, result in results.items() if len(result.attention_units)}
    if view == "layers":
        return _matrices(attending)
    canvas = new_canvas(COLUMN_WIDTH, 0.5 + 1.5 * (4 if attending else 2))
    axes = canvas.grid(4 if attending else 2, 1, sharex=True)[:, 0]
    for index, (name, result) in enumerate(results.items()):
        _curve(axes[0], index, result.depths, result.cosine, result.cosine_half_width, name)
        _curve(axes[1], index, result.depths, result.rank1_residual, result.rank1_residual_half_width, name)
    _limits(axes[0])
    axes[0].set_ylabel("Mean cosine\nof tokens")
    axes[1].set_ylabel("Rank-1 residual")
    _log_where_wide(axes[1])
    if attending:
        for index, (name, result) in enumerate(results.items()):
            _attention(axes[2], axes[3], index, name, result)
        _limits(axes[2])
        _limits(axes[3])
        axes[2].set_ylabel("NMI of query\nand key")
        axes[3].set_ylabel("Cosine of\nattention")
    if len(results) == 1:
        (result,) = results.values()
        areas = result.map_sizes.prod(axis=1)
        for ax in axes[:2]:
            shade_bands(ax, result.depths, result.kinds, [False, *(areas[1:] < areas[:-1])])
    axes[-1].set(xlabel=DEPTH_LABEL, xlim=(-0.02, 1.02))
    shared_legend(canvas, axes)
    return canvas.figure


def _curve(ax: Axes, index: int, x: np.ndarray, y: np.ndarray, half_widths: np.ndarray, name: str) -> None:
    ax.errorbar(
        x,
        y,
        half_widths,
        marker=MARKERS[index % len(MARKERS)],
        markersize=3,
        elinewidth=0.8,
        color=result_color(index),
        label=name or None,
    )


def _attention(upper: Axes, lower: Axes, index: int, name: str, result: OversmoothingResult) -> None:
    """Draw mutual information, and the similarity of heads and of each unit with the unit before."""
    depths, color = result.attention_depths, result_color(index)
    _curve(upper, index, depths, result.nmi, result.nmi_half_width, name)
    for x, heads in zip(depths, result.head_nmi):
        upper.plot(
            np.full(len(heads), x), heads, ".", color=color, alpha=0.5, markersize=3.5, markeredgewidth=0, zorder=1
        )
    _curve(lower, index, depths, result.head_similarity, result.head_similarity_half_width, "")
    if len(depths):
        lower.lines[-1].set_label("_nolegend_")
        lower.plot([], [], "-", color="0.3", label="Pairs of heads")
        lower.plot([], [], ":", color="0.3", label="Layer and layer before")
        lower.plot(depths[1:], result.layer_similarity.diagonal(-1), ":", color=color, linewidth=1.2)


def _limits(ax: Axes) -> None:
    """Show the whole range from 0 to 1 where values fill a part of it, and negative ones where there are some."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if high > 0.3:
        ax.set_ylim(min(-0.03, low - 0.05), 1.03)


def _log_where_wide(ax: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.zeros(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > _WIDE * values.min():
        ax.set_yscale("log")
    else:
        start_at_zero(ax)


def _matrices(results: Mapping[str, OversmoothingResult]) -> Figure:
    if not results:
        raise ValueError("Expected a result with attention for view='layers', received none; pass view='depth'.")
    canvas = new_canvas(COLUMN_WIDTH * min(len(results), 2), 2.6 * -(-len(results) // 2))
    columns = min(len(results), 2)
    axes = canvas.grid(-(-len(results) // columns), columns)
    image = None
    for ax, (name, result) in zip(axes.flat, results.items()):
        image = ax.imshow(result.layer_similarity, vmin=0, vmax=1, origin="lower", interpolation="nearest")
        ax.set(title=name, xlabel="Attention unit", ylabel="Attention unit", facecolor="0.85")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
    for ax in axes.flat[len(results) :]:
        ax.remove()
    canvas.colorbar(image, ax=list(axes.flat[: len(results)]), label="Cosine of attention", shrink=0.8)
    return canvas.figure
