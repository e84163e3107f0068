"""Figure of principal components of patch features: images above the colors of their patches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.patch_pca.patch_pca import PatchPcaResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas
from vitscope.plotting.text_fit import broken_names

#: inches, side of a panel and width of the texts left of the rows
_PANEL, _TEXT = 0.8, 1.0

#: gray of patches without a color
_NULL = 0.8


def patch_pca(results: Mapping[str, PatchPcaResult], *, images: int = 8) -> Figure:
    """Draw the first images, below them a row of colors for each model and tap.

    Beside each row stand the shares of variance of its three components, which are red, green and blue. Colors of two rows mean
    the same only where one was aligned to the other.

    Args:
        results: Results by the name beside the rows.
        images: Largest number of images to show, of those that the results show.

    Raises:
        ValueError: Fewer than one image.
    """
    if images < 1:
        raise ValueError(f"Expected images of at least 1, received {images}.")
    rows = [(name, result, i) for name, result in results.items() for i in range(len(result.taps))]
    first = next(iter(results.values()))
    n_columns = min(images, max(len(result.colors) for result in results.values()))
    n_image_rows = 1 if len(first.images) else 0
    canvas = new_canvas(max(COLUMN_WIDTH, _TEXT + _PANEL * n_columns), 0.2 + _PANEL * (n_image_rows + len(rows)))
    axes = canvas.grid(n_image_rows + len(rows), n_columns)
    for row in axes[:n_image_rows]:
        _draw_row(row, first.images, "Images")
    for panels, (name, result, i) in zip(axes[n_image_rows:], rows):
        _draw_row(
            panels, np.where(np.isnan(result.tap_colors[i]), _NULL, result.tap_colors[i]), _row_text(name, result, i)
        )
    return canvas.figure


def _draw_row(panels: np.ndarray, pictures: np.ndarray, text: str) -> None:
    for ax, picture in zip(panels, pictures):
        ax.imshow(picture, interpolation="nearest")
    for ax in panels:
        _hide_frame(ax)
    panels[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize="small")


def _hide_frame(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _row_text(name: str, result: PatchPcaResult, i: int) -> str:
    """Return the model's name, the tap where there are several, the shares of variance and the agreement with a reference."""
    lines = [broken_names(name, 18)] if name else []
    if len(result.taps) > 1 or not name:
        lines.append(broken_names(result.taps[i], 18))
    ratios = result.ratios[i]
    lines.append(", ".join(f"{100 * ratio:.0f}" for ratio in ratios) + " %" if np.isfinite(ratios).all() else "null")
    if np.isfinite(result.alignment_r2[i]):
        lines += ["aligned with", f"$r^2$ = {result.alignment_r2[i]:.2f}"]
    return "\n".join(lines)
