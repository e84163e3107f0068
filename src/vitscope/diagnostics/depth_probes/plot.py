"""Accuracy, neural collapse and intrinsic dimension by depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.depth_probes.depth_probes import DepthProbesResult
from vitscope.plotting.canvas import new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, shared_legend, start_at_zero

#: accuracies, their labels, markers and styles of line
ACCURACIES = {
    "ridge_accuracy": ("Ridge", "o", "-"),
    "knn_accuracy": ("k-NN", "s", "--"),
    "class_token_ridge_accuracy": ("Ridge, class token", "^", "-."),
    "logit_lens_accuracy": ("Logit lens", "x", ":"),
}

#: accuracies that several results are compared by, a panel each
COMPARED = ("ridge_accuracy", "knn_accuracy", "logit_lens_accuracy")

#: the other panels: fields, labels, and whether the axis is logarithmic
PANELS = {
    "nc1": ("NC1: within over\nbetween classes", True),
    "nc2": ("NC2: distance of angles\nfrom the simplex", False),
    "nc3": ("NC3: weights against\nclass means", False),
    "nc4": ("NC4: decision is not\nthe nearest class mean", False),
    "intrinsic_dimension": ("Intrinsic dimension", False),
}


def depth_probes(results: Mapping[str, DepthProbesResult]) -> Figure:
    """Draw panels over normalized depth: accuracies of held-out images, NC1 to NC4 and the intrinsic dimension.

    One result has all accuracies in one panel, with bars. Several results have a panel each for the ridge, the k-NN and the logit
    lens, with bands. Both are 95 % intervals. A horizontal line is the model's own accuracy, in the color of its result.

    Args:
        results: One or more results by name.
    """
    canvas = new_canvas(7.0, 4.6)
    if len(results) == 1:
        axes = canvas.grid(2, 3, sharex=True)
        accuracy_axes, other_axes = axes.flat[:1], axes.flat[1:]
        _all_accuracies(accuracy_axes[0], *results.values())
    else:
        axes = canvas.grid(2, 4, sharex=True)
        accuracy_axes, other_axes = axes.flat[: len(COMPARED)], axes.flat[len(COMPARED) :]
        for ax, field in zip(accuracy_axes, COMPARED):
            _compared_accuracies(ax, results, field)
    for ax in accuracy_axes:
        ax.set_ylim(0, 1.02)
    for ax, (field, (label, is_logarithmic)) in zip(other_axes, PANELS.items()):
        drawn = [_curve(ax, result, field, index) for index, result in enumerate(results.values())]
        if is_logarithmic and any(drawn):
            ax.set_yscale("log")
        elif any(drawn):
            start_at_zero(ax)
        else:
            _mark_undefined(ax)
        ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel(DEPTH_LABEL)
    shared_legend(canvas, accuracy_axes[:1])
    return canvas.figure


def _all_accuracies(ax: Axes, result: DepthProbesResult) -> None:
    """Draw the accuracies of one result, each in a color of its own."""
    for number, (field, (label, marker, line)) in enumerate(ACCURACIES.items()):
        values, interval = getattr(result, field), getattr(result, f"{field}_interval")
        taps = np.flatnonzero(np.isfinite(values))
        if not len(taps):
            continue
        bars = np.stack([values[taps] - interval[taps, 0], interval[taps, 1] - values[taps]])
        ax.errorbar(
            result.depths[taps], values[taps], np.maximum(bars, 0), fmt=marker, linestyle=line, color=result_color(number),
            label=label, markersize=3, elinewidth=0.8,
        )  # fmt: skip
    if np.isfinite(result.model_accuracy):
        ax.axhline(result.model_accuracy, color="0.3", linewidth=0.8, zorder=0, label="The model")
    ax.set_ylabel("Accuracy")


def _compared_accuracies(ax: Axes, results: Mapping[str, DepthProbesResult], field: str) -> None:
    """Draw one kind of accuracy of several results, each in its color."""
    for index, (name, result) in enumerate(results.items()):
        values, interval = getattr(result, field), getattr(result, f"{field}_interval")
        color = result_color(index)
        taps = np.flatnonzero(np.isfinite(values))
        ax.plot(result.depths[taps], values[taps], "o-", color=color, markersize=3, label=name)
        ax.fill_between(result.depths[taps], *interval[taps].T, color=color, alpha=0.2, linewidth=0)
        if np.isfinite(result.model_accuracy):
            ax.axhline(result.model_accuracy, color=color, linewidth=0.8, zorder=0)
    if not any(np.isfinite(getattr(result, field)).any() for result in results.values()):
        _mark_undefined(ax)
    ax.set_ylabel(f"Accuracy ({ACCURACIES[field][0]})")


def _mark_undefined(ax: Axes) -> None:
    ax.set_yticks([])
    ax.text(0.5, 0.5, "not defined", ha="center", va="center", transform=ax.transAxes, color="0.4")


def _curve(ax: Axes, result: DepthProbesResult, field: str, index: int) -> bool:
    """Draw a curve with the band of its interval; return whether there is any value."""
    values, half_widths = getattr(result, field), getattr(result, f"{field}_half_width")
    color = result_color(index)
    taps = np.flatnonzero(np.isfinite(values))
    ax.plot(result.depths[taps], values[taps], "o-", color=color, markersize=3)
    if not len(taps):
        return False
    has_interval = taps[np.isfinite(half_widths[taps])]
    low = values - half_widths
    low = np.maximum(low, values.min(initial=np.inf, where=np.isfinite(values)) / 10) if field == "nc1" else low
    ax.fill_between(
        result.depths[has_interval],
        low[has_interval],
        (values + half_widths)[has_interval],
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    return True
