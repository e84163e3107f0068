"""Figures of curves along lines."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vitscope.diagnostics.landscape.linear_interpolation import LinearInterpolationResult
from vitscope.diagnostics.landscape.loss_barrier import LossBarrierResult
from vitscope.diagnostics.landscape.loss_slice import LossSliceResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.loss_label import loss_label

LABELS = {
    "nll": "NLL (nats)",
    "l2_half_sq": "½ wd Σ‖w‖² (nats)",
    "l2_sum_norm": "wd Σ‖w‖ (nats)",
    "accuracy": "Accuracy",
    "ece": "ECE",
}

#: words for labels of weights at the ends of a way
ENDS = {"model": "this model", "init": "initialization", "last": "last checkpoint", "best": "best checkpoint"}


def loss_slice(results: Mapping[str, LossSliceResult], *, value: str = "nll", log: bool | None = None) -> Figure:
    """Draw the mean curve of each result, with every direction's own curve and the 95% interval of the mean as a band.

    The legend says over how many directions the mean goes. Crosses on the x axis mark coordinates where a point is not finite;
    the legend counts them.

    Args:
        results: Results by the name in the legend.
        value: ``nll``, ``l2_half_sq``, ``l2_sum_norm``, ``accuracy`` or ``ece``.
        log: A logarithmic axis; by default for the NLLs of one result that span more than a ratio of 20.

    Raises:
        ValueError: An unknown value.
    """
    if value not in LABELS:
        raise ValueError(f"Expected value to be one of {', '.join(LABELS)}, received {value!r}.")
    canvas = new_canvas(COLUMN_WIDTH, 2.5)
    axes = canvas.axes()
    counts = {_directions(result) for result in results.values()}
    shared = counts.pop() if len(counts) == 1 and any(results) else ""  # of all curves: above their names
    for index, (name, result) in enumerate(results.items()):
        count = f" ({result.n_nonfinite} points not finite)" if result.n_nonfinite else ""
        label = ": ".join(filter(None, [name, "" if shared else _directions(result)]))
        _draw_slice(axes, result, value, result_color(index), label + count)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="Distance (in units of the direction)", ylabel=loss_label(LABELS[value], results.values()))
    if log is None:
        log = value == "nll" and len(results) == 1 and _wide(results)
    if log:
        _set_log_scale(axes, results)
    axes.legend(title=shared.capitalize() or None)
    return canvas.figure


def _draw_slice(axes: Axes, result: LossSliceResult, value: str, color: str, label: str) -> None:
    curve = getattr(result, value)
    axes.plot(result.x, _finite(curve), color=color, label=label, zorder=3)
    has_several_directions = len(result.nll_by_direction) > 1
    if has_several_directions and value in ("nll", "accuracy"):
        for direction_curve in getattr(result, f"{value}_by_direction"):
            axes.plot(result.x, _finite(direction_curve), color=color, linewidth=0.4, alpha=0.5)
    if has_several_directions and value == "nll":
        axes.fill_between(result.x, result.nll_low, result.nll_high, color=color, alpha=0.2, linewidth=0)
    broken = ~np.isfinite(result.nll_by_direction).all(axis=0)
    _crosses(axes, result.x[broken], color)


def _set_log_scale(axes: Axes, results: Mapping[str, LossSliceResult]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    lowest = min(np.nanmin(np.where(r.nll_by_direction > 0, r.nll_by_direction, np.nan)) for r in results.values())
    axes.set_ylim(bottom=0.8 * lowest)  # an interval may reach below zero


def _finite(values: np.ndarray) -> np.ndarray:
    """Return values with NaN, which matplotlib leaves out, in the place of those that are not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def _directions(result: LossSliceResult) -> str:
    n = len(result.nll_by_direction)
    return "one direction" if n == 1 else f"mean of {n} directions"


def plotly_loss_slice(results: Mapping[str, LossSliceResult]) -> go.Figure:
    """Return the mean curves as an interactive figure, hover showing all measured values."""
    figure = go.Figure()
    for name, result in results.items():
        rest = np.stack([result.accuracy, result.ece, result.l2_half_sq, result.l2_sum_norm], axis=1)
        figure.add_trace(
            go.Scatter(
                x=result.x,
                y=result.nll,
                name=name,
                mode="lines+markers",
                customdata=rest,
                hovertemplate=loss_label("x %{x:.3g}<br>NLL %{y:.4g}<br>accuracy %{customdata[0]:.3f}", [result])
                + "<br>ECE %{customdata[1]:.3f}<br>½ wd Σ‖w‖² %{customdata[2]:.4g}<br>wd Σ‖w‖ %{customdata[3]:.4g}",
            )
        )
    figure.update_layout(
        xaxis_title="x (in units of the direction)", yaxis_title=loss_label(LABELS["nll"], results.values())
    )
    return figure


