"""Figures of whole spectra and single eigenvalues: density, extreme eigenvalues, normalised and preconditioned ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.hessian.hessian_by_kind import HessianByKindResult
from vitscope.diagnostics.hessian.hessian_eigenvalues import HessianEigenvaluesResult
from vitscope.diagnostics.hessian.hessian_trace import HessianTraceResult
from vitscope.diagnostics.hessian.normalised_hessian import NormalisedHessianResult
from vitscope.diagnostics.hessian.preconditioned_sharpness import PreconditionedSharpnessResult
from vitscope.diagnostics.hessian.spectral_density import SpectralDensityResult


def spectral_density(results: Mapping[str, SpectralDensityResult], *, floor: float = 1e-7) -> Figure:
    """Draw the density of all eigenvalues on a logarithmic axis, with its interval over probe vectors.

    Args:
        results: by the name shown in the legend.
        floor: the smallest density shown, as a share of the highest.
    """
    figure = _figure(results)
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
    _legend(figure, results)
    return figure


def hessian_eigenvalues(results: Mapping[str, HessianEigenvaluesResult]) -> Figure:
    """Draw the eigenvalues by rank; bars are residuals."""
    return _ranked(results, "Hessian eigenvalue")


def normalised_hessian(results: Mapping[str, NormalisedHessianResult]) -> Figure:
    """Draw the eigenvalues of D H D by rank; bars are residuals."""
    return _ranked(results, "Eigenvalue of $DHD$")


def preconditioned_sharpness(results: Mapping[str, PreconditionedSharpnessResult]) -> Figure:
    """Draw the largest eigenvalue of P^-1 H of each result, and the optimizer's limit of stability."""
    figure = Figure(figsize=(3.4, 0.9 + 0.3 * len(results)))
    axes = figure.subplots()
    for row, result in enumerate(results.values()):
        axes.plot(result.eigenvalues[0], row, "o", color="C0", label="largest eigenvalue" if row == 0 else None)
        if np.isfinite(result.threshold):
            axes.plot(result.threshold, row, "|", color="C1", markersize=12, label="limit" if row == 0 else None)
    axes.set_yticks(range(len(results)), [name or "model" for name in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xscale("log" if all(r.eigenvalues[0] > 0 for r in results.values()) else "linear")
    axes.set_xlabel("Eigenvalue of $P^{-1}H$")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


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


def _ranked(results: Mapping[str, Any], label: str) -> Figure:
    figure = _figure(results)
    axes = figure.subplots()
    for name, result in results.items():
        ranks = np.arange(1, len(result.eigenvalues) + 1)
        axes.errorbar(ranks, result.eigenvalues, yerr=result.residuals, fmt="o", elinewidth=0.8, label=name)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Rank by magnitude")
    axes.set_ylabel(label)
    _legend(figure, results)
    return figure


def _figure(results: Mapping[str, Any]) -> Figure:
    return Figure(figsize=(3.4, 2.1 + 0.14 * len(results)))


def _legend(figure: Figure, results: Mapping[str, Any]) -> None:
    if any(results):
        figure.legend(loc="outside upper left", ncols=2)
