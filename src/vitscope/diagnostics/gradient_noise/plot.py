"""Figure of the gradient's noise scale and of the agreement of the gradients of images, by kind of parameter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.gradient_noise.gradient_noise import ALL, GradientNoiseResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas, result_color
from vitscope.plotting.style import KIND_LABELS


def gradient_noise(results: Mapping[str, GradientNoiseResult]) -> Figure:
    """Draw noise scale and mean cosine of each group with 95 % intervals, and the lengths of the gradients of images.

    An arrow marks an interval without an upper end, where the gradient may be zero. A group whose noise scale is not defined
    has no point. Kinds of one result have their colors.

    Args:
        results: Results by name.
    """
    n_rows = max(len(result.groups) for result in results.values())
    canvas = new_canvas(2.05 * COLUMN_WIDTH, 1.0 + 0.22 * n_rows * (0.4 + 0.6 * len(results)) + 0.2 * len(results))
    axes = canvas.grid(1, 3, width_ratios=[1.1, 1, 1])[0]
    groups = list(dict.fromkeys(group for result in results.values() for group in result.groups))
    for number, (name, result) in enumerate(results.items()):
        offset = 0.6 * ((number + 0.5) / len(results) - 0.5)
        rows = np.array([groups.index(group) for group in result.groups]) + offset
        colors = [_color(group, number, len(results)) for group in result.groups]
        _draw_intervals(axes[0], rows, result.noise_scale, result.noise_scale_interval, colors)
        _draw_intervals(axes[1], rows, result.mean_cosine, result.mean_cosine_interval, colors)
        lengths = np.sort(np.sqrt(result.square_norms[0]))[::-1]
        shares = (np.arange(len(lengths)) + 1) / len(lengths)
        axes[2].plot(shares, np.where(lengths > 0, lengths, np.nan), color=result_color(number), label=name or None)
    for ax in axes[:2]:
        ax.set_yticks(range(len(groups)), [KIND_LABELS.get(group, "All") for group in groups])
        ax.set_ylim(len(groups) - 0.5, -0.5)
    axes[1].tick_params(labelleft=False)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("Noise scale (images)")
    axes[1].axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes[1].set_xlabel("Mean cosine of two images")
    axes[2].set(yscale="log", xlabel="Share of the images", ylabel="Length of the gradient", xlim=(0, 1))
    canvas.legend(loc="outside upper left", ncols=4)
    return canvas.figure


def _color(group: str, number: int, n_results: int) -> str:
    if n_results > 1:
        return result_color(number)
    return "0.3" if group == ALL else kind_color(group)


def _draw_intervals(ax: Axes, rows: np.ndarray, values: np.ndarray, ends: np.ndarray, colors: list[str]) -> None:
    for row, value, (low, high), color in zip(rows, values, ends, colors):
        ax.plot(value, row, "o", color=color, markersize=4)  # nothing where it is not defined
        if np.isfinite(low) and np.isfinite(high):
            ax.plot([low, high], [row, row], color=color, linewidth=1.2)
        elif np.isfinite(low) and np.isinf(high):
            right = max(10 * low, 1.5 * value if np.isfinite(value) else 0.0)
            ax.annotate(
                "", (right, row), xytext=(low, row), arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.2}
            )
            ax.plot([low, right], [row, row], alpha=0)  # annotations do not extend the axis
