"""The figure of sharpness: the rise of the loss over the distance, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vitscope.diagnostics.landscape.sharpness import SharpnessResult

#: entries of a legend that fit into the axes
MOST_INSIDE = 4


def sharpness(results: Mapping[str, SharpnessResult]) -> Figure:
    """Draw the mean rise with its 95% interval and the worst rise found, over the radius.

    Saturated radii are shaded and hollow: every model is near chance there, and the rise says nothing about flatness. Rises
    that are not positive cannot be drawn on the logarithmic axis; they are marked by a triangle at its foot.

    Args:
        results: by the name in the legend.
    """
    figure = Figure(figsize=(3.4, 2.7))
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="radius (share of each filter's norm)", ylabel="rise of the NLL (nats)")
    for index, (name, r) in enumerate(results.items()):
        color, prefix = f"C{index}", f"{name}, " if name else ""
        keep = ~r.saturated & (r.rise > 0) & np.isfinite(r.rise)
        low = np.clip(r.rise - r.rise_low, 0, 0.999 * r.rise.clip(min=0))  # a bar may not reach zero
        bars = np.nan_to_num(np.stack([low, r.rise_high - r.rise]))[:, keep]
        axes.errorbar(r.radii[keep], r.rise[keep], yerr=bars, fmt="o-", color=color, label=f"{prefix}mean")
        hollow = r.saturated & (r.rise > 0) & np.isfinite(r.rise)
        axes.plot(r.radii[hollow], r.rise[hollow], "o", color=color, markerfacecolor="white")
        worst = np.isfinite(r.worst_rise) & (r.worst_rise > 0)
        if worst.any():
            axes.plot(
                r.radii[worst], r.worst_rise[worst], "^--", color=color, linewidth=0.8, label=f"{prefix}worst found"
            )
        sunk = r.radii[~r.saturated & ~(r.rise > 0)]
        if len(sunk):
            axes.plot(sunk, np.zeros(len(sunk)), "v", color=color, transform=axes.get_xaxis_transform(), clip_on=False)
    _shade(axes, results)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > MOST_INSIDE:  # above, where it hides no curve
        figure.set_figheight(2.7 + 0.13 * len(labels))
        figure.legend(handles, labels, loc="outside upper center", fontsize=6, ncols=1)
    else:
        axes.legend(fontsize=6)
    return figure


def plotly_sharpness(results: Mapping[str, SharpnessResult]) -> go.Figure:
    """Return the mean rises with their intervals as an interactive figure."""
    figure = go.Figure()
    for name, r in results.items():
        bars = {"type": "data", "symmetric": True, "array": r.rise_high - r.rise}
        hover = "radius %{x}<br>rise %{y:.4g}<br>accuracy %{customdata:.3f}"
        figure.add_trace(
            go.Scatter(x=r.radii, y=r.rise, error_y=bars, name=name, customdata=r.accuracy, hovertemplate=hover)
        )
    figure.update_layout(xaxis_title="radius", yaxis_title="rise of the NLL (nats)")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def _shade(axes: Axes, results: Mapping[str, SharpnessResult]) -> None:
    """Shade from the first radius that is saturated for every result, and tick the radii that were measured."""
    radii = np.unique(np.concatenate([r.radii for r in results.values()]))
    saturated = [x for x in radii if all(r.saturated[r.radii == x].all() for r in results.values())]
    if saturated:
        axes.axvspan(0.85 * min(saturated), 1.2 * radii.max(), color="0.92", zorder=0, linewidth=0)
        axes.text(0.99, 0.98, "saturated", transform=axes.transAxes, ha="right", va="top", fontsize=6, color="0.4")
    axes.set_xlim(0.85 * radii.min(), 1.2 * radii.max())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(radii.tolist(), [f"{x:g}" for x in radii])
