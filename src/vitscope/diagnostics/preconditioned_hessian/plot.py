"""Figures of Hessians in other coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.preconditioned_hessian.normalized_hessian import NormalizedHessianResult
from vitscope.diagnostics.preconditioned_hessian.plot_edge_of_stability import edge_of_stability
from vitscope.diagnostics.preconditioned_hessian.preconditioned_sharpness import PreconditionedSharpnessResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.ranked_values import ranked_values

__all__ = ["edge_of_stability", "normalized_hessian", "preconditioned_sharpness"]


def normalized_hessian(results: Mapping[str, NormalizedHessianResult]) -> Figure:
    """Draw the eigenvalues of D H D by rank; bars are residuals."""
    return ranked_values(results, "Eigenvalue of $DHD$")


def preconditioned_sharpness(results: Mapping[str, PreconditionedSharpnessResult]) -> Figure:
    """Draw the largest eigenvalue of P^-1 H of each result, and the optimizer's limit of stability."""
    canvas = new_canvas(COLUMN_WIDTH, 0.9 + 0.3 * len(results))
    axes = canvas.axes()
    label = "Limit of stability"  # of the first result that has one
    for row, result in enumerate(results.values()):
        axes.plot(
            result.eigenvalues[0], row, "o", color=result_color(0), label="Largest eigenvalue" if row == 0 else None
        )
        if np.isfinite(result.threshold):
            axes.plot(result.threshold, row, "|", color=result_color(1), markersize=12, label=label or None)
            label = ""
    axes.set_yticks(range(len(results)), [name or "model" for name in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    marks = np.array([[r.eigenvalues[0], r.threshold] for r in results.values()])
    marks = marks[np.isfinite(marks)]
    if marks.size and marks.min() > 0 and marks.max() > 30 * marks.min():
        axes.set_xscale("log")
    else:
        axes.set_xlim(min(0.0, 1.1 * float(marks.min(initial=0.0))), 1.1 * float(marks.max(initial=1e-9)))
    axes.set_xlabel("Eigenvalue of $P^{-1}H$")
    canvas.legend(loc="outside upper left", ncols=2)
    return canvas.figure
