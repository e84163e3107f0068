"""The figure of curvature at the edge of stability: eigenvalues, sharpness over its limit, overlap and rate over steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.preconditioned_hessian.edge_of_stability import EdgeOfStabilityResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color

#: inches of the panels from top to bottom
HEIGHTS = (1.5, 1.3, 0.9, 0.9)


def edge_of_stability(results: Mapping[str, EdgeOfStabilityResult]) -> Figure:
    """Draw the largest eigenvalues, the sharpness over its limit, the overlap of subspaces and the learning rate over steps.

    A dashed line is the limit of the largest eigenvalue, of optimizers without a preconditioner. The sharpness of the second
    panel is the largest eigenvalue of the preconditioned Hessian, so that optimizers share its axis; 1 is the limit. A bar is
    the solver's error where it can be seen, an open circle a value that did not converge within its budget.
    """
    canvas = new_canvas(COLUMN_WIDTH, sum(HEIGHTS) + 0.3 * len(results))
    panels = canvas.grid(4, 1, sharex="col", height_ratios=HEIGHTS)[:, 0]
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        label = ", ".join(part for part in (name, result.optimizer) if part) or "model"
        _draw_eigenvalues(panels[0], result, color, label)
        _draw_ratio(panels[1], result, color)
        is_known = np.isfinite(result.overlap)
        panels[2].plot(result.steps[is_known], result.overlap[is_known], color=color, linewidth=1.0)
        panels[3].step(result.steps, result.lr, where="post", color=color, linewidth=1.0)
    _set_axes(panels, results)
    handles, labels = panels[0].get_legend_handles_labels()
    further = [Line2D([], [], color="0.3", linestyle="--", linewidth=0.9)]
    if any(result.eigenvalues.shape[1] > 1 for result in results.values()):
        further.append(Line2D([], [], color="0.5", linewidth=0.7))
    texts = [*labels, "Limit of stability", "Further eigenvalues"]
    canvas.legend([*handles, *further], texts[: len(handles) + len(further)], loc="outside upper left", ncols=2)
    return canvas.figure


def _draw_eigenvalues(axes: Axes, result: EdgeOfStabilityResult, color: str, label: str) -> None:
    for rank in reversed(range(result.eigenvalues.shape[1])):
        values = result.eigenvalues[:, rank]
        if rank == 0:
            axes.plot(result.steps, values, color=color, linewidth=1.2, label=label)
        else:
            axes.plot(result.steps, values, color=color, linewidth=0.7, alpha=0.45)
    _draw_errors(axes, result.steps, result.eigenvalues[:, 0], result.errors[:, 0], result.converged[:, 0], color)
    if result.preconditioner == "identity" and np.isfinite(result.limit).any():
        limit = np.where(np.isfinite(result.limit), result.limit, np.nan)
        axes.step(result.steps, limit, where="post", color=color, linestyle="--", linewidth=0.9)


def _draw_ratio(axes: Axes, result: EdgeOfStabilityResult, color: str) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, error = result.ratio, result.sharpness_error / result.limit
    axes.plot(result.steps, ratio, color=color, linewidth=1.2)
    _draw_errors(axes, result.steps, ratio, error, result.sharpness_converged, color)


def _draw_errors(
    axes: Axes, steps: np.ndarray, values: np.ndarray, errors: np.ndarray, converged: np.ndarray, color: str
) -> None:
    axes.errorbar(steps, values, yerr=np.nan_to_num(errors), fmt="none", ecolor=color, elinewidth=0.8, capsize=0)
    is_open = ~converged.astype(bool) & np.isfinite(values)
    axes.plot(
        steps[is_open], values[is_open], "o", color=color, markersize=3, markerfacecolor="white", markeredgewidth=0.8
    )


def _set_axes(panels: np.ndarray, results: Mapping[str, EdgeOfStabilityResult]) -> None:
    eigenvalues, ratio, overlap, rate = panels
    eigenvalues.set_ylabel("Eigenvalue of $H$")
    _set_scale(eigenvalues, _shown_values(results))
    ratio.axhline(1.0, color="0.3", linestyle="--", linewidth=0.9, zorder=0)
    ratio.set_ylabel("Sharpness / limit")
    ratios = np.concatenate([r.ratio[np.isfinite(r.ratio)] for r in results.values()])
    if ratios.size:
        _set_scale(ratio, np.append(ratios, 1.0))
    else:
        ratio.text(0.5, 0.5, "limit unknown", transform=ratio.transAxes, ha="center", va="bottom", color="0.3")
        ratio.set_ylim(0.0, 2.0)
    overlap.set_ylabel("Overlap")
    overlap.set_ylim(-0.03, 1.03)
    rate.set_ylabel("Learning rate")
    rates = np.concatenate([r.lr[np.isfinite(r.lr)] for r in results.values()])
    if rates.size and rates.max() > 0:
        _set_scale(rate, rates)
    rate.set_xlabel("Optimizer step")
    rate.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _shown_values(results: Mapping[str, EdgeOfStabilityResult]) -> np.ndarray:
    parts = []
    for result in results.values():
        parts.append(result.eigenvalues.reshape(-1))
        if result.preconditioner == "identity":
            parts.append(result.limit[np.isfinite(result.limit)])
    return np.concatenate(parts)


def _set_scale(axes: Axes, values: np.ndarray) -> None:
    """Use a logarithmic axis for positive values that span more than a factor of 30, else one that begins at 0."""
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.set_ylim(0.7 * values.min(), 1.4 * values.max())
    elif values.size and values.min() >= 0 and values.max() > 0:
        axes.set_ylim(0.0, 1.12 * values.max())
