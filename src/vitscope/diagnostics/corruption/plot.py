"""Accuracy under corruption, by type and by severity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.corruption.corruption import CorruptionResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color


def corruption(results: Mapping[str, CorruptionResult], *, view: str = "both") -> Figure:
    """Draw the mean accuracy at each severity, and the accuracy for each type averaged over severities.

    Severity 0 is the clean accuracy. In the second panel bars end at the type's mean, dashes mark the clean accuracy.

    Args:
        results: one or more results by name, of the same types.
        view: ``both``, ``severity`` or ``type``.

    Raises:
        ValueError: an unknown view.
    """
    if view not in ("both", "severity", "type"):
        raise ValueError(f"Expected view to be one of both, severity, type, received {view!r}.")
    if view == "severity":
        canvas = new_canvas(COLUMN_WIDTH, 2.6)
        _by_severity(canvas.axes(), results)
    elif view == "type":
        canvas = new_canvas(5.0, 2.8)
        _by_type(canvas.axes(), results)
    else:
        canvas = new_canvas(6.8, 2.8)
        mean_axes, type_axes = canvas.grid(1, 2, sharey=True, width_ratios=(1, 2))[0]
        _by_severity(mean_axes, results)
        _by_type(type_axes, results)
        type_axes.set_ylabel("")
    if any(results):
        canvas.legend(loc="outside upper center", ncols=4)
    return canvas.figure


def _by_severity(ax: Axes, results: Mapping[str, CorruptionResult]) -> None:
    for index, (name, result) in enumerate(results.items()):
        mean = [result.clean_accuracy, *result.accuracy.mean(axis=0)]
        ax.plot([0, *result.severities], 100 * np.array(mean), "o-", color=result_color(index), label=name or None)
    ax.set(xlabel="Severity (0: clean)", ylabel="Accuracy (%)", xticks=range(6))
    ax.set_ylim(bottom=0)


def _by_type(ax: Axes, results: Mapping[str, CorruptionResult]) -> None:
    types = next(iter(results.values())).types
    width = 0.8 / len(results)
    for index, (name, result) in enumerate(results.items()):
        x = np.arange(len(types)) - 0.4 + width * (index + 0.5)
        mean = [100 * result.accuracy[result.types.index(t)].mean() for t in types]
        ax.bar(x, mean, width=0.9 * width, color=result_color(index), label=name or None)
        ax.axhline(100 * result.clean_accuracy, color=result_color(index), linestyle="--", linewidth=0.8)
    ax.set_xticks(
        range(len(types)), [t.replace("_", " ") for t in types], rotation=60, ha="right", rotation_mode="anchor"
    )
    ax.set(ylabel="Accuracy (%)", xlim=(-0.6, len(types) - 0.4))
    ax.set_ylim(bottom=0)
