"""Figures of the Fourier measures, after Figs 2a and 8 of Park & Kim (2022)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from vitscope.diagnostics.fourier.plot_branch_transfer import branch_transfer as branch_transfer
from vitscope.diagnostics.fourier.relative_log_amplitude import RelativeLogAmplitudeResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, points_by_kind, shade_bands, shared_legend
from vitscope.plotting.style import MARKERS

#: which curve to draw, by the name of its field and what stands at the axis
CURVES = {
    "paper": ("log_amplitude", r"$\Delta$ log amplitude"),
    "size_corrected": ("log_amplitude_size_corrected", r"$\Delta$ log amplitude + ln h"),
    "first_ac": ("log_amplitude_first_ac", r"$\Delta$ log amplitude (to first AC bin)"),
}


def relative_log_amplitude(
    results: Mapping[str, RelativeLogAmplitudeResult],
    *,
    view: str = "both",
    curve: str = "paper",
    axis: str = "true",
) -> Figure:
    """Draw the curves over frequency (Fig 2a), their last bins over depth (Fig 8), or both, a row a model.

    Args:
        results: Results by the name in the title or legend.
        view: ``both``, ``frequency``, or ``depth`` (several models then share one pair of axes).
        curve: ``paper``, ``size_corrected`` or ``first_ac``, which is drawn without intervals: those of the result belong to
            differences from frequency 0.
        axis: ``true`` frequencies of the bins, or ``paper``, which stretches them so that the last is 1.

    Raises:
        ValueError: An unknown view, curve or axis.
    """
    for name, value, allowed in (
        ("view", view, ("both", "frequency", "depth")),
        ("curve", curve, tuple(CURVES)),
        ("axis", axis, ("true", "paper")),
    ):
        if value not in allowed:
            raise ValueError(f"Expected {name} to be one of {', '.join(allowed)}, received {value!r}.")
    if view == "depth" and len(results) > 1:
        return _overlay(results, curve)
    views = ("frequency", "depth") if view == "both" else (view,)
    canvas = new_canvas(COLUMN_WIDTH * len(views), 0.3 + 2.3 * len(results))
    axes = canvas.grid(len(results), len(views), sharex="col", sharey="col")
    for row, (name, result) in zip(axes, results.items()):
        for ax, what in zip(row, views):
            ax.set_title(name)
            if what == "frequency":
                _over_frequency(canvas, ax, result, curve, axis)
            else:
                _over_depth(ax, result, curve)
    if "frequency" in views:  # the lines set the limits, also where intervals are wider
        plotted_values = np.concatenate([y for result in results.values() for y in getattr(result, CURVES[curve][0])])
        finite_values = plotted_values[np.isfinite(plotted_values)]
        if not len(finite_values):
            finite_values = np.zeros(1)
        axes[0, 0].set_ylim(finite_values.min() - 0.3, finite_values.max() + 0.3)
    for ax, what in zip(axes[-1], views):
        ax.set_xlabel(DEPTH_LABEL if what == "depth" else _frequency_label(axis))
    shared_legend(canvas, [row[-1] for row in axes])
    return canvas.figure


def _frequency_label(axis: str) -> str:
    return r"Frequency ($\times\pi$ rad/pixel)" + ("" if axis == "true" else ", stretched")


def _over_frequency(canvas: Canvas, ax: Axes, result: RelativeLogAmplitudeResult, curve: str, axis: str) -> None:
    field, label = CURVES[curve]
    colors = ScalarMappable(Normalize(0, 1), rcParams["image.cmap"])
    shade = 1 - 0.5 ** (1 / max(len(result.taps), 1))  # all intervals on top of each other are half opaque
    grid = result.normalized_frequency if axis == "true" else result.paper_frequency
    for depth, x, y, half in zip(result.depths, grid, getattr(result, field), result.log_amplitude_half_width):
        color = colors.to_rgba(depth)
        if not len(x):  # not reached by the forward pass
            continue
        ax.plot(x, y, color=color, linewidth=1.0)
        if curve != "first_ac":
            ax.fill_between(x, y - half, y + half, color=color, alpha=shade, linewidth=0)
    canvas.colorbar(colors, ax=ax, label=DEPTH_LABEL, pad=0.02)
    ax.set_xlim(0, 1)
    ax.set_ylabel(label)


def _over_depth(ax: Axes, result: RelativeLogAmplitudeResult, curve: str) -> None:
    y = _last(result, curve)
    areas = result.map_sizes.prod(axis=1)
    shade_bands(ax, result.depths, result.kinds, np.append(False, areas[1:] < areas[:-1]))
    ax.plot(result.depths, y, color="0.4", linewidth=0.8, zorder=2)
    points_by_kind(ax, result.depths, result.kinds, y, _last_half_width(result, curve))
    _label_depth(ax, curve)


def _overlay(results: Mapping[str, RelativeLogAmplitudeResult], curve: str) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH, 2.6)
    ax = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        ax.errorbar(
            result.depths,
            _last(result, curve),
            _last_half_width(result, curve),
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
            color=result_color(index),
            label=name,
        )
    _label_depth(ax, curve)
    ax.set_xlabel(DEPTH_LABEL)
    ax.legend()
    return canvas.figure


def _label_depth(ax: Axes, curve: str) -> None:
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylabel(CURVES[curve][1] + "\nat the highest frequency")


def _last(result: RelativeLogAmplitudeResult, curve: str) -> np.ndarray:
    values = getattr(result, CURVES[curve][0])
    return np.array([value[-1] if value.size > 1 else np.nan for value in values])


def _last_half_width(result: RelativeLogAmplitudeResult, curve: str) -> np.ndarray:
    half_width = result.high_frequency_half_width
    return np.full_like(half_width, np.nan) if curve == "first_ac" else half_width
