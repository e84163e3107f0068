"""Similarity matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.cka.cka import CKAResult
from vitscope.diagnostics.cka.similarity import SimilarityResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas


def cka(results: Mapping[str, CKAResult], *, vmin: float = 0.0, vmax: float = 1.0, cmap: str = "magma") -> Figure:
    """Draw each similarity matrix, first layers at the lower left, with lines between stages (Fig 10a).

    Layers whose similarity is null are gray.

    Args:
        results: One panel each, by name.
        vmin: Similarity of the darkest color.
        vmax: Similarity of the brightest color.
        cmap: Name of the color map.
    """
    n = len(results)
    columns = min(n, 3)
    rows = -(-n // columns)
    canvas = new_canvas(COLUMN_WIDTH, 2.9) if columns == 1 else new_canvas(2.3 * columns, 2.5 * rows)
    axes = canvas.grid(rows, columns).flatten()
    image: AxesImage | None = None
    for ax, (name, result) in zip(axes, results.items()):
        image = ax.imshow(result.similarity.T, origin="lower", vmin=vmin, vmax=vmax, cmap=cmap, aspect="auto")
        ax.set_facecolor("0.6")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        _stages(ax, result.stages, result.other_stages)
        ax.set(
            title=name,
            xlabel="Layer",
            ylabel="Layer" if result.is_within_model else "Layer of the other model",
            box_aspect=1,
        )
    for ax in axes[n:]:
        ax.remove()
    if image is not None:
        canvas.colorbar(image, ax=list(axes[:n]), label="CKA similarity", shrink=0.8, extend="neither")
    return canvas.figure


#: labels of color bars, by measure
LABELS = {
    "procrustes": "Procrustes similarity",
    "mutual_knn": "Mutual k-NN (share)",
    "rsa": "RSA (Spearman)",
    "linear_regression": "Linear regression ($R^2$)",
    "cka": "CKA similarity",
}


def similarity(
    results: Mapping[str, SimilarityResult], *, minus_null: bool = False, vmax: float | None = None, cmap: str = "magma"
) -> Figure:
    """Draw a row of similarity matrices for each result and a column for each measure, with lines between stages.

    Results of a single measure stand in rows of three.

    Layers whose similarity is null are gray. Each measure has its own color bar, the same for all results, from 0: a similarity
    below 0, which is chance, has the color of 0.

    Args:
        results: Results by name.
        minus_null: Whether to draw the similarity minus its mean over permuted images.
        vmax: Similarity of the brightest color; None: 1, or the largest of a measure where it is below a half.
        cmap: Name of the color map.
    """
    measures = list(dict.fromkeys(name for result in results.values() for name in result.measures))
    n = len(results)
    is_single_measure = len(measures) == 1
    rows, columns = (-(-n // 3), min(n, 3)) if is_single_measure else (n, len(measures))
    canvas = new_canvas(COLUMN_WIDTH, 2.9) if rows * columns == 1 else new_canvas(0.5 + 2.3 * columns, 0.4 + 2.3 * rows)
    grid = canvas.grid(rows, columns)
    panels = grid.reshape(-1, 1) if is_single_measure else grid  # (n or more, n_measures)
    for column, measure in enumerate(measures):
        matrices = {name: _matrix(result, measure, minus_null) for name, result in results.items()}
        highest = vmax if vmax is not None else _highest(list(matrices.values()))
        image: AxesImage | None = None
        for index, (ax, (name, result)) in enumerate(zip(panels[:, column], results.items())):
            matrix = matrices[name]
            if matrix is None:
                ax.remove()
                continue
            image = ax.imshow(matrix.T, origin="lower", vmin=0, vmax=highest, cmap=cmap, aspect="auto")
            ax.set_facecolor("0.6")
            has_x_label, has_y_label = is_single_measure or index == n - 1, is_single_measure or column == 0
            _label(ax, name if column == 0 else "", result, measure, (has_x_label, has_y_label))
        if image is not None:
            label = LABELS.get(measure, measure) + (" minus null" if minus_null else "")
            own_panels = [ax for ax in panels[:n, column] if ax.figure is not None]
            canvas.colorbar(image, ax=own_panels, label=label, location="top", shrink=0.9, extend="neither")
    for ax in panels[n:].flat:
        ax.remove()
    return canvas.figure


def _matrix(result: SimilarityResult, measure: str, minus_null: bool) -> np.ndarray | None:
    if measure not in result.measures:
        return None
    index = result.measures.index(measure)
    return result.similarities[index] - (result.null_means[index] if minus_null else 0)


def _highest(matrices: list[np.ndarray | None]) -> float:
    values = [m[np.isfinite(m)].max(initial=0.0) for m in matrices if m is not None]
    largest = max(values, default=0.0)
    return largest if 0 < largest < 0.5 else 1.0


def _label(ax: Axes, title: str, result: SimilarityResult, measure: str, has_labels: tuple[bool, bool]) -> None:
    """Title a panel and label its axes: x where the first of ``has_labels`` is true, y where the second is or rows predict."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _stages(ax, result.stages, result.other_stages)
    ax.set(title=title, box_aspect=1)
    is_regression, within = measure == "linear_regression", result.is_within_model
    if has_labels[0]:
        ax.set_xlabel("Predicting layer" if is_regression else "Layer")
    if is_regression:
        ax.set_ylabel("Predicted layer" if within else "Predicted layer (other model)")
    elif has_labels[1]:
        ax.set_ylabel("Layer" if within else "Layer of the other model")


def _stages(ax: Axes, stages: np.ndarray, others: np.ndarray) -> None:
    for end in np.flatnonzero(np.diff(stages)):
        ax.axvline(end + 0.5, color="white", linewidth=0.6)
    for end in np.flatnonzero(np.diff(others)):
        ax.axhline(end + 0.5, color="white", linewidth=0.6)
