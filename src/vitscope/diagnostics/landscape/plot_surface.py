"""Figures of surfaces: in three dimensions, as contours, and interactive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from plotly.subplots import make_subplots

from vitscope.diagnostics.landscape.loss_landscape import LossLandscapeResult
from vitscope.plotting.canvas import COLUMN_WIDTH, RECTILINEAR, Canvas, new_canvas
from vitscope.plotting.loss_label import loss_label

LABELS = {
    "nll": "NLL (nats)",
    "l2_half_sq": "½ wd Σ‖w‖² (nats)",
    "l2_sum_norm": "wd Σ‖w‖ (nats)",
    "nll+l2_half_sq": "NLL + ½ wd Σ‖w‖² (nats)",
    "nll+l2_sum_norm": "NLL + wd Σ‖w‖ (nats)",
    "accuracy": "Accuracy",
    "ece": "ECE",
}

#: inches
HEIGHTS = {"surface": 2.6, "contour": 2.6}

#: a surface that spans more than this ratio is drawn on a logarithmic scale
LOG_RATIO = 20.0


def loss_landscape(
    results: Mapping[str, LossLandscapeResult], *, value: str | None = None, kind: str = "both", log: bool | None = None
) -> Figure:
    """Draw each surface in three dimensions and as contours, one column a result, on one scale.

    A star marks the lowest point of the grid, a cross the model. Points that are not finite are holes in the surface
    and hatched red in the contours, and are counted in the title. Checkpoints (``pca``) are drawn as a path, with the
    largest projection error in the title.

    Args:
        results: Results by the name shown above each column.
        value: ``nll``, ``l2_half_sq``, ``l2_sum_norm``, ``nll+l2_half_sq``, ``nll+l2_sum_norm``, ``accuracy`` or ``ece``;
            by default the official surface for the official preset, else ``nll``.
        kind: ``surface``, ``contour`` or ``both``.
        log: A logarithmic scale; by default for surfaces that span more than a ratio of 20.

    Raises:
        ValueError: An unknown value or kind.
    """
    value = _value(results, value)
    if kind not in ("surface", "contour", "both"):
        raise ValueError(f"Expected kind to be surface, contour or both, received {kind!r}.")
    grids = {name: grid(result, value) for name, result in results.items()}
    scale = _scale(list(grids.values()), log)
    kinds = ["surface", "contour"] if kind == "both" else [kind]
    heights = [HEIGHTS[k] for k in kinds]
    canvas = new_canvas(COLUMN_WIDTH * len(results), sum(heights))
    projections = [["3d" if k == "surface" else RECTILINEAR] * len(results) for k in kinds]
    cells = canvas.grid(len(kinds), len(results), projections=projections, height_ratios=heights)
    for column, (name, result) in zip(cells.T, results.items()):
        for axes, k in zip(column, kinds):
            if k == "surface":
                _surface(axes, result, grids[name], scale, value)
            else:
                _contours(canvas, axes, result, grids[name], scale, value)
        column[0].set_title("\n".join(filter(None, [_title(name, result), column[0].get_title()])))
    return canvas.figure


def plotly_loss_landscape(results: Mapping[str, LossLandscapeResult], *, value: str | None = None) -> go.Figure:
    """Return the interactive surfaces, one scene a result, with a menu of the measured values.

    Args:
        results: Results by the name shown above each scene.
        value: Field that is shown first; see `loss_landscape`.

    Raises:
        ValueError: An unknown value.
    """
    first = _value(results, value)
    figure = make_subplots(
        rows=1,
        cols=len(results),
        specs=[[{"type": "surface"}] * len(results)],
        subplot_titles=[_title(name, result).replace("\n", "<br>") for name, result in results.items()],
    )
    for column, result in enumerate(results.values(), start=1):
        surface = go.Surface(
            x=result.x, y=result.y, z=_heights(result, first), colorscale="Viridis", coloraxis="coloraxis",
            hovertemplate="x %{x:.3g}<br>y %{y:.3g}<br>%{z:.4g}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(surface, row=1, col=column)
        figure.add_trace(_broken(result, first), row=1, col=column)
    scenes = ["scene" if column == 1 else f"scene{column}" for column in range(1, len(results) + 1)]
    menu = []
    for key, text in LABELS.items():
        label = loss_label(text, results.values())
        layout = {f"{scene}.zaxis.title.text": label for scene in scenes}
        restyle = {"z": [z for r in results.values() for z in (_heights(r, key), _broken(r, key).z)]}
        menu.append({"label": label, "method": "update", "args": [restyle, layout]})
    height = loss_label(LABELS[first], results.values())
    figure.update_scenes({"xaxis.title": "x (direction 1)", "yaxis.title": "y (direction 2)", "zaxis.title": height})
    figure.update_layout(
        updatemenus=[{"buttons": menu, "active": list(LABELS).index(first), "x": 0, "y": 1.15, "xanchor": "left"}],
        coloraxis={"colorscale": "Viridis"},
        height=560,
        margin={"l": 0, "r": 0, "t": 90, "b": 0},
    )
    return figure


def _heights(result: LossLandscapeResult, value: str) -> np.ndarray:
    z = grid(result, value).T  # plotly wants (y, x)
    return np.where(np.isfinite(z), z, np.nan)


def _broken(result: LossLandscapeResult, value: str) -> go.Scatter3d:
    """Return crosses at the surface's foot, where a point is not finite."""
    heights = grid(result, value)
    places = np.argwhere(~np.isfinite(heights))
    foot = heights[np.isfinite(heights)].min(initial=np.inf)
    foot = foot if np.isfinite(foot) else 0.0
    return go.Scatter3d(
        x=result.x[places[:, 0]], y=result.y[places[:, 1]], z=np.full(len(places), foot), mode="markers",
        marker={"symbol": "x", "size": 3, "color": "#D55E00"}, showlegend=False,
        hovertemplate="x %{x:.3g}<br>y %{y:.3g}<br>not finite<extra></extra>",
    )  # fmt: skip


