"""Similarity matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.cka.cka import CKAResult


def cka(results: Mapping[str, CKAResult], *, vmin: float = 0.0, vmax: float = 1.0) -> Figure:
    """Draw each similarity matrix, first layers at the lower left, with lines between stages (Fig 10a).

    Layers whose similarity is null are grey.

    Args:
        results: one panel each, by name.
        vmin: similarity of the darkest colour.
        vmax: similarity of the brightest colour.
    """
    n = len(results)
    columns = min(n, 3)
    rows = -(-n // columns)
    figure = Figure(
        figsize=(3.4 if columns == 1 else 2.3 * columns, 2.9 if columns == 1 else 2.5 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image: AxesImage | None = None
    for ax, (name, result) in zip(axes, results.items()):
        image = ax.imshow(result.similarity.T, origin="lower", vmin=vmin, vmax=vmax, cmap="magma", aspect="auto")
        ax.set_facecolor("0.6")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        _stages(ax, result.stages, result.other_stages)
        within = result.taps == result.other_taps
        ax.set(title=name, xlabel="Layer", ylabel="Layer" if within else "Layer of the other model", box_aspect=1)
    for ax in axes[n:]:
        ax.remove()
    if image is not None:
        figure.colorbar(image, ax=list(axes[:n]), label="CKA", shrink=0.8, extend="neither")
    return figure


def _stages(ax: Axes, stages: np.ndarray, others: np.ndarray) -> None:
    for end in np.flatnonzero(np.diff(stages)):
        ax.axvline(end + 0.5, color="white", linewidth=0.6)
    for end in np.flatnonzero(np.diff(others)):
        ax.axhline(end + 0.5, color="white", linewidth=0.6)
