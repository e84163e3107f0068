"""Figure of the spectra of the Hessian's blocks: distances between them, and their size by depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.block_spectra._block_distances import DISJOINT
from vitscope.diagnostics.block_spectra.hessian_block_densities import HessianBlockDensitiesResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.depth_axis import shared_legend
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS

#: blocks up to which each has its name on the axis
MOST_NAMES = 16
#: characters of a name on the axis
LONGEST_NAME = 22


def hessian_block_densities(
    results: Mapping[str, HessianBlockDensitiesResult], *, vmax: float | None = None, cmap: str = "magma"
) -> Figure:
    """Draw the distance of each pair of blocks above each block's largest eigenvalue and trace; a column a result.

    Args:
        results: Results by name.
        vmax: Distance of the brightest color; None for the largest distance of all results.
        cmap: Name of the color map.
    """
    n = len(results)
    canvas = new_canvas(COLUMN_WIDTH * n if n > 1 else 1.15 * COLUMN_WIDTH, 5.4)
    axes = canvas.grid(2, n, height_ratios=[1.5, 1], sharey="row" if n == 1 else False)
    brightest = vmax or max(float(result.js_distance.max()) for result in results.values()) or DISJOINT
    image: AxesImage | None = None
    for column, (name, result) in zip(axes.T, results.items()):
        image = column[0].imshow(result.js_distance, origin="lower", vmin=0, vmax=brightest, cmap=cmap, aspect="equal")
        column[0].set_title("\n".join(filter(None, (name, _mean_text(result)))))
        _name_blocks(column[0], result)
        _draw_sizes(column[1], result)
    if image is not None:
        canvas.colorbar(image, ax=list(axes[0]), label="Jensen-Shannon distance (root of nats)", shrink=0.8)
    axes[1, 0].set_ylabel("Eigenvalue")
    low = min(ax.get_ylim()[0] for ax in axes[1])
    high = max(ax.get_ylim()[1] for ax in axes[1])
    for ax in axes[1]:
        ax.set_ylim(low, high)
    shared_legend(canvas, axes[1])
    return canvas.figure


def _mean_text(result: HessianBlockDensitiesResult) -> str:
    low, high = result.mean_js_interval
    interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
    noise = float(np.mean(result.js_noise))
    return f"mean {result.mean_js:.2f}{interval}" + (f", noise {noise:.2f}" if np.isfinite(noise) else "")


def _name_blocks(ax: Axes, result: HessianBlockDensitiesResult) -> None:
    """Name the blocks on the vertical axis where they are few; otherwise number them."""
    n = len(result.blocks)
    if n <= MOST_NAMES:
        names = [_shortened(name) for name in result.blocks]
        ax.set_yticks(range(n), names)
        ax.set_xticks(range(n), [""] * n)
    else:
        ax.set(xlabel="Block, by depth", ylabel="Block, by depth")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
    for label, kind in zip(ax.get_yticklabels(), result.kinds):
        if n <= MOST_NAMES and kind:
            label.set_color(kind_color(kind))


def _shortened(name: str) -> str:
    """Return the end of a long name, from one of its dots where there is one."""
    if len(name) <= LONGEST_NAME:
        return name
    end = name[-LONGEST_NAME:]
    return f"...{end.partition('.')[2] or end}"


def _draw_sizes(ax: Axes, result: HessianBlockDensitiesResult) -> None:
    """Draw each block's largest eigenvalue, filled, and its mean one, hollow; negative ones have no point."""
    index = np.arange(len(result.blocks))
    mean = result.trace / result.sizes
    half_width = result.trace_half_width / result.sizes
    for values, is_filled in ((result.largest, True), (mean, False)):
        ax.plot(index, np.where(values > 0, values, np.nan), color="0.7", linewidth=0.7, zorder=1)
        for kind in dict.fromkeys(result.kinds):
            is_drawn = (np.array(result.kinds) == kind) & (values > 0)
            color = kind_color(kind) if kind else "0.4"
            label = f"{KIND_LABELS.get(kind, 'Block')}, {'largest' if is_filled else 'mean'}"
            ax.errorbar(
                index[is_drawn], values[is_drawn], None if is_filled else np.nan_to_num(half_width[is_drawn]),
                marker=KIND_MARKERS.get(kind, "o"), color=color, markerfacecolor=color if is_filled else "white",
                linestyle="none", markersize=3.5, elinewidth=0.8, label=label,
            )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("Block, by depth")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
