"""The figure of sharpness: the rise of the loss over the distance, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from vitscope.diagnostics.landscape.sharpness import SharpnessResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.loss_label import loss_label

#: labels of both axes by ball of an adaptive measure
BALLS = {
    "l2": ("Radius of the adaptive L2 ball", "Worst rise, lower\nbound (nats)"),
    "linf": ("Radius of the adaptive Linf ball", "Worst rise, lower\nbound (nats)"),
    "average": ("Standard deviation / scale of the weight", "Average rise (nats)"),
}
#: marker, line and whether markers are filled, by scale of an adaptive measure
KINDS: dict[str, tuple[str, Literal["-", ":"], bool]] = {"elementwise": ("o", "-", True), "filter": ("s", ":", False)}

#: entries of a legend that fit into the axes
MOST_INSIDE = 4


def sharpness(results: Mapping[str, SharpnessResult]) -> Figure:
    """Draw the mean rise with its 95% interval over the radius, and the worst rise found, where there is one.

    Adaptive measures have a panel for each kind of ball.

    Saturated radii are shaded and hollow: every model is near chance there, and the rise says nothing about flatness. Rises
    that are not positive cannot be drawn on the logarithmic axis; they are marked by a triangle at its foot, those that are
    not finite by a cross; the legend counts the points that are not.

    Args:
        results: Results by the name in the legend.
    """
    has_worst = any(_is_plottable(r.worst_rise).any() for r in results.values())
    balls = [ball for ball in BALLS if any(m.endswith(ball) for r in results.values() for m in r.adaptive_measures)]
    canvas, panels = _panels(has_worst, len(balls))
    filter_panels = panels[:2] if has_worst else panels[:1]
    axes: Axes = panels[0]
    axes.set(xscale="log", yscale="log", ylabel=loss_label("Mean rise of the NLL (nats)", results.values()))
    for index, (name, r) in enumerate(results.items()):
        _mean(axes, name, r, result_color(index))
    if has_worst:
        _worst(panels[1], results)
    _shade(filter_panels, results)
    for panel in filter_panels if balls else filter_panels[-1:]:
        panel.set_xlabel("Radius (share of each filter's norm)")
    for panel, ball in zip(panels[len(filter_panels) :], balls):
        _adaptive(panel, ball, results)
    handles, labels = axes.get_legend_handles_labels()
    if balls:
        handles, labels = _with_kinds(handles, labels, results)
    if len(labels) > MOST_INSIDE or balls:  # above, where it hides no curve
        n_columns = min(len(labels), 4) if balls else 1
        canvas.add_height(0.13 * -(-len(labels) // n_columns))
        canvas.legend(handles, labels, loc="outside upper center", ncols=n_columns)
    elif labels:
        axes.legend()
    return canvas.figure


def _panels(has_worst: bool, n_balls: int) -> tuple[Canvas, list[Axes]]:
    """Return a canvas and its panels: the mean rise, the worst rise where there is one, and one for each kind of ball."""
    n_filter_panels = 2 if has_worst else 1
    if n_balls:
        n_panels = n_filter_panels + n_balls
        n_rows = -(-n_panels // 2)
        canvas = new_canvas(2 * COLUMN_WIDTH, 2.4 * n_rows)
        panels = list(canvas.grid(n_rows, 2).flat)
        for empty in panels[n_panels:]:
            empty.set_axis_off()
        return canvas, panels[:n_panels]
    canvas = new_canvas(COLUMN_WIDTH, 4.2 if has_worst else 2.7)
    # apart: the worst rises of deep networks are orders of magnitude above the means
    grid = canvas.grid(n_filter_panels, 1, sharex=True, height_ratios=[1.5, 1] if has_worst else None)
    return canvas, list(grid[:, 0])


def _worst(axes: Axes, results: Mapping[str, SharpnessResult]) -> None:
    """Draw the worst rise of each result over the radius."""
    for index, r in enumerate(results.values()):
        is_shown = _is_plottable(r.worst_rise)
        axes.plot(r.radii[is_shown], r.worst_rise[is_shown], "^--", color=result_color(index), linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylabel="Worst rise\nfound (nats)")


def _is_plottable(rise: np.ndarray) -> np.ndarray:
    """Whether each rise can be drawn on a logarithmic axis."""
    return np.isfinite(rise) & (rise > 0)


def _adaptive(axes: Axes, ball: str, results: Mapping[str, SharpnessResult]) -> None:
    """Draw the adaptive rises of one ball over its radii, with 95% intervals over groups of images."""
    radii = sorted({
        float(x) for r in results.values() for m, x in zip(r.adaptive_measures, r.adaptive_radii) if m.endswith(ball)
    })  # fmt: skip
    for index, r in enumerate(results.values()):
        for kind, (marker, line, fill) in KINDS.items():
            is_shown = np.array([m == f"{kind}_{ball}" for m in r.adaptive_measures], dtype=bool)
            x, y = r.adaptive_radii[is_shown], r.adaptive_rise[is_shown]
            good = np.isfinite(y) & (y > 0)
            low = np.clip(y - r.adaptive_rise_low[is_shown], 0, 0.999 * np.abs(y))  # a bar may not reach zero
            bars = np.nan_to_num(np.stack([low, (r.adaptive_rise_high[is_shown] - y).clip(min=0)]))[:, good]
            color = result_color(index)
            face = color if fill else "white"
            axes.errorbar(
                x[good], y[good], yerr=bars, fmt=marker + line, color=color, markerfacecolor=face, markersize=4
            )
            if not good.all():
                foot = np.zeros((~good).sum())
                axes.plot(x[~good], foot, "v", color=color, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set(xscale="log", yscale="log", xlabel=BALLS[ball][0], ylabel=loss_label(BALLS[ball][1], results.values()))
    axes.set_xlim(0.8 * min(radii), 1.25 * max(radii))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(radii, [f"{x:g}" for x in radii])


def _with_kinds(
    handles: list[Any], labels: list[str], results: Mapping[str, SharpnessResult]
) -> tuple[list[Any], list[str]]:
    """Return the legend's entries with those of the scales of adaptive measures."""
    kinds = [k for k in KINDS if any(m.startswith(k) for r in results.values() for m in r.adaptive_measures)]
    for kind in kinds:
        marker, line, fill = KINDS[kind]
        face = "0.3" if fill else "white"
        handles.append(Line2D([], [], marker=marker, linestyle=line, color="0.3", markerfacecolor=face, markersize=4))
        labels.append(f"{kind} scales")
    return handles, labels


