"""Figure of the feature map variance, after Fig 9 of Park & Kim (2022)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.variance.feature_map_variance import FeatureMapVarianceResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, points_by_kind, shade_bands, shared_legend
from vitscope.plotting.style import MARKERS


def feature_map_variance(
    results: Mapping[str, FeatureMapVarianceResult], *, view: str = "both", log: bool | None = None
) -> Figure:
    """Draw the variance over depth (Fig 9) and each unit's log variance ratio; the rows of several models share their axes.

    Args:
        results: Results by the name in the title or legend.
        view: ``both``, a row a model; ``variance``, where several models share one pair of axes; or ``ratio``.
        log: A logarithmic axis of the variance; by default for one model whose values span more than a factor of 30.

    Raises:
        ValueError: An unknown view.
    """
    drawn = {"variance": _over_depth, "ratio": _ratios}
    if view not in ("both", *drawn):
        raise ValueError(f"Expected view to be one of both, variance, ratio, received {view!r}.")
    if view == "variance" and len(results) > 1:
        return _overlay(results, bool(log))
    views = list(drawn) if view == "both" else [view]
    canvas = new_canvas(COLUMN_WIDTH * len(views), 0.3 + 2.3 * len(results))
    axes = canvas.grid(len(results), len(views), sharex="col", sharey="col")
    for row, (name, result) in zip(axes, results.items()):
        for ax, what in zip(row, views):
            _bands(ax, result)
            drawn[what](ax, result)
            ax.set(title=name, xlim=(-0.02, 1.02))
    if "variance" in views and (log or (log is None and len(results) == 1 and _wide(*results.values()))):
        axes[0, 0].set_yscale("log")
    for ax in axes[-1]:
        ax.set_xlabel(DEPTH_LABEL)
    shared_legend(canvas, axes.flat)
    return canvas.figure


def _over_depth(ax: Axes, result: FeatureMapVarianceResult) -> None:
    ax.plot(result.depths, result.variance, color="0.4", linewidth=0.8, zorder=2)
    points_by_kind(ax, result.depths, result.kinds, result.variance, result.variance_half_width)
    ax.set_ylabel("Feature map variance")


def _ratios(ax: Axes, result: FeatureMapVarianceResult) -> None:
    ax.axhline(0, color="0.5", linewidth=0.6, zorder=1)
    half_width = result.log_variance_ratio_half_width
    points_by_kind(ax, result.depths, result.kinds, result.log_variance_ratio, half_width)
    ax.set_ylabel("ln(variance after / before unit)")


def _overlay(results: Mapping[str, FeatureMapVarianceResult], log: bool) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH, 2.6)
    ax = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        ax.errorbar(
            result.depths,
            result.variance,
            result.variance_half_width,
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
            color=result_color(index),
            label=name,
        )
    ax.set(xlim=(-0.02, 1.02), xlabel=DEPTH_LABEL, ylabel="Feature map variance")
    if log:
        ax.set_yscale("log")
    ax.legend()
    return canvas.figure


def _wide(result: FeatureMapVarianceResult) -> bool:
    values = result.variance[np.isfinite(result.variance)]
    return bool(len(values) and values.max() > 30 * values.min())


def _bands(ax: Axes, result: FeatureMapVarianceResult) -> None:
    areas = result.map_sizes.prod(axis=1)
    is_smaller = [False, *(areas[1:] < areas[:-1])]
    shade_bands(ax, result.depths, result.kinds, is_smaller)
