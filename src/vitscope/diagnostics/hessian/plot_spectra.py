"""Figures of whole spectra and single eigenvalues: density, extreme eigenvalues, normalised and preconditioned ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.hessian.hessian_by_kind import HessianByKindResult
from vitscope.diagnostics.hessian.hessian_eigenvalues import HessianEigenvaluesResult
from vitscope.diagnostics.hessian.hessian_trace import HessianTraceResult
from vitscope.diagnostics.hessian.spectral_density import SpectralDensityResult
from vitscope.plotting.ranked_values import add_legend, ranked_values, sized_figure


def spectral_density(results: Mapping[str, SpectralDensityResult], *, floor: float = 1e-7) -> Figure:
    """Draw the density of all eigenvalues on a logarithmic axis, with its interval over probe vectors.

    Args:
        results: by the name shown in the legend.
        floor: the smallest density shown, as a share of the highest.
    """
    figure = sized_figure(results)
    axes = figure.subplots()
    top = max(float(r.density.max()) for r in results.values())
    for name, result in results.items():
        (line,) = axes.plot(result.grid, np.maximum(result.density, floor * top), label=name)
        if len(result.nodes) > 1:
            low, high = (np.clip(d, floor * top, None) for d in (result.density_low, result.density_high))
            axes.fill_between(result.grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(floor * top, 3 * top)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian eigenvalue")
    axes.set_ylabel("Density")
    add_legend(figure, results)
    return figure


def hessian_eigenvalues(results: Mapping[str, HessianEigenvaluesResult]) -> Figure:
    """Draw the eigenvalues by rank; bars are residuals."""
    return ranked_values(results, "Hessian eigenvalue")


def hessian_trace(results: Mapping[str, HessianTraceResult]) -> Figure:
    """Draw the trace of each result with its 95 % interval, where there is one."""
    figure = Figure(figsize=(3.4, 0.8 + 0.3 * len(results)))
    axes = figure.subplots()
    for row, result in enumerate(results.values()):
        error = np.nan_to_num(result.half_width)
        axes.errorbar(result.trace, row, xerr=error, fmt="o", color="C0")
    axes.set_yticks(range(len(results)), [name or "model" for name in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian trace (bar: 95 % interval)")
    return figure


def hessian_by_kind(results: Mapping[str, HessianByKindResult]) -> Figure:
    """Draw each group's pooled top eigenvalues as ticks on a symmetric logarithmic axis; a dot marks their median."""
    rows = [(name, result, i) for name, result in results.items() for i in range(len(result.groups))]
    figure = Figure(figsize=(3.4, 0.8 + 0.3 * len(rows)))
    axes = figure.subplots()
    labels = []
    for row, (name, result, i) in enumerate(rows):
        pooled = result.eigenvalues[i].reshape(-1)
        color = f"C{list(results).index(name) % 7}"
        axes.plot(pooled, np.full(len(pooled), row), "|", color=color, markersize=7, alpha=0.8)
        axes.plot(np.median(pooled), row, "o", color=color, markersize=3)
        labels.append(f"{name} {result.groups[i]}".strip() + f" (NEP {result.nep[i]:.2f})")
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    smallest = min(float(np.abs(result.eigenvalues).max(axis=(1, 2)).min()) for result in results.values())
    axes.set_xscale("symlog", linthresh=max(10.0 ** np.floor(np.log10(max(smallest, 1e-30))), 1e-12))
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Block max eigenvalue (dot: median)")
    return figure
