"""Accuracy under corruption, by type and by severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.corruption.corruption import CorruptionResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color


def corruption(results: Mapping[str, CorruptionResult], *, view: str = "both") -> Figure:
    """Draw the mean accuracy at each severity, and the accuracy for each type averaged over severities.

    The mean is that of the fifteen common types that were measured, of the others where none of them was. Severity 0 is the clean
    accuracy. In the second panel bars end at the type's mean, dashes mark the clean accuracy. Whiskers are 95% intervals over
    images, 1.96 standard errors: models that see the same images differ by less than they suggest.

    Args:
        results: One or more results by name, of the same types.
        view: ``both``, ``severity`` or ``type``.

    Raises:
        ValueError: An unknown view.
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
        mean = [result.clean_accuracy, *result.severity_accuracy]
        color = result_color(index)
        ax.plot([0, *result.severities], 100 * np.array(mean), "o-", color=color, label=name or None)
        errors = [result.clean_standard_error, *result.severity_standard_error]
        _whiskers(ax, [0, *result.severities], mean, errors, color)
    ax.set(xlabel="Severity (0: clean)", ylabel="Accuracy (%)", xticks=range(6))
    _set_accuracy_limits(ax, results)


def _by_type(ax: Axes, results: Mapping[str, CorruptionResult]) -> None:
    types = next(iter(results.values())).types
    width = 0.8 / len(results)
    for index, (name, result) in enumerate(results.items()):
        x = np.arange(len(types)) - 0.4 + width * (index + 0.5)
        rows = [result.types.index(t) for t in types]
        mean = [100 * result.accuracy[row].mean() for row in rows]
        ax.bar(x, mean, width=0.9 * width, color=result_color(index), label=name or None)
        errors = [result.type_standard_error[row] for row in rows] if len(result.type_standard_error) else []
        _whiskers(ax, x, np.array(mean) / 100, errors, "black")
        ax.axhline(100 * result.clean_accuracy, color=result_color(index), linestyle="--", linewidth=0.8)
    ax.set_xticks(
        range(len(types)), [t.replace("_", " ") for t in types], rotation=60, ha="right", rotation_mode="anchor"
    )
    ax.set(ylabel="Accuracy (%)", xlim=(-0.6, len(types) - 0.4))
    _set_accuracy_limits(ax, results)


def _whiskers(
    ax: Axes, x: Sequence[float] | np.ndarray, shares: Sequence[float] | np.ndarray, errors: Sequence[float], color: str
) -> None:
    """Draw 95% intervals of shares in percent, where there are standard errors."""
    if len(errors) != len(shares):  # a result of an earlier version
        return
    half = 100 * 1.96 * np.nan_to_num(np.asarray(errors, dtype=float))
    ax.errorbar(x, 100 * np.asarray(shares), yerr=half, fmt="none", ecolor=color, elinewidth=0.8, capsize=2)


def _set_accuracy_limits(ax: Axes, results: Mapping[str, CorruptionResult]) -> None:
    """Begin at zero, and leave space above the most accurate point."""
    highest = max(max(r.clean_accuracy, float(r.accuracy.max())) for r in results.values())
    ax.set_ylim(0, 100 * min(1.08 * highest + 0.01, 1.02))
