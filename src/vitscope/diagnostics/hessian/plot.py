"""Figures of the Hessian measures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import HessianMaxEigenvalueSpectrumResult
from vitscope.diagnostics.hessian.plot_checks import bn_policy, nep_stability, rayleigh_split
from vitscope.diagnostics.hessian.plot_spectra import (
    hessian_by_kind,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.style import COLORS

__all__ = [
    "bn_policy",
    "hessian_by_kind",
    "hessian_eigenvalues",
    "hessian_max_eigenvalue_spectrum",
    "hessian_trace",
    "nep_stability",
    "plotly_hessian_max_eigenvalue_spectrum",
    "rayleigh_split",
    "spectral_density",
]


def hessian_max_eigenvalue_spectrum(
    results: Mapping[str, HessianMaxEigenvalueSpectrumResult], *, log: bool = False
) -> Figure:
    """Draw the density of the pooled top eigenvalues, one curve a result, as in Figs 1c, 4, 6 and 7 of the paper.

    Ticks below the axis mark the values themselves, and the legend counts them, once where all have as many. The curve is drawn
    between the smallest and the largest of them: a tail on the other side of zero would look like eigenvalues of a sign that
    none has.

    Args:
        results: Results by the name shown in the legend.
        log: A symmetric logarithmic eigenvalue axis, for results of very different magnitude.
    """
    counts = {_count_text(result) for result in results.values()}
    shared = counts.pop() if len(results) > 1 and len(counts) == 1 else ""  # above the names
    canvas = new_canvas(COLUMN_WIDTH, 2.2 + (0.16 if shared else 0.28) * len(results))
    axes = canvas.axes()
    tallest = max(float(r.density.max()) for r in results.values())
    step = 0.05 * tallest
    for row, (name, result) in enumerate(results.items()):
        pooled = result.eigenvalues.reshape(-1)
        grid, density = _drawn(result)
        color = result_color(row)
        axes.plot(grid, density, color=color, label=_legend_text(name, result, bool(shared)))
        axes.fill_between(grid, density, color=color, alpha=0.15, linewidth=0)
        axes.plot(pooled, [-step * (row + 0.8)] * len(pooled), "|", color=color, markersize=4, alpha=0.7)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_ylim(-step * (len(results) + 0.6), 1.08 * tallest)
    if log:
        axes.set_xscale("symlog", linthresh=1.0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(4, prune="lower"))
    axes.set_xlabel("Hessian max eigenvalue")
    axes.set_ylabel("Density (1/eigenvalue)")
    title = {"title": shared.replace(" values:", " values each:"), "alignment": "left"} if shared else {}
    canvas.legend(loc="outside upper left", ncols=1, **title)
    return canvas.figure


def plotly_hessian_max_eigenvalue_spectrum(results: Mapping[str, HessianMaxEigenvalueSpectrumResult]) -> go.Figure:
    """Return the densities as an interactive figure; below the axis each value, with batch, rank and residual on hover."""
    figure = go.Figure()
    step = 0.05 * max(float(r.density.max()) for r in results.values())
    for row, (name, result) in enumerate(results.items()):
        grid, density = _drawn(result)
        color, text = COLORS[row % len(COLORS)], _legend_text(name, result).replace("\n", "<br>")
        figure.add_trace(
            go.Scatter(
                x=grid, y=density, name=text, legendgroup=str(row), mode="lines", line_color=color,
                fill="tozeroy", hovertemplate="eigenvalue %{x:.4g}<br>density %{y:.3g}",
            )
        )  # fmt: skip
        batch, rank = (part.reshape(-1) for part in np.indices(result.eigenvalues.shape))
        facts = np.stack([result.batches[batch], rank + 1, result.residuals.reshape(-1)], axis=1)
        figure.add_trace(
            go.Scatter(
                x=result.eigenvalues.reshape(-1), y=np.full(len(batch), -step * (row + 0.8)), legendgroup=str(row),
                mode="markers", marker={"symbol": "line-ns-open", "color": color}, showlegend=False, customdata=facts,
                hovertemplate="eigenvalue %{x:.4g}<br>batch %{customdata[0]}, rank %{customdata[1]}"
                "<br>residual %{customdata[2]:.2g}",
            )
        )  # fmt: skip
    figure.update_layout(xaxis_title="Hessian max eigenvalue", yaxis_title="Density")
    return figure


def _drawn(result: HessianMaxEigenvalueSpectrumResult) -> tuple[np.ndarray, np.ndarray]:
    """Return grid and density between the smallest and the largest value."""
    low, high = float(result.eigenvalues.min()), float(result.eigenvalues.max())
    inside = (result.grid >= low) & (result.grid <= high) if high > low else slice(None)
    return result.grid[inside], result.density[inside]


def _count_text(result: HessianMaxEigenvalueSpectrumResult) -> str:
    n_batches, n_top = result.eigenvalues.shape
    return f"{result.eigenvalues.size} values: top {n_top} of {n_batches} {'batch' if n_batches == 1 else 'batches'}"


def _legend_text(name: str, result: HessianMaxEigenvalueSpectrumResult, is_count_shared: bool = False) -> str:
    first = ": ".join(filter(None, [name, "" if is_count_shared else _count_text(result)]))
    nep, ape = result.negative_eigenvalue_proportion, result.average_positive_eigenvalue
    facts = f"{100 * nep:.0f}% negative, mean of the positive {ape:.3g}"
    return (": " if is_count_shared else "\n").join(filter(None, [first, facts]))