def grid(result: LossLandscapeResult, value: str) -> np.ndarray:
    """Return the named surface (n, n), sums of fields joined by ``+``."""
    return sum((getattr(result, part) for part in value.split("+")), np.zeros_like(result.nll))


def _value(results: Mapping[str, LossLandscapeResult], value: str | None) -> str:
    if value is None:
        return "nll+l2_sum_norm" if all(r.preset == "official" for r in results.values()) else "nll"
    if value not in LABELS:
        raise ValueError(f"Expected value to be one of {', '.join(LABELS)}, received {value!r}.")
    return value


def _title(name: str, result: LossLandscapeResult) -> str:
    lines = [name] if name else []
    if result.n_nonfinite:
        lines.append(f"{result.n_nonfinite} of {result.nll.size} points not finite")
    if len(result.projection_error):
        lines.append(f"checkpoints up to {result.projection_error.max():.0%} of their distance off the plane")
    return "\n".join(lines)


def _scale(grids: list[np.ndarray], log: bool | None = None) -> Normalize:
    """Return one color scale for all grids: logarithmic where they span a large ratio, unless the caller decides."""
    finite = np.concatenate([g[np.isfinite(g)] for g in grids])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if low > 0 and high > low and (high / low > LOG_RATIO if log is None else log):
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1.0)


def _loss_ticks(scale: Normalize) -> np.ndarray:
    """Return the ticks of the surface's height and of the color bar: round numbers, powers of ten where there are three."""
    low, high = float(scale.vmin or 0.0), float(scale.vmax or 1.0)
    candidates = [np.asarray(MaxNLocator(5).tick_values(low, high))]
    if isinstance(scale, LogNorm):
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        candidates = [np.outer(decades, steps).ravel() for steps in ([1.0], [1.0, 3.0], [1.0, 2.0, 5.0])] + candidates
    inside = [c[(c >= low) & (c <= high)] for c in candidates]
    return next((ticks for ticks in inside if len(ticks) >= 3), inside[-1])


