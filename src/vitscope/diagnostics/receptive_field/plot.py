"""Figures of effective receptive fields: fields of several models on one scale, of all taps, and radii over depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from vitscope.diagnostics.receptive_field.effective_receptive_field import EffectiveReceptiveFieldResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, start_at_zero
from vitscope.plotting.style import MARKERS
from vitscope.plotting.text_fit import broken_names

#: decades below the largest value that the colors show
DECADES = 4

#: decades of changes on either side of 0
CHANGE_DECADES = 2

FIELD_LABEL = "Contribution (flat field = 1)"

#: panels side by side
COLUMNS = 4

#: line style of each radius, in the order of ``radius_shares``
STYLES = ("-", "--", ":")

VIEWS = ("last", "taps", "depth")


def effective_receptive_field(results: Mapping[str, EffectiveReceptiveFieldResult], *, view: str = "last") -> Figure:
    """Draw the fields on one color scale and one scale of pixels, with the radii of 50, 90 and 99 %, or the radii over depth.

    Args:
        results: Results by the name in the title or legend.
        view: ``last``, the last tap of each model, below it the trained minus the initial field where one was measured;
            ``taps``, a row a model with all of its taps; ``depth``, the radii over depth.

    Raises:
        ValueError: An unknown view.
    """
    if view not in VIEWS:
        raise ValueError(f"Expected view to be one of {', '.join(VIEWS)}, received {view!r}.")
    if view == "depth":
        return _over_depth(results)
    if view == "taps":
        return _all_taps(results)
    return _last_taps(results)


def _last_taps(results: Mapping[str, EffectiveReceptiveFieldResult]) -> Figure:
    changes = {name: result for name, result in results.items() if result.reference == "initial"}
    n_columns = -(-len(results) // -(-len(results) // COLUMNS))  # rows of equal lengths
    n_rows, n_change_rows = -(-len(results) // n_columns), -(-len(changes) // n_columns)
    width = max(COLUMN_WIDTH, 0.9 + 1.55 * n_columns)
    canvas = new_canvas(width, 0.6 + (2.0 if n_columns > 1 else 2.8) * (n_rows + n_change_rows))
    axes = canvas.grid(n_rows + n_change_rows, n_columns)
    fields = [_relative(result, result.field[-1]) for result in results.values()]
    colors = _common_colors(fields)
    panels = list(axes[:n_rows].flat)
    for ax, (name, result) in zip(panels, results.items()):
        _draw_field(ax, result, _relative(result, result.field[-1]), len(result.taps) - 1, colors, "white")
        ax.set_title(f"{name}\n".lstrip("\n") + _radius_text(result, len(result.taps) - 1))
    _finish(panels, len(results), n_columns)
    canvas.colorbar(colors, ax=panels, label=FIELD_LABEL, extend=_extension(colors, fields), pad=0.02, shrink=0.9)
    if changes:
        _draw_changes(canvas, list(axes[n_rows:].flat), n_columns, changes)
    _circle_legend(canvas, next(iter(results.values())))
    return canvas.figure


def _draw_changes(
    canvas: Canvas, panels: list[Axes], n_columns: int, results: Mapping[str, EffectiveReceptiveFieldResult]
) -> None:
    differences = [_relative(result, result.field[-1] - result.initial_field[-1]) for result in results.values()]
    largest = max(_largest(np.abs(difference)) for difference in differences) or 1.0
    norm = SymLogNorm(largest / 10**CHANGE_DECADES, vmin=-largest, vmax=largest, linscale=1.0)
    colors = ScalarMappable(norm, "RdBu_r")
    for ax, difference, (name, result) in zip(panels, differences, results.items()):
        _draw_field(ax, result, difference, len(result.taps) - 1, colors, "0.15")
        ax.set_title(f"{name}\ntrained − initial" if name else "Trained − initial")
    _finish(panels, len(results), n_columns)
    power = 10.0 ** np.floor(np.log10(largest))
    ticks = [-power, -power / 10, 0, power / 10, power]
    canvas.colorbar(colors, ax=panels, label="Change (flat field = 1)", ticks=ticks, pad=0.02, shrink=0.9)


def _all_taps(results: Mapping[str, EffectiveReceptiveFieldResult]) -> Figure:
    most = max(len(result.taps) for result in results.values())
    n_columns, n_rows_each = min(most, 6), -(-most // 6)
    canvas = new_canvas(max(COLUMN_WIDTH, 0.9 + 1.35 * n_columns), 0.6 + 2.1 * n_rows_each * len(results))
    axes = canvas.grid(n_rows_each * len(results), n_columns)
    fields = [_relative(result, field) for result in results.values() for field in result.field]
    colors = _common_colors(fields)
    for row, (name, result) in enumerate(results.items()):
        panels = list(axes[row * n_rows_each : (row + 1) * n_rows_each].flat)
        for i, (ax, tap) in enumerate(zip(panels, result.taps)):
            _draw_field(ax, result, _relative(result, result.field[i]), i, colors, "white")
            text = broken_names(tap, 16)
            ax.set_title(f"{name}\n{text}" if name and i == 0 else text, fontsize="small")
        _finish(panels, len(result.taps), n_columns)
    length = min(1.0, 2.0 / len(axes))
    canvas.colorbar(
        colors, ax=list(axes.flat), label=FIELD_LABEL, extend=_extension(colors, fields), pad=0.02, shrink=length
    )
    _circle_legend(canvas, next(iter(results.values())))
    return canvas.figure


def _relative(result: EffectiveReceptiveFieldResult, field: np.ndarray) -> np.ndarray:
    """Return a field as multiples of a flat one, so that images of different sizes share a color scale."""
    return field * field.size


def _common_colors(fields: list[np.ndarray]) -> ScalarMappable:
    largest = max(map(_largest, fields)) or 1.0
    return ScalarMappable(LogNorm(largest / 10**DECADES, largest, clip=True), rcParams["image.cmap"])


def _extension(colors: ScalarMappable, fields: list[np.ndarray]) -> str:
    """Return the end of the color bar that has an arrow: the lower one where pixels lie below the scale."""
    lowest = float(cast(Normalize, colors.norm).vmin or 0.0)
    has_lower = any(bool((field < lowest).any()) for field in fields)
    return "min" if has_lower else "neither"


def _largest(field: np.ndarray) -> float:
    return float(np.nanmax(field)) if np.isfinite(field).any() else 0.0


def _draw_field(
    ax: Axes, result: EffectiveReceptiveFieldResult, field: np.ndarray, i: int, colors: ScalarMappable, line: str
) -> None:
    """Draw a field with the circles of the radii; pixels are counted from the center of the image."""
    height, width = field.shape
    norm = cast(Normalize, colors.norm)
    if isinstance(norm, LogNorm):
        field = np.maximum(field, float(norm.vmin or 0.0))  # a logarithm of 0 has no color
    ax.imshow(
        field,
        norm=norm,
        cmap=colors.cmap,
        extent=(-width / 2, width / 2, height / 2, -height / 2),
        rasterized=True,
    )
    row, column = result.centers[i] + 0.5 - np.array([height, width]) / 2
    for radius, style in zip(_radii(result, i), STYLES):
        if np.isfinite(radius):
            circle = Circle((column, row), radius, fill=False, linestyle=style, linewidth=0.9, color=line)
            circle.set_clip_on(True)
            ax.add_patch(circle)
    ax.set(xlim=(-width / 2, width / 2), ylim=(height / 2, -height / 2))


def _radii(result: EffectiveReceptiveFieldResult, i: int) -> list[float]:
    return [float(radius[i]) for radius in (result.radius_50, result.radius_90, result.radius_99)]


def _radius_text(result: EffectiveReceptiveFieldResult, i: int) -> str:
    radius, half_width = float(result.radius_50[i]), float(result.radius_half_width[i, 0])
    if not np.isfinite(radius):
        return "null"
    digits = 1
    if np.isfinite(half_width) and 0 < half_width < 0.05:  # would be written as 0.0
        digits = min(3, int(np.ceil(-np.log10(half_width))))
    return (
        f"$r_{{50}}$ = {radius:.{digits}f}" + (f" ± {half_width:.{digits}f}" if np.isfinite(half_width) else "") + " px"
    )


def _finish(panels: list[Axes], n_used: int, n_columns: int) -> None:
    """Label the outer axes and empty the panels without a field."""
    for k, ax in enumerate(panels):
        if k >= n_used:
            ax.axis("off")  # keeps its place, unlike one that is invisible
            continue
        if k + n_columns >= n_used:
            ax.set_xlabel("Pixels")
        if k % n_columns == 0:
            ax.set_ylabel("Pixels")
        else:
            ax.tick_params(labelleft=False)


def _circle_legend(canvas: Canvas, result: EffectiveReceptiveFieldResult) -> None:
    handles = [Line2D([], [], color="0.3", linestyle=style, linewidth=0.9) for style in STYLES]
    labels = [f"{100 * share:.0f} % of the field" for share in result.radius_shares]
    canvas.legend(handles, labels, loc="outside lower center", ncols=3)


def _over_depth(results: Mapping[str, EffectiveReceptiveFieldResult]) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH, 2.5 + 0.2 * -(-(len(results) + len(STYLES)) // 3))
    ax = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3, "color": result_color(index)}
        radii = (result.radius_50, result.radius_90, result.radius_99)
        for j, (radius, line) in enumerate(zip(radii, STYLES)):
            label = (name or None) if j == 0 else None
            ax.errorbar(result.depths, radius, result.radius_half_width[:, j], linestyle=line, label=label, **style)
    ax.set(xlim=(-0.02, 1.02), xlabel=DEPTH_LABEL, ylabel="Radius of a share (pixels)")
    start_at_zero(ax)
    shares = next(iter(results.values())).radius_shares
    handles, labels = ax.get_legend_handles_labels() if any(results) else ([], [])
    handles += [Line2D([], [], color="0.3", linestyle=style, linewidth=0.9) for style in STYLES]
    canvas.legend(
        handles, [*labels, *(f"{100 * share:.0f} %" for share in shares)], loc="outside lower center", ncols=3
    )
    return canvas.figure