def _mean(axes: Axes, name: str, r: SharpnessResult, color: str) -> None:
    keep = ~r.saturated & (r.rise > 0) & np.isfinite(r.rise)
    low = np.clip(r.rise - r.rise_low, 0, 0.999 * r.rise.clip(min=0))  # a bar may not reach zero
    bars = np.nan_to_num(np.stack([low, (r.rise_high - r.rise).clip(min=0)]))[:, keep]
    count = f"{r.n_nonfinite} points not finite" if r.n_nonfinite else ""
    label = " ".join(filter(None, [name, f"({count})" if name and count else count]))
    axes.errorbar(r.radii[keep], r.rise[keep], yerr=bars, fmt="o-", color=color, label=label or None)
    hollow = r.saturated & (r.rise > 0) & np.isfinite(r.rise)
    axes.plot(r.radii[hollow], r.rise[hollow], "o", color=color, markerfacecolor="white")
    for marker, radii in (("v", r.radii[~r.saturated & (r.rise <= 0)]), ("x", r.radii[~np.isfinite(r.rise)])):
        if len(radii):
            axes.plot(
                radii, np.zeros(len(radii)), marker, color=color, transform=axes.get_xaxis_transform(), clip_on=False
            )


def plotly_sharpness(results: Mapping[str, SharpnessResult]) -> go.Figure:
    """Return the mean rises with their intervals as an interactive figure."""
    figure = go.Figure()
    for name, r in results.items():
        bars = {"type": "data", "symmetric": True, "array": r.rise_high - r.rise}
        hover = "radius %{x}<br>rise %{y:.4g}<br>accuracy %{customdata:.3f}"
        figure.add_trace(
            go.Scatter(x=r.radii, y=r.rise, error_y=bars, name=name, customdata=r.accuracy, hovertemplate=hover)
        )
    figure.update_layout(xaxis_title="radius", yaxis_title=loss_label("rise of the NLL (nats)", results.values()))
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def _shade(panels: Sequence[Axes], results: Mapping[str, SharpnessResult]) -> None:
    """Shade from the first radius that is saturated for every result, and tick the radii that were measured."""
    radii = np.unique(np.concatenate([r.radii for r in results.values()]))
    saturated = [x for x in radii if all(r.saturated[r.radii == x].all() for r in results.values())]
    if saturated:
        for axes in panels:
            axes.axvspan(0.85 * min(saturated), 1.2 * radii.max(), color="0.92", zorder=0, linewidth=0)
        axes = panels[0]
        axes.text(
            0.99, 0.02, "Saturated", transform=axes.transAxes, ha="right", va="bottom", fontsize="small", color="0.4"
        )
    for axes in panels:
        axes.set_xlim(0.85 * radii.min(), 1.2 * radii.max())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(radii.tolist(), [f"{x:g}" for x in radii])