def _surface(axes: Any, result: LossLandscapeResult, z: np.ndarray, scale: Normalize, value: str) -> None:
    logarithmic = isinstance(scale, LogNorm)
    finite_values = np.where(np.isfinite(z), z, np.nan)
    bounds = np.array([scale.vmin, scale.vmax])
    height, bounds = (np.log10(finite_values), np.log10(bounds)) if logarithmic else (finite_values, bounds)
    x, y = np.meshgrid(result.x, result.y, indexing="ij")
    colors = colormaps[rcParams["image.cmap"]](scale(np.ma.masked_invalid(finite_values)))
    axes.plot_surface(x, y, height, facecolors=colors, rstride=1, cstride=1, linewidth=0, shade=False)
    axes.plot_wireframe(x, y, height, color="black", linewidth=0.2, alpha=0.4, rstride=1, cstride=1)
    broken = ~np.isfinite(z)
    if broken.any():
        floor = np.full(broken.sum(), bounds[0])
        axes.scatter(x[broken], y[broken], floor, marker="x", color="#D55E00", s=8, linewidths=0.7)
    axes.set(xlabel="Direction 1", ylabel="Direction 2", zlim=tuple(bounds))
    axes.set_zlabel(loss_label(LABELS[value], [result]))
    axes.view_init(elev=25, azim=-55)
    ticks = _loss_ticks(scale)
    axes.set_zticks(np.log10(ticks) if logarithmic else ticks, labels=[f"{tick:g}" for tick in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.labelpad = -4
    axes.tick_params(pad=-1)
    axes.zaxis.labelpad = -1


def _contours(
    canvas: Canvas, axes: Axes, result: LossLandscapeResult, z: np.ndarray, scale: Normalize, value: str
) -> None:
    finite = np.ma.masked_invalid(z.T)  # matplotlib wants (y, x)
    space = np.geomspace if isinstance(scale, LogNorm) else np.linspace
    levels = space(float(scale.vmin or 0.0), float(scale.vmax or 1.0), 16)
    levels[-1] = np.nextafter(levels[-1], np.inf)  # contourf leaves out what lies on the last level
    bar_norm = type(scale)(scale.vmin, scale.vmax)  # a color bar listens to its norm: a shared one would be reset
    drawn = axes.contourf(result.x, result.y, finite, levels=levels, norm=bar_norm, cmap=rcParams["image.cmap"])
    axes.contour(result.x, result.y, finite, levels=levels, colors="black", linewidths=0.3, alpha=0.6)
    if not np.isfinite(z).all():
        _hatch(axes, result, ~np.isfinite(z))
    bar = canvas.colorbar(drawn, ax=axes, label=loss_label(LABELS[value], [result]), pad=0.02)
    ticks = _loss_ticks(scale)  # those of the surface
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:g}" for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    if len(result.path):
        _path(axes, result)
    axes.plot(0, 0, "+", color="white", markersize=6, markeredgewidth=1.2)
    _mark_best(axes, result, z, value)
    reach = np.abs(np.concatenate([result.path, [[0.0, 0.0]]])).max(axis=0) * 1.05
    x_end, y_end = max(result.x[-1], reach[0]), max(result.y[-1], reach[1])
    axes.set(xlabel="Direction 1", ylabel="Direction 2", aspect="equal", xlim=(-x_end, x_end), ylim=(-y_end, y_end))


def _path(axes: Axes, result: LossLandscapeResult) -> None:
    axes.plot(
        *result.path.T, "o-", color="white", markeredgecolor="black", markeredgewidth=0.4, linewidth=1, markersize=3
    )
    outline = [withStroke(linewidth=1.2, foreground="black")]
    for index in {0, len(result.path) - 1}:
        place = (float(result.path[index, 0]), float(result.path[index, 1]))
        axes.annotate(
            result.labels[index], place, xytext=(-4, 2), textcoords="offset points", ha="right", color="white", fontsize="small",
            path_effects=outline,
        )  # fmt: skip


def _mark_best(axes: Axes, result: LossLandscapeResult, z: np.ndarray, value: str) -> None:
    if not np.isfinite(z).any():
        return
    best, word = (np.nanargmax, "maximum") if value == "accuracy" else (np.nanargmin, "minimum")
    i, j = np.unravel_index(best(np.where(np.isfinite(z), z, np.nan)), z.shape)
    x, y = float(result.x[i]), float(result.y[j])
    axes.plot(x, y, "*", color="#E69F00", markeredgecolor="black", markeredgewidth=0.4, markersize=7)
    axes.set_title(f"Star: {word} {z[i, j]:.3g} at ({x:.2g}, {y:.2g})", fontsize="small")


def _hatch(axes: Axes, result: LossLandscapeResult, broken: np.ndarray) -> None:
    cells = np.ma.masked_where(~broken.T, np.ones(broken.T.shape))
    axes.pcolor(
        result.x, result.y, cells, shading="nearest", facecolor="none", edgecolor="#D55E00", hatch="////", linewidth=0.0
    )  # fmt: skip
