"""Figures of whole spectra and single eigenvalues: density, extreme eigenvalues, normalized and preconditioned ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.hessian.hessian_by_kind import HessianByKindResult
from vitscope.diagnostics.hessian.hessian_eigenvalues import HessianEigenvaluesResult
from vitscope.diagnostics.hessian.hessian_trace import HessianTraceResult
from vitscope.diagnostics.hessian.spectral_density import SpectralDensityResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas, result_color
from vitscope.plotting.ranked_values import ranked_values, sized_canvas
from vitscope.plotting.style import KIND_COLORS, KIND_LABELS
from vitscope.plotting.symmetric_log import symmetric_log_x_axis


def spectral_density(results: Mapping[str, SpectralDensityResult], *, floor: float = 1e-7) -> Figure:
    """Draw the density of all eigenvalues on a logarithmic axis, with its interval over probe vectors.

    The legend states how many eigenvalues the Hessian has, and from how many quadrature nodes the density is made.

    Args:
        results: Results by the name shown in the legend.
        floor: The smallest density shown, as a share of the highest.
    """
    canvas = sized_canvas(results)
    axes = canvas.axes()
    top = max(float(r.density.max()) for r in results.values())
    for index, (name, result) in enumerate(results.items()):
        n_vectors, n_steps = result.nodes.shape
        count = f"{result.size:,} eigenvalues, {n_vectors} x {n_steps} nodes"
        color = result_color(index)
        shown_density = np.maximum(result.density, floor * top)
        axes.plot(result.grid, shown_density, color=color, label=f"{name}: {count}" if name else count)
        if len(result.nodes) > 1:
            low, high = (np.clip(d, floor * top, None) for d in (result.density_low, result.density_high))
            axes.fill_between(result.grid, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(floor * top, 3 * top)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian eigenvalue")
    axes.set_ylabel("Density (1/eigenvalue)")
    canvas.legend(loc="outside upper left", ncols=1)
    return canvas.figure


def hessian_eigenvalues(results: Mapping[str, HessianEigenvaluesResult]) -> Figure:
    """Draw the eigenvalues by rank; bars are residuals."""
    return ranked_values(results, "Hessian eigenvalue")


def hessian_trace(results: Mapping[str, HessianTraceResult]) -> Figure:
    """Draw the trace of each result with its 95 % interval, where there is one."""
    canvas = new_canvas(COLUMN_WIDTH, 0.8 + 0.3 * len(results))
    axes = canvas.axes()
    for row, result in enumerate(results.values()):
        error = np.nan_to_num(result.half_width)
        axes.errorbar(result.trace, row, xerr=error, marker="o", color=result_color(row))
    axes.set_yticks(range(len(results)), [name or "model" for name in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian trace (bar: 95% interval)")
    return canvas.figure


def hessian_by_kind(results: Mapping[str, HessianByKindResult]) -> Figure:
    """Draw each group's pooled top eigenvalues as ticks on a symmetric logarithmic axis; a dot marks their median.

    Beside each group stands how many values it has, and the share of them below zero. Kinds of one result have their colors.
    """
    rows = [(name, result, i) for name, result in results.items() for i in range(len(result.groups))]
    canvas = new_canvas(COLUMN_WIDTH, 0.8 + 0.3 * len(rows))
    axes = canvas.axes()
    labels = []
    for row, (name, result, i) in enumerate(rows):
        pooled = result.eigenvalues[i].reshape(-1)
        group_name = result.groups[i]
        by_kind = len(results) == 1 and group_name in KIND_COLORS
        color = kind_color(group_name) if by_kind else result_color(list(results).index(name))
        axes.plot(pooled, np.full(len(pooled), row), "|", color=color, markersize=7, alpha=0.8)
        axes.plot(np.median(pooled), row, "o", color=color, markersize=3)
        group = KIND_LABELS.get(group_name, group_name)
        labels.append(f"{name}, {group}".removeprefix(", ") + f"\n{len(pooled)} values, {100 * result.nep[i]:.0f}% < 0")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    magnitudes = [np.abs(result.eigenvalues).max(axis=(1, 2)) for result in results.values()]  # a value a group
    symmetric_log_x_axis(axes, np.concatenate(magnitudes), [r.eigenvalues for r in results.values()])
    axes.set_xlabel("Max eigenvalue of the block (dot: median)")
    return canvas.figure
