"""Reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.calibration._bins import accuracy_interval
from vitscope.diagnostics.calibration.calibration import CalibrationResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color


def calibration(results: Mapping[str, CalibrationResult], *, show_scaled: bool = True) -> Figure:
    """Draw accuracy against confidence for each result, above the share of images in each confidence bin.

    Below the diagonal a model is over-confident. Dashed lines are after temperature scaling.

    Args:
        results: One or more results by name.
        show_scaled: Whether to draw the curve after temperature scaling where there is one.
    """
    canvas = new_canvas(COLUMN_WIDTH, 4.2)
    upper, lower = canvas.grid(2, 1, sharex=True, height_ratios=(3, 1))[:, 0]
    upper.plot([0, 100], [0, 100], color="0.6", linestyle=":", linewidth=1, zorder=0)
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        label = name or "As trained"
        _curve(upper, result.bin_count, result.bin_confidence, result.bin_accuracy, color, "-", label, result.ece)
        if show_scaled and result.temperature is not None and result.scaled_ece is not None:
            counts = result.scaled_bin_count, result.scaled_bin_confidence, result.scaled_bin_accuracy
            scaled = f"{label}, T = {result.temperature:.2f}"
            _curve(upper, *counts, color, "--", scaled, result.scaled_ece)
        share = 100 * result.bin_count / result.bin_count.sum()
        lower.stairs(share, 100 * result.bin_edges, color=color, fill=len(results) == 1, alpha=0.8)
    upper.set(xlim=(0, 100), ylim=(0, 103), ylabel="Accuracy (%)")
    canvas.legend(loc="outside upper center", title="Expected calibration error")
    lower.set(ylim=(0, None), xlabel="Confidence (%)", ylabel="Images (%)")
    return canvas.figure


def _curve(
    axes: Axes,
    count: np.ndarray,
    confidence: np.ndarray,
    accuracy: np.ndarray,
    color: str,
    line: str,
    label: str,
    ece: float,
) -> None:
    is_occupied = count > 0
    # the interval of a share: bins of few images say little, and the bar shows it, also where all are right
    low, high = accuracy_interval(count[is_occupied], accuracy[is_occupied])
    error = np.maximum([accuracy[is_occupied] - low, high - accuracy[is_occupied]], 0.0)
    axes.errorbar(
        100 * confidence[is_occupied],
        100 * accuracy[is_occupied],
        yerr=100 * error,
        color=color,
        linestyle=line,
        marker="o" if line == "-" else "s",
        markersize=3,
        markerfacecolor=color if line == "-" else "white",
        elinewidth=0.8,
        label=f"{label}: {100 * ece:.1f}%",
    )
