"""Figure of the diagonal of a curvature matrix by parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.diagonal.hessian_diagonal import HessianDiagonalResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS


def hessian_diagonal(results: Mapping[str, HessianDiagonalResult]) -> Figure:
    """Draw the mean entry of each tensor with the range of nine tenths of its entries, by depth; a row a result.

    Args:
        results: Results by name.
    """
    canvas = new_canvas(1.3 * COLUMN_WIDTH, 0.8 + 1.7 * len(results))
    axes = canvas.grid(len(results), 1)[:, 0]
    for ax, (name, result) in zip(axes, results.items()):
        index = np.arange(len(result.parameters))
        for kind in dict.fromkeys(result.kinds):
            is_of_kind = np.array(result.kinds) == kind
            ax.vlines(
                index[is_of_kind],
                *result.quantiles[is_of_kind][:, [0, 2]].T,
                color=kind_color(kind),
                linewidth=1,
                alpha=0.6,
            )
            ax.plot(
                index[is_of_kind], result.mean[is_of_kind], KIND_MARKERS.get(kind, "."), color=kind_color(kind), markersize=3,
                label=KIND_LABELS.get(kind, kind),
            )  # fmt: skip
        ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        largest = np.nanmax(np.abs(result.mean), initial=0.0)
        if largest > 0:
            ax.set_yscale("symlog", linthresh=10.0 ** (np.floor(np.log10(largest)) - 2))
        noise = f"single entries {100 * result.noise_share:.0f}% noise" if result.noise_share > 0 else ""
        ax.set_title(", ".join(filter(None, (name, noise))))
        ax.set_ylabel("Diagonal entry")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].set_xlabel("Tensor of parameters, by depth")
    canvas.legend(loc="outside upper left", ncols=6)
    return canvas.figure
