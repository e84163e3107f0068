"""Figure of the feature map variance, after Fig 9 of Park & Kim (2022)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.variance.feature_map_variance import FeatureMapVarianceResult
from vitscope.plotting.depth_axis import points_by_kind, shade_bands, shared_legend


def feature_map_variance(results: Mapping[str, FeatureMapVarianceResult], *, view: str = "both") -> Figure:
    """Draw the variance over depth (Fig 9) and each unit's log variance ratio.

    Args:
        results: by the name in the title or legend.
        view: ``both``, a row a model; ``variance``, where several models share one pair of axes; or ``ratio``.

    Raises:
        ValueError: an unknown view.
    """
    drawn = {"variance": _over_depth, "ratio": _ratios}
    if view not in ("both", *drawn):
        raise ValueError(f"Expected view to be one of both, variance, ratio, received {view!r}.")
    if view == "variance" and len(results) > 1:
        return _overlay(results)
    views = list(drawn) if view == "both" else [view]
    figure = Figure(figsize=(3.4 * len(views), 2.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), len(views), squeeze=False)
    for row, (name, result) in zip(axes, results.items()):
        for ax, what in zip(row, views):
            _bands(ax, result)
            drawn[what](ax, result)
            ax.set(title=name, xlim=(-0.02, 1.02), xlabel="normalised depth")
    shared_legend(figure, axes.flat)
    return figure


def _over_depth(ax: Axes, result: FeatureMapVarianceResult) -> None:
    ax.plot(result.depths, result.variance, color="0.4", linewidth=0.8, zorder=2)
    points_by_kind(ax, result.depths, result.kinds, result.variance, result.variance_half_width)
    _scale(ax, [result])
    ax.set_ylabel("feature map variance")


def _ratios(ax: Axes, result: FeatureMapVarianceResult) -> None:
    ax.axhline(0, color="0.5", linewidth=0.6, zorder=1)
    half_width = result.log_variance_ratio_half_width
    points_by_kind(ax, result.depths, result.kinds, result.log_variance_ratio, half_width)
    ax.set_ylabel("log(variance after / before)")


def _overlay(results: Mapping[str, FeatureMapVarianceResult]) -> Figure:
    figure = Figure(figsize=(3.4, 2.6), layout="constrained")
    ax = figure.subplots()
    for name, result in results.items():
        ax.errorbar(result.depths, result.variance, result.variance_half_width, marker="o", markersize=3, label=name)
    _scale(ax, list(results.values()))
    ax.set(xlim=(-0.02, 1.02), xlabel="normalised depth", ylabel="feature map variance")
    ax.legend(fontsize="small")
    return figure


def _scale(ax: Axes, results: list[FeatureMapVarianceResult]) -> None:
    """Take a logarithmic axis where the values span more than a factor of thirty."""
    values = np.concatenate([result.variance for result in results])
    values = values[np.isfinite(values)]
    if len(values) and values.max() > 30 * values.min():
        ax.set_yscale("log")


def _bands(ax: Axes, result: FeatureMapVarianceResult) -> None:
    areas = result.map_sizes.prod(axis=1)
    is_smaller = [False, *(areas[1:] < areas[:-1])]
    shade_bands(ax, result.depths, result.kinds, is_smaller)
