"""Figure of the Hessian's outliers: their number, what they are made of, and the gradient in their span."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.class_structure.hessian_class_structure import HessianClassStructureResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas

#: names and colors of what an eigenvalue is made of; the last is no part of G
_PARTS = {
    "class": ("Class means", "#0072B2"),
    "cross_class": ("Cross-class means", "#56B4E9"),
    "same_class": ("Same-class means", "#009E73"),
    "within": ("Within", "#BBBBBB"),
    "remainder": ("$H - G$", "#D55E00"),
}


def hessian_class_structure(results: Mapping[str, HessianClassStructureResult]) -> Figure:
    """Draw the largest eigenvalues, the parts of each, and the gradient's share in the span of the first ones; a row a result.

    A vertical line separates the eigenvalues above the bulk; it is dotted where their number is not decided.

    Args:
        results: Results by name.
    """
    n = len(results)
    canvas = new_canvas(2.05 * COLUMN_WIDTH, 0.75 + 2.1 * n)
    axes = canvas.grid(n, 3, width_ratios=[1.1, 1.1, 1], sharex="row")
    for row, (name, result) in zip(axes, results.items()):
        _draw_eigenvalues(row[0], result)
        _draw_parts(row[1], result)
        _draw_overlap(row[2], result)
        row[0].set_title("\n".join(filter(None, (name, _verdict_text(result)))))
    for ax in axes[-1]:
        ax.set_xlabel("Rank of the eigenvalue")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    canvas.legend(loc="outside upper left", ncols=4)
    return canvas.figure


def _verdict_text(result: HessianClassStructureResult) -> str:
    splits = ", ".join(f"{count:.0f}" for count in result.n_outliers_of_splits)
    on_parts = f" (parts {splits})" if splits else ""
    match = {"undecided": ", undecided", "none": ", no class number"}.get(result.verdict, f" = {result.verdict}")
    return f"Outliers: {result.n_outliers:.0f}{on_parts}{match}"


def _draw_eigenvalues(ax: Axes, result: HessianClassStructureResult) -> None:
    ranks = np.arange(1, len(result.eigenvalues) + 1)
    values, ggn = (np.where(v > 0, v, np.nan) for v in (result.eigenvalues, result.ggn_eigenvalues))
    ax.plot(ranks, values, "o", color="black", markersize=3, label="Hessian $H$")
    ax.plot(ranks, ggn, "o", color="#CC79A7", markerfacecolor="none", markersize=4.5, label="Gauss-Newton $G$")
    of_classes = result.class_eigenvalues[: len(ranks)]
    is_shown = of_classes > 0.3 * np.nanmin([*values, *ggn])
    ax.plot(
        ranks[: len(of_classes)][is_shown], of_classes[is_shown], "x", color=_PARTS["class"][1], markersize=4,
        label="Class means of $G$",
    )  # fmt: skip
    if result.n_outliers > 0:
        style = ":" if result.verdict == "undecided" else "-"
        ax.axvline(result.n_outliers + 0.5, color="0.5", linewidth=0.8, linestyle=style)
    ax.set_yscale("log")
    ax.set_ylabel("Eigenvalue")


def _draw_parts(ax: Axes, result: HessianClassStructureResult) -> None:
    """Draw the shares of each eigenvalue of H without the L2 term; negative ones below zero."""
    ranks = np.arange(1, len(result.eigenvalues) + 1)
    total = result.gauss_newton + result.remainder
    rows = dict(zip(result.parts, result.part_values)) | {"remainder": result.remainder}
    top, bottom = np.zeros(len(ranks)), np.zeros(len(ranks))
    for key, values in rows.items():
        share = np.divide(values, total, out=np.full(len(ranks), np.nan), where=total > 0)
        label, color = _PARTS[key]
        base = np.where(share >= 0, top, bottom)
        ax.bar(ranks, share, 0.9, bottom=base, color=color, linewidth=0, label=label)
        top, bottom = top + np.nan_to_num(share.clip(min=0)), bottom + np.nan_to_num(share.clip(max=0))
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_ylabel("Share of the eigenvalue")


def _draw_overlap(ax: Axes, result: HessianClassStructureResult) -> None:
    ranks = np.arange(1, len(result.gradient_overlap) + 1)
    ax.plot(ranks, result.gradient_overlap, color="black", label="Gradient in the span")
    ax.plot(ranks, ranks / result.size, color="0.6", linestyle="--", label="Random direction")
    if result.n_classes <= len(ranks):
        ax.axvline(result.n_classes, color="0.5", linewidth=0.8, linestyle="--")
        ax.annotate(
            "$C$", (result.n_classes, 1.0), xytext=(2, -1), textcoords="offset points", va="top", fontsize="small"
        )
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("Share of the gradient")
