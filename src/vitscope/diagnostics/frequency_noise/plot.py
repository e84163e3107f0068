"""Figures of the frequency-noise measures, after Fig 2b of Park & Kim (2022) and Yin et al. (2019)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.frequency_noise.fourier_heatmap import FourierHeatmapResult
from vitscope.diagnostics.frequency_noise.frequency_noise_robustness import FrequencyNoiseRobustnessResult
from vitscope.diagnostics.frequency_noise.input_filter import InputFilterResult
from vitscope.diagnostics.frequency_noise.shape_bias import ShapeBiasResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.style import MARKERS


def frequency_noise_robustness(
    results: Mapping[str, FrequencyNoiseRobustnessResult], *, view: str = "bands", relative: bool = False
) -> Figure:
    """Draw the change of accuracy over the noise's frequency (Fig 2b), or over its rms.

    Args:
        results: Results by the name in the legend; several models share one pair of axes.
        view: ``bands``; or ``rms``, a panel a model with a line a scale (needs ``curve_rms``).
        relative: Whether to divide by clean minus chance accuracy, so that models of different accuracy can be compared; a
            model that is not above chance has no values then.

    Raises:
        ValueError: An unknown view.
    """
    if view == "rms":
        return _over_rms(results)
    if view != "bands":
        raise ValueError(f"Expected view to be one of bands, rms, received {view!r}.")
    canvas = new_canvas(COLUMN_WIDTH, 2.6)
    ax = canvas.axes()
    for index, (marker, (name, result)) in enumerate(zip(_cycle(MARKERS), results.items())):
        # the same factor turns both the change and its interval into shares of clean minus chance, or into points
        factor = _share_of_possible(result) if relative else 100
        y, half_width = factor * result.accuracy_change, factor * result.accuracy_change_half_width
        ax.errorbar(
            result.normalized_frequency,
            y,
            half_width,
            marker=marker,
            markersize=4,
            color=result_color(index),
            label=name or None,
        )
    _zero_line(ax)
    ax.set_ylabel(r"$\Delta$ accuracy / (clean $-$ chance)" if relative else r"$\Delta$ accuracy (percentage points)")
    ax.set_xlabel(r"Noise frequency ($\times\pi$ rad/pixel)")
    ax.set_xlim(0, 1)
    ax.set_title(", ".join(sorted({_construction(result) for result in results.values()})))
    _legend(ax, results)
    return canvas.figure


def input_filter(results: Mapping[str, InputFilterResult]) -> Figure:
    """Draw accuracy over the cut-off: low-pass images left, high-pass images right; chance and clean dotted."""
    canvas = new_canvas(7.0, 2.6)
    low, high = canvas.grid(1, 2, sharey=True)[0]
    for i, (marker, (name, result)) in enumerate(zip(_cycle(MARKERS), results.items())):
        style = {"marker": marker, "markersize": 4, "color": result_color(i), "label": name or None}
        low.errorbar(result.cutoff, 100 * result.low_pass_accuracy, 100 * result.low_pass_accuracy_half_width, **style)
        high.errorbar(
            result.cutoff, 100 * result.high_pass_accuracy, 100 * result.high_pass_accuracy_half_width, **style
        )
        for ax in (low, high):
            ax.axhline(100 * result.clean_accuracy, color=result_color(i), linestyle=":", linewidth=0.8)
    for ax, passband, x, side in ((low, "up to", 1.0, "right"), (high, "above", 0.0, "left")):  # where no curve is
        chance = min(result.chance for result in results.values())
        ax.axhline(100 * chance, color="0.5", linestyle="--", linewidth=0.8)
        label_style = {"xytext": (0, 2), "textcoords": "offset points", "ha": side, "fontsize": "small"}
        ax.annotate("Chance", (x, 100 * chance), color="0.4", **label_style)
        ax.set_xlim(0, 1)
        ax.set_xlabel(rf"Frequencies kept {passband} ($\times\pi$ rad/pixel)")
    low.set_ylabel("Accuracy (%)")
    low.set_title("Low-pass images")
    high.set_title("High-pass images")
    _legend(low, results)
    return canvas.figure


def fourier_heatmap(results: Mapping[str, FourierHeatmapResult]) -> Figure:
    """Draw the error rate under each plane wave, a panel a model with one color scale."""
    canvas = new_canvas(0.7 + 2.7 * len(results), 2.8)
    axes = canvas.grid(1, len(results), sharey=True)[0]
    image = None
    for ax, (name, result) in zip(axes, results.items()):
        edges = [_edges(frequency) for frequency in (result.horizontal, result.vertical)]
        image = ax.pcolormesh(
            *edges, 100 * result.error_rate, vmin=0, vmax=100, cmap=rcParams["image.cmap"], rasterized=True
        )
        ax.set_aspect("equal")
        ax.set_title(f"{name}\n".lstrip("\n") + f"Clean error {100 * result.clean_error_rate:.1f}%")
        ax.set_xlabel(r"Horizontal frequency ($\times\pi$ rad/pixel)")
    axes[0].set_ylabel(r"Vertical frequency ($\times\pi$ rad/pixel)")
    if image is not None:
        canvas.colorbar(image, ax=list(axes), label="Error rate (%)", shrink=0.9)
    return canvas.figure


def shape_bias(results: Mapping[str, ShapeBiasResult]) -> Figure:
    """Draw each model's shape bias with its interval, and the share of answers that follow neither cue."""
    canvas = new_canvas(COLUMN_WIDTH, 1.1 + 0.35 * len(results))
    ax = canvas.axes()
    for row, result in enumerate(results.values()):
        ends = [[result.shape_bias - result.shape_bias_low], [result.shape_bias_high - result.shape_bias]]
        ax.errorbar([result.shape_bias], [row], xerr=ends, marker=MARKERS[row % len(MARKERS)], color=result_color(row))
        other = 1 - (result.shape_decisions + result.texture_decisions) / result.n_conflicts
        label_style = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
        ax.annotate(f"Neither cue: {100 * other:.0f}%", (np.clip(result.shape_bias, 0.2, 0.8), row), **label_style)
    ax.axvline(0.5, color="0.6", linewidth=0.6, zorder=0)
    ax.set_yticks(range(len(results)), [name or "model" for name in results])
    ax.set_ylim(len(results) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.set_xlabel("Shape bias (0: texture decides, 1: shape decides)")
    return canvas.figure


def _over_rms(results: Mapping[str, FrequencyNoiseRobustnessResult]) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH * len(results), 2.6)
    axes = canvas.grid(1, len(results), sharey=True)[0]
    for ax, (name, result) in zip(axes, results.items()):
        for marker, scale, change in zip(_cycle(MARKERS), result.curve_rms, result.curve_accuracy_change):
            ax.plot(result.normalized_frequency, 100 * change, marker=marker, markersize=4, label=f"{scale:g}")
        _zero_line(ax)
        ax.set_title(name)
        ax.set_xlim(0, 1)
        ax.set_xlabel(r"Noise frequency ($\times\pi$ rad/pixel)")
        ax.legend(title="eps" if result.construction == "official" else "rms")
    axes[0].set_ylabel(r"$\Delta$ accuracy (percentage points)")
    return canvas.figure


def _share_of_possible(result: FrequencyNoiseRobustnessResult) -> float:
    """Return what turns a change of accuracy into a share of clean minus chance accuracy; NaN where that is not positive."""
    above_chance = result.clean_accuracy - result.chance
    return 1 / above_chance if above_chance > 0 else np.nan


def _construction(result: FrequencyNoiseRobustnessResult) -> str:
    return (
        f"Noise of rms {result.rms:g}" if result.construction == "equal_rms" else f"Official noise, eps {result.rms:g}"
    )


def _edges(centers: np.ndarray) -> np.ndarray:
    step = centers[1] - centers[0] if len(centers) > 1 else 1.0
    return np.append(centers, centers[-1] + step) - step / 2


def _cycle(markers: str) -> list[str]:
    return list(markers) * 16


def _zero_line(ax: Axes) -> None:
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)


def _legend(ax: Axes, results: Mapping[str, object]) -> None:
    if any(results):
        ax.legend(fontsize="small")
