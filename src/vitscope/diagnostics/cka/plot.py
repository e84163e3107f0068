"""Similarity matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.cka.cka import CKAResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas


def cka(results: Mapping[str, CKAResult], *, vmin: float = 0.0, vmax: float = 1.0, cmap: str = "magma") -> Figure:
    """Draw each similarity matrix, first layers at the lower left, with lines between stages (Fig 10a).

    Layers whose similarity is null are grey.

    Args:
        results: one panel each, by name.
        vmin: similarity of the darkest color.
        vmax: similarity of the brightest color.
        cmap: name of the color map.
    """
    n = len(results)
    columns = min(n, 3)
    rows = -(-n // columns)
    canvas = new_canvas(COLUMN_WIDTH if columns == 1 else 2.3 * columns, 2.9 if columns == 1 else 2.5 * rows)
    axes = canvas.grid(rows, columns).flatten()
    image: AxesImage | None = None
    for ax, (name, result) in zip(axes, results.items()):
        image = ax.imshow(result.similarity.T, origin="lower", vmin=vmin, vmax=vmax, cmap=cmap, aspect="auto")
        ax.set_facecolor("0.6")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        _stages(ax, result.stages, result.other_stages)
        within = result.taps == result.other_taps
        ax.set(title=name, xlabel="Layer", ylabel="Layer" if within else "Layer of the other model", box_aspect=1)
    for ax in axes[n:]:
        ax.remove()
    if image is not None:
        canvas.colorbar(image, ax=list(axes[:n]), label="CKA similarity", shrink=0.8, extend="neither")
    return canvas.figure


def _stages(ax: Axes, stages: np.ndarray, others: np.ndarray) -> None:
    for end in np.flatnonzero(np.diff(stages)):
        ax.axvline(end + 0.5, color="white", linewidth=0.6)
    for end in np.flatnonzero(np.diff(others)):
        ax.axhline(end + 0.5, color="white", linewidth=0.6)
