"""Figure of the search for a critical point's kind."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from vitscope.diagnostics.critical_point.critical_point import CriticalPointResult


def critical_point(results: Mapping[str, CriticalPointResult]) -> Figure:
    """Draw the smallest eigenvalue over the number of images, and the loss along its eigenvector on all of them."""
    figure = Figure(figsize=(3.4, 3.6 + 0.14 * len(results)))
    ends, slices = figure.subplots(2)
    for name, result in results.items():
        label = f"{name}: {result.verdict}" if name else result.verdict
        ends.errorbar(
            result.n_images,
            result.smallest_eigenvalue,
            yerr=result.smallest_residual,
            fmt="o-",
            linewidth=0.8,
            label=label,
        )
        slices.plot(result.distance, result.slice_loss)
    ends.set_xscale("log", base=2)
    ends.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ends.set_xlabel("Images")
    ends.set_ylabel("Smallest eigenvalue")
    slices.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    slices.set_xlabel("Distance along its eigenvector")
    slices.set_ylabel("Objective")
    figure.legend(loc="outside upper left", ncols=2)
    return figure
