"""Attention maps over their images, and what they show by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from vitscope.diagnostics.attention.attention_maps import AttentionMapsResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, start_at_zero
from vitscope.plotting.text_fit import broken_names

#: width in inches of a page of two columns
_PAGE_WIDTH = 7.0
#: most rows of images, of one result and of several
_MOST_ROWS = (8, 4)
#: most layers of one result that are drawn
_MOST_LAYERS = 4
#: width in inches of a character of a title
_CHARACTER = 0.055
_COLORS = "inferno"
_OPACITY = 0.6


@dataclass(frozen=True)
class Column:
    """A column of maps: its title and a map (h, w) for each image."""

    title: str
    maps: np.ndarray


def attention_maps(
    results: Mapping[str, AttentionMapsResult],
    *,
    view: Literal["both", "maps", "numbers"] = "both",
    head: int | None = None,
) -> Figure:
    """Draw a row an image with maps over it, and below what all images show by depth.

    Colors are the attention of a position divided by the mean over positions of its map. Of one result up to four layers, evenly
    spaced in depth, and the rollouts are drawn; of several the last layer and the rollout of each, with their queries where these
    differ.

    Args:
        results: One or more results by name, of the same images.
        view: ``maps``, ``numbers`` or ``both``.
        head: The head of the maps; None for the mean over heads.

    Raises:
        ValueError: An unknown view, a head that a drawn layer does not have, or no kept images.
    """
    if view not in ("both", "maps", "numbers"):
        raise ValueError(f"Expected view to be 'both', 'maps' or 'numbers', received {view!r}.")
    if not any(result.units for result in results.values()):
        return _without_attention(results)
    panels = _number_panels(results)
    if view == "numbers":
        canvas = new_canvas(2.3 * len(panels), 2.3)
        _draw_numbers(canvas, list(canvas.grid(1, len(panels))[0]), results, panels)
        return canvas.figure
    columns = _columns(results, head)
    images = next(iter(results.values())).images
    n_rows = min(len(images), _MOST_ROWS[len(results) > 1])
    if not n_rows:
        raise ValueError("Expected results with maps of images, received none; pass images=8 to attention_maps.")
    n_columns = 1 + len(columns)
    side = min(1.2, _PAGE_WIDTH / n_columns)
    heights = [side * n_rows + 0.55, 2.1]
    has_numbers = view == "both"
    canvas = new_canvas(max(side * n_columns + 0.9, 4.4), sum(heights) if has_numbers else heights[0])
    parts = canvas.stacked([n_rows * n_columns, len(panels)], heights) if has_numbers else [canvas]
    width = canvas.figure.get_figwidth() / (n_columns + 1)
    _draw_maps(parts[0], parts[0].grid(n_rows, n_columns), images, columns, width)
    if has_numbers:
        _draw_numbers(parts[1], list(parts[1].grid(1, len(panels))[0]), results, panels)
    return canvas.figure


def _without_attention(results: Mapping[str, AttentionMapsResult]) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH, 0.4 + 0.2 * len(results))
    ax = canvas.grid(1, 1)[0, 0]
    ax.set_axis_off()
    text = "\n".join(
        f"{name}: no attention that can be read" if name else "No attention that can be read" for name in results
    )
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
    return canvas.figure


def _columns(results: Mapping[str, AttentionMapsResult], head: int | None) -> list[Column]:
    if len(results) == 1:
        return _columns_of_one(next(iter(results.values())), head)
    return _columns_of_several({name: result for name, result in results.items() if result.units}, head, len(results))


def _columns_of_one(result: AttentionMapsResult, head: int | None) -> list[Column]:
    """Return layers spread over the depth, and the rollouts."""
    layers = np.unique(np.linspace(0, len(result.units) - 1, _MOST_LAYERS).round().astype(int))
    columns = [Column(result.units[layer], _of_head(result, int(layer), head)) for layer in layers]
    if result.rollout is not None:
        columns.append(Column("Rollout", result.rollout))
    if result.gradient_rollout is not None:
        columns.append(Column("Rollout\nof gradients", result.gradient_rollout))
    return columns


def _columns_of_several(results: Mapping[str, AttentionMapsResult], head: int | None, n_results: int) -> list[Column]:
    """Return the last layer and the rollout of each result; of more than three results the rollout alone, where there is one."""
    columns: list[Column] = []
    has_one_query = len({result.query for result in results.values()}) == 1
    for name, result in results.items():
        query = "" if has_one_query else f"\nquery: {result.query}"
        if n_results <= 3 or result.rollout is None:
            columns.append(Column(f"{name}\n{result.units[-1]}{query}", _of_head(result, len(result.units) - 1, head)))
        if result.rollout is not None:
            columns.append(Column(f"{name}\nRollout{query}", result.rollout))
    return columns


def _of_head(result: AttentionMapsResult, layer: int, head: int | None) -> np.ndarray:
    maps = result.maps[layer]  # (n_shown, heads, h, w)
    if head is None:
        return maps.mean(axis=1)
    if not 0 <= head < maps.shape[1]:
        raise ValueError(
            f"Expected head in 0 .. {maps.shape[1] - 1} of {result.units[layer]!r}, received {head}; pass head=None."
        )
    return maps[:, head]


def _draw_maps(canvas: Canvas, grid: np.ndarray, images: np.ndarray, columns: Sequence[Column], width: float) -> None:
    """Draw rows of images and columns of maps; titles are broken to a ``width`` in inches."""
    n_rows = len(grid)
    relative = [_relative(column.maps[:n_rows]) for column in columns]
    values = np.concatenate([maps.ravel() for maps in relative])
    values = values[np.isfinite(values)]
    limit = max(2.0, float(np.percentile(values, 98))) if len(values) else 2.0
    norm = Normalize(0, limit)
    titles = ["Image", *(column.title for column in columns)]
    scale: AxesImage | None = None
    for row, axes in enumerate(grid):
        for number, ax in enumerate(axes):
            scale = _draw_image(ax, images[row], None if number == 0 else relative[number - 1][row], norm)
            if row == 0:
                ax.set_title(broken_names(titles[number], int(width / _CHARACTER)), fontsize="x-small")
    assert scale is not None
    canvas.colorbar(
        scale,
        ax=list(grid.flat),
        label="Attention / mean over positions",
        extend="max",
        shrink=min(1.0, 3 / n_rows),
        aspect=25,
    )


def _draw_image(ax: Axes, image: np.ndarray, values: np.ndarray | None, norm: Normalize) -> AxesImage:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if values is None:
        return ax.imshow(image, extent=extent)
    ax.imshow(image.mean(axis=-1), extent=extent, cmap="gray", vmin=0, vmax=255)
    return ax.imshow(values, extent=extent, cmap=_COLORS, norm=norm, alpha=_OPACITY, interpolation="nearest")


def _relative(maps: np.ndarray) -> np.ndarray:
    mean = maps.mean(axis=(1, 2), keepdims=True)
    return np.divide(maps, mean, out=np.full(maps.shape, np.nan), where=mean > 0)


@dataclass(frozen=True)
class NumberPanel:
    """A panel by depth: its label, and the fields of values by head, or by layer, and of their half widths."""

    label: str
    field: str
    by_head: bool


def _number_panels(results: Mapping[str, AttentionMapsResult]) -> list[NumberPanel]:
    panels = [
        NumberPanel("Share on prefix tokens", "sink_share", True),
        NumberPanel("Entropy / ln(keys)", "entropy", True),
        NumberPanel("IoU of masks", "head_iou", False),
        NumberPanel("IoU with objects", "mask_iou", True),
    ]
    return [panel for panel in panels if any(_has_values(result, panel) for result in results.values())]


def _has_values(result: AttentionMapsResult, panel: NumberPanel) -> bool:
    if panel.field == "head_iou" and len(result.units) > 1:  # of neighboring layers
        return True
    return any(bool(np.isfinite(values).any()) for values in getattr(result, panel.field))


def _draw_numbers(
    canvas: Canvas, axes: Sequence[Axes], results: Mapping[str, AttentionMapsResult], panels: Sequence[NumberPanel]
) -> None:
    handles: list[Any] = []
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        if len(results) > 1:
            handles.append(
                Line2D([], [], color=color, label=name if result.units else f"{name}: no attention that can be read")
            )
        if not result.units:
            continue
        for ax, panel in zip(axes, panels):
            if panel.by_head:
                _draw_heads(ax, result, panel.field, color)
            else:
                _draw_overlaps(ax, result, color)
    for ax, panel in zip(axes, panels):
        ax.set(xlabel=DEPTH_LABEL, xlim=(-0.04, 1.04))
        ax.set_ylabel(panel.label, fontsize="small")
        start_at_zero(ax, highest=1.03)
    if any(not panel.by_head for panel in panels):
        handles.append(Line2D([], [], color="0.3", marker="o", markersize=2.5, label="IoU of heads"))
        handles.append(
            Line2D([], [], color="0.3", linestyle="--", marker="s", markersize=2.5, label="of adjacent layers")
        )
    if handles:
        canvas.legend(handles, loc="outside lower center", ncols=5)


def _draw_heads(ax: Axes, result: AttentionMapsResult, field: str, color: str) -> None:
    """Draw each head as a point, their mean as a line and the mean of their half widths as bars."""
    values = [np.asarray(heads) for heads in getattr(result, field)]
    half_widths = [np.asarray(heads) for heads in getattr(result, f"{field}_half_width")]
    if field == "entropy":
        scales = [np.log(keys) if keys > 1 else np.nan for keys in result.n_keys]
        values = [heads / scale for heads, scale in zip(values, scales)]
        half_widths = [heads / scale for heads, scale in zip(half_widths, scales)]
    depths = result.depths
    for depth, heads, half_width in zip(depths, values, half_widths):
        is_finite = np.isfinite(half_width)
        ax.errorbar(
            np.full(is_finite.sum(), depth),
            heads[is_finite],
            half_width[is_finite],
            fmt="none",
            ecolor=color,
            elinewidth=0.6,
        )
    x = np.concatenate([np.full(len(heads), depth) for depth, heads in zip(depths, values)])
    ax.plot(x, np.concatenate(values), "o", color=color, markersize=2, alpha=0.5, markeredgewidth=0)
    ax.plot(depths, [heads.mean() for heads in values], "-", color=color)


def _draw_overlaps(ax: Axes, result: AttentionMapsResult, color: str) -> None:
    """Draw the overlap of heads at each layer, and of neighboring layers between them."""
    depths = result.depths
    for x, y, half_width, style in (
        (depths, result.head_iou, result.head_iou_half_width, "o-"),
        (
            (depths[1:] + depths[:-1]) / 2,
            np.diag(result.layer_iou, 1),
            np.diag(result.layer_iou_half_width, 1),
            "s--",
        ),
    ):
        if not len(x):
            continue
        ax.plot(x, y, style, color=color, markersize=2.5)
        is_finite = np.isfinite(half_width)
        ax.errorbar(x[is_finite], y[is_finite], half_width[is_finite], fmt="none", ecolor=color, elinewidth=0.6)
