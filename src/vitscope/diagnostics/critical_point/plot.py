"""Figure of the search for a critical point's kind."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from vitscope.diagnostics.critical_point.critical_point import CriticalPointResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.loss_label import loss_label


def critical_point(results: Mapping[str, CriticalPointResult]) -> Figure:
    """Draw the smallest eigenvalue over the number of images, and the loss along its eigenvector on all of them."""
    canvas = new_canvas(COLUMN_WIDTH, 3.6 + 0.14 * len(results))
    ends, slices = canvas.grid(2, 1)[:, 0]
    for index, (name, result) in enumerate(results.items()):
        label = f"{name}: {result.verdict}" if name else f"Verdict: {result.verdict}"
        ends.errorbar(
            result.n_images,
            result.smallest_eigenvalue,
            yerr=result.smallest_residual,
            marker="o",
            linewidth=0.8,
            color=result_color(index),
            label=label,
        )
        slices.plot(result.distance, result.slice_loss, color=result_color(index))
    ends.set_xscale("log", base=2)
    ends.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    ends.set_xlabel("Number of images")
    ends.set_ylabel("Smallest eigenvalue")
    slices.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    slices.set_xlabel("Distance along its eigenvector")
    slices.set_ylabel(loss_label("Objective (nats)", results.values()))
    canvas.legend(loc="outside upper left", ncols=2)
    return canvas.figure
