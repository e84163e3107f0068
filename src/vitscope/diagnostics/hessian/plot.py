"""Figures of the Hessian measures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.hessian.hessian_max_eigenvalue_spectrum import HessianMaxEigenvalueSpectrumResult
from vitscope.diagnostics.hessian.plot_checks import bn_policy, critical_point, nep_stability, rayleigh_split
from vitscope.diagnostics.hessian.plot_spectra import (
    hessian_eigenvalues,
    hessian_trace,
    normalised_hessian,
    preconditioned_sharpness,
    spectral_density,
)

__all__ = [
    "bn_policy",
    "critical_point",
    "hessian_eigenvalues",
    "hessian_max_eigenvalue_spectrum",
    "hessian_trace",
    "nep_stability",
    "normalised_hessian",
    "preconditioned_sharpness",
    "rayleigh_split",
    "spectral_density",
]


def hessian_max_eigenvalue_spectrum(
    results: Mapping[str, HessianMaxEigenvalueSpectrumResult], *, log: bool = False
) -> Figure:
    """Draw the density of the pooled top eigenvalues, one curve a result, as in Figs 1c, 4, 6 and 7 of the paper.

    Ticks below the axis mark the values themselves. The curve is drawn between the smallest and the largest of them: a tail
    on the other side of zero would look like eigenvalues of a sign that none has.

    Args:
        results: by the name shown in the legend.
        log: a symmetric logarithmic eigenvalue axis, for results of very different magnitude.
    """
    figure = Figure(figsize=(3.4, 2.1 + 0.14 * len(results)))
    axes = figure.subplots()
    tallest = max(float(r.density.max()) for r in results.values())
    step = 0.05 * tallest
    for row, (name, result) in enumerate(results.items()):
        pooled = result.eigenvalues.reshape(-1)
        drawn = (result.grid >= pooled.min()) & (result.grid <= pooled.max()) if np.ptp(pooled) > 0 else slice(None)
        grid, density = result.grid[drawn], result.density[drawn]
        (line,) = axes.plot(grid, density, label=_legend(name, result))
        axes.fill_between(grid, density, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.plot(pooled, [-step * (row + 0.8)] * len(pooled), "|", color=line.get_color(), markersize=4, alpha=0.7)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_ylim(-step * (len(results) + 0.6), 1.08 * tallest)
    if log:
        axes.set_xscale("symlog", linthresh=1.0)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(4, prune="lower"))
    axes.set_xlabel("Hessian max eigenvalue")
    axes.set_ylabel("Density")
    figure.legend(loc="outside upper left", ncols=1)
    return figure


def _legend(name: str, result: HessianMaxEigenvalueSpectrumResult) -> str:
    nep, ape = result.negative_eigenvalue_proportion, result.average_positive_eigenvalue
    facts = f"NEP {nep:.2f}, APE {ape:.3g}"
    return f"{name} ({facts})" if name else facts
