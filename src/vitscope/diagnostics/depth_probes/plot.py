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

#: the other panels: fields, labels, and whether the axis is logarithmic
PANELS = {
    "nc1": ("NC1: within over\nbetween classes", True),
    "nc2": ("NC2: distance of angles\nfrom the simplex", False),
    "nc3": ("NC3: weights against\nclass means", False),
    "nc4": ("NC4: decision is not\nthe nearest class mean", False),
    "intrinsic_dimension": ("Intrinsic dimension", False),
}


def depth_probes(results: Mapping[str, DepthProbesResult]) -> Figure:
    """Draw six panels over normalized depth: accuracies of held-out images, NC1 to NC4 and the intrinsic dimension.

    Bars and bands are 95 % intervals. A horizontal line is the model's own accuracy, in the color of its result. With several
    results the accuracies are the ridge's and the k-NN's alone.

    Args:
        results: one or more results by name.
    """
    canvas = new_canvas(7.0, 4.6)
    axes = canvas.grid(2, 3, sharex=True)
    for index, (name, result) in enumerate(results.items()):
        _accuracies(axes[0, 0], name, result, index, single=len(results) == 1)
    axes[0, 0].set_ylabel("Accuracy")
    axes[0, 0].set_ylim(0, 1.02)
    for ax, (field, (label, is_logarithmic)) in zip(axes.flat[1:], PANELS.items()):
        drawn = [_curve(ax, result, field, index) for index, result in enumerate(results.values())]
        if is_logarithmic and any(drawn):
            ax.set_yscale("log")
        elif any(drawn):
            start_at_zero(ax)
        else:
            ax.set_yticks([])
            ax.text(0.5, 0.5, "not defined", ha="center", va="center", transform=ax.transAxes, color="0.4")
        ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel(DEPTH_LABEL)
    shared_legend(canvas, [axes[0, 0]])
    return canvas.figure


def _accuracies(ax: Axes, name: str, result: DepthProbesResult, index: int, *, single: bool) -> None:
    names = list(ACCURACIES) if single else ["ridge_accuracy", "knn_accuracy"]
    for number, field in enumerate(names):
        label, marker, line = ACCURACIES[field]
        values, interval = getattr(result, field), getattr(result, f"{field}_interval")
        at = np.flatnonzero(np.isfinite(values))
        if not len(at):
            continue
        bars = np.stack([values[at] - interval[at, 0], interval[at, 1] - values[at]])
        color = result_color(number if single else index)
        text = label if single else f"{name}: {label}"
        ax.errorbar(
            result.depths[at], values[at], np.maximum(bars, 0), fmt=marker, linestyle=line, color=color, label=text,
            markersize=3, elinewidth=0.8,
        )  # fmt: skip
    if np.isfinite(result.model_accuracy):
        color = "0.3" if single else result_color(index)
        ax.axhline(result.model_accuracy, color=color, linewidth=0.8, zorder=0, label="The model" if single else None)


def _curve(ax: Axes, result: DepthProbesResult, field: str, index: int) -> bool:
    """Draw a curve with the band of its interval; return whether there is any value."""
    values, half_widths = getattr(result, field), getattr(result, f"{field}_half_width")
    color = result_color(index)
    at = np.flatnonzero(np.isfinite(values))
    ax.plot(result.depths[at], values[at], "o-", color=color, markersize=3)
    if not len(at):
        return False
    has_interval = at[np.isfinite(half_widths[at])]
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
