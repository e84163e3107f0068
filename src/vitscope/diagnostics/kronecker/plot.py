"""Figures of the exponents of curvature and of the spectra of Kronecker factors, by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.kronecker.curvature_exponents import CurvatureExponentsResult
from vitscope.diagnostics.kronecker.kronecker_factors import KroneckerFactorsResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.style import KIND_LABELS, KIND_MARKERS


def curvature_exponents(results: Mapping[str, CurvatureExponentsResult]) -> Figure:
    """Draw curvature over the singular values of the gradient, and the exponent of each layer; a row a result.

    Bars are 95 % intervals of the fits. Broken lines are the exponents 1 and 2.

    Args:
        results: Results by name.
    """
    canvas = new_canvas(2 * COLUMN_WIDTH, 0.8 + 2.0 * len(results))
    axes = canvas.grid(len(results), 2)
    for (points, layers), (name, result) in zip(axes, results.items()):
        index = np.arange(len(result.layers))
        for kind in result.groups:
            is_of_kind = np.array(result.kinds) == kind
            color, marker = kind_color(kind), KIND_MARKERS.get(kind, ".")
            curvatures = np.where(result.curvatures > 0, result.curvatures, np.nan)
            for sigma, curvature in zip(result.singular_values[is_of_kind], curvatures[is_of_kind]):
                points.plot(sigma, curvature, color=color, linewidth=0.8, marker=marker, markersize=2.5, alpha=0.7)
            half = np.nan_to_num(result.exponent_half_widths[is_of_kind])
            layers.errorbar(
                index[is_of_kind], result.exponents[is_of_kind], half, color=color, marker=marker, linestyle="none",
                markersize=3.5, elinewidth=0.8, label=KIND_LABELS.get(kind, kind),
            )  # fmt: skip
        points.set(xscale="log", yscale="log", ylabel="Curvature $h_k$", title=name)
        for exponent in (1, 2):
            layers.axhline(exponent, color="0.6", linewidth=0.6, linestyle="--", zorder=0)
        layers.set_ylabel("Exponent")
        layers.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1, 0].set_xlabel("Singular value $\\sigma_k$ of the gradient")
    axes[-1, 1].set_xlabel("Layer, by depth")
    canvas.legend(loc="outside upper left", ncols=6)
    return canvas.figure


def kronecker_factors(results: Mapping[str, KroneckerFactorsResult]) -> Figure:
    """Draw the spectra of both factors of each layer, over their largest eigenvalue, and the decay exponents; a row a result.

    Filled points are exponents of A (inputs), hollow ones of B (gradients of outputs), with 95 % intervals of the fits.

    Args:
        results: Results by name.
    """
    canvas = new_canvas(2.05 * COLUMN_WIDTH, 0.8 + 2.0 * len(results))
    axes = canvas.grid(len(results), 3, sharey=False)
    for row, (name, result) in zip(axes, results.items()):
        index = np.arange(len(result.layers))
        parts = (
            (row[0], result.input_eigenvalues, result.input_exponents, result.input_half_widths, "full"),
            (row[1], result.output_eigenvalues, result.output_exponents, result.output_half_widths, "none"),
        )
        for ax, spectra, exponents, half_widths, fill in parts:
            for kind in result.groups:
                is_of_kind = np.array(result.kinds) == kind
                color = kind_color(kind)
                for values in spectra[is_of_kind]:
                    positive = np.where(values > 0, values, np.nan)
                    ax.plot(np.arange(1, len(values) + 1), positive / values[0], color=color, linewidth=0.8, alpha=0.7)
                row[2].errorbar(
                    index[is_of_kind], exponents[is_of_kind], np.nan_to_num(half_widths[is_of_kind]), color=color, fillstyle=fill,
                    marker=KIND_MARKERS.get(kind, "."), linestyle="none", markersize=3.5, elinewidth=0.8,
                    label=KIND_LABELS.get(kind, kind) if fill == "full" else None,
                )  # fmt: skip
            ax.set(xscale="log", yscale="log", ylim=(1e-6, 2))
        row[0].set(title=", ".join(filter(None, (name, "inputs $A$"))), ylabel="Eigenvalue / largest")
        row[1].set_title("output gradients $B$")
        row[2].set_ylabel("Decay exponent")
        row[2].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for ax, text in zip(axes[-1], ("Rank", "Rank", "Layer, by depth")):
        ax.set_xlabel(text)
    canvas.legend(loc="outside upper left", ncols=6)
    return canvas.figure