def linear_interpolation(results: Mapping[str, LinearInterpolationResult]) -> Figure:
    """Draw NLL and accuracy along each way; crosses on the x axis mark points that are not finite.

    The legend names the ends, and how units were matched where they were.

    Args:
        results: Results by the name in the legend.
    """
    canvas = new_canvas(COLUMN_WIDTH, 3.6)
    upper, lower = canvas.grid(2, 1, sharex=True)[:, 0]
    for index, (name, r) in enumerate(results.items()):
        count = f" ({r.n_nonfinite} points not finite)" if r.n_nonfinite else ""
        color, label = result_color(index), f"{_way(name, r)}{_alignment(r)}{count}"
        upper.plot(r.t, _finite(r.nll), "o-", color=color, label=label)
        lower.plot(r.t, r.accuracy, "o-", color=color)
        _crosses(upper, r.t[~np.isfinite(r.nll)], color)
    upper.set(ylabel=loss_label(LABELS["nll"], results.values()))
    lower.set(xlabel="Position on the line (0: start, 1: end)", ylabel="Accuracy")
    lower.set_ylim(top=min(lower.get_ylim()[1], 1.02))
    handles, labels = upper.get_legend_handles_labels()
    canvas.add_height(0.13 * len(labels))
    canvas.legend(handles, labels, loc="outside upper center", ncols=1)  # above, where it hides no curve
    return canvas.figure


def _way(name: str, r: LinearInterpolationResult | LossBarrierResult) -> str:
    ends = f"{_end(r.start)} to {_end(r.end)}"
    return f"{name}: {ends}" if name else ends


def _end(label: str) -> str:
    """Return words for a label of weights: ``model`` are the weights that were given to the measure."""
    if epoch := re.fullmatch(r"epoch-(\d+)", label):
        return f"epoch {int(epoch[1])}"
    return ENDS.get(label, f"checkpoint {label}" if label.isdigit() else label)


def _alignment(r: LinearInterpolationResult | LossBarrierResult) -> str:
    return f", aligned by {r.alignment}" if r.alignment != "none" else ""


def loss_barrier(results: Mapping[str, LossBarrierResult]) -> Figure:
    """Draw each way's NLL, its chord (dashed) and the barrier between them as a bar; dotted the way without alignment.

    Args:
        results: Results by the name in the legend.
    """
    canvas = new_canvas(COLUMN_WIDTH, 2.5)
    axes = canvas.axes()
    for index, (name, r) in enumerate(results.items()):
        label, color = _way(name, r), result_color(index)
        finite_nll = _finite(r.nll)
        count = f" ({r.n_nonfinite} points not finite)" if r.n_nonfinite else ""
        aligned = _alignment(r)
        axes.plot(r.t, finite_nll, "o-", color=color, label=f"{label}{aligned}: {r.barrier:.3g}{count}")
        if aligned:
            plain_nll = _finite(r.nll_unaligned)
            plain_label = f"{label}, not aligned: {r.barrier_unaligned:.3g}"
            axes.plot(r.t, plain_nll, "s:", color=color, markerfacecolor="white", markersize=3, label=plain_label)
        axes.plot(r.t, r.chord, "--", color=color, linewidth=0.8)
        if np.isfinite(r.barrier):
            summit = int(np.abs(r.t - r.t_barrier).argmin())
            axes.plot(
                [r.t[summit], r.t[summit]],
                [r.chord[summit], r.nll[summit]],
                "_-",
                color=color,
                linewidth=0.8,
                markersize=8,
            )
        _crosses(axes, r.t[~np.isfinite(r.nll)], color)
    axes.set(xlabel="Position on the line (0: start, 1: end)", ylabel=loss_label(LABELS["nll"], results.values()))
    handles, labels = axes.get_legend_handles_labels()
    title = loss_label("Barrier (nats)", results.values())
    canvas.add_height(0.13 * (len(labels) + 1))
    canvas.legend(handles, labels, loc="outside upper center", ncols=1, title=title)  # above, where it hides no curve
    return canvas.figure


def plotly_linear_interpolation(results: Mapping[str, LinearInterpolationResult]) -> go.Figure:
    """Return the ways as an interactive figure, accuracy on hover."""
    figure = go.Figure()
    for name, r in results.items():
        hover = loss_label("t %{x:.3g}<br>NLL %{y:.4g}<br>accuracy %{customdata:.3f}", results.values())
        figure.add_trace(
            go.Scatter(x=r.t, y=r.nll, name=name, mode="lines+markers", customdata=r.accuracy, hovertemplate=hover)
        )
    figure.update_layout(xaxis_title="t (0: start, 1: end)", yaxis_title=loss_label(LABELS["nll"], results.values()))
    return figure


def _crosses(axes: Axes, x: np.ndarray, color: str) -> None:
    """Mark coordinates on the x axis, where a point is not finite."""
    if not len(x):  # an empty unclipped line would take part in the layout, at the figure's corner
        return
    axes.plot(x, np.zeros(len(x)), "x", color=color, transform=axes.get_xaxis_transform(), clip_on=False)


def _wide(results: Mapping[str, LossSliceResult]) -> bool:
    values = np.concatenate([r.nll_by_direction.ravel() for r in results.values()])
    values = values[np.isfinite(values) & (values > 0)]
    return bool(values.size and values.max() / values.min() > 20)
