"""Figures of the questions behind a spectrum: critical point, split, stability of NEP, BatchNorm policy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.hessian.bn_policy import BnPolicyResult
from vitscope.diagnostics.hessian.nep_stability import NepStabilityResult
from vitscope.diagnostics.hessian.rayleigh_split import RayleighSplitResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas, result_color
from vitscope.plotting.style import KIND_LABELS

#: words for BatchNorm's statistics, by the name of the policy
STATISTICS = {"eval": "running", "batch": "batch"}


def rayleigh_split(results: Mapping[str, RayleighSplitResult]) -> Figure:
    """Draw each eigenvalue as the sum of its parts, and its eigenvector's squared norm by kind; one row a result."""
    canvas = new_canvas(2 * COLUMN_WIDTH, 0.6 + 2.0 * len(results))
    panels = canvas.grid(len(results), 2, sharex=True, sharey="col")
    for row, ((values, mass), (name, result)) in enumerate(zip(panels, results.items())):
        order = np.argsort(-result.eigenvalues, kind="stable")
        ranks = np.arange(1, len(order) + 1)
        for side, part, text in (
            (-0.2, result.gauss_newton, "Gauss-Newton part $v^TGv$"),
            (0.2, result.remainder, "Remainder $v^T(H-G)v$"),
        ):
            values.bar(ranks + side, part[order], 0.4, color="0.45" if side < 0 else "0.75", label=text)
        values.plot(ranks, result.eigenvalues[order], "k_", label="Eigenvalue")
        values.axhline(0, color="0.6", linewidth=0.6)
        bottom = np.zeros(len(order))
        for kind, column in zip(result.kinds, result.mass[order].T):
            mass.bar(ranks, column, 0.8, bottom=bottom, color=kind_color(kind), label=KIND_LABELS[kind])
            bottom += column
        mass.set_ylim(0, 1)
        values.set_title(name)
        values.set_ylabel("Curvature along eigenvector")
        mass.set_ylabel("Share of its squared norm")
        for axes in (values, mass):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if row == len(results) - 1:
                axes.set_xlabel("Eigenvector, by eigenvalue")
    canvas.legend(loc="outside upper left", ncols=3)
    return canvas.figure


def nep_stability(results: Mapping[str, NepStabilityResult]) -> Figure:
    """Draw NEP over k, batch size and tolerance, one panel each; crosses are with mixup."""
    canvas = new_canvas(1.6 * COLUMN_WIDTH, 2.0 + 0.14 * len(results))
    panels = canvas.grid(1, 3, sharey=True)[0]
    for number, (name, result) in enumerate(results.items()):
        base = _base(result)
        for axes, key in zip(panels, ("k", "batch_size", "tol")):
            others = [other for other in ("k", "batch_size", "tol") if other != key]
            rows = ~result.mixup & np.all([getattr(result, other) == base[other] for other in others], axis=0)
            rows = np.flatnonzero(rows)[np.argsort(getattr(result, key)[rows])]
            spread = np.abs(result.nep_interval[rows].T - result.nep[rows])
            axes.errorbar(
                getattr(result, key)[rows],
                result.nep[rows],
                yerr=np.nan_to_num(spread),
                fmt="o-",
                linewidth=0.8,
                color=result_color(number),
                label=(name or None) if axes is panels[0] else None,
            )
        mixed = np.flatnonzero(result.mixup)
        label = "With mixup" if number == 0 and len(mixed) else None
        panels[0].plot(result.k[mixed], result.nep[mixed], "x", color=result_color(number), markersize=6, label=label)
    for axes, label in zip(panels, ("Eigenvalues a batch", "Batch size", "Tolerance")):
        axes.set_xlabel(label)
        axes.set_xscale("log", base=10 if label == "Tolerance" else 2)
        axes.minorticks_off()
    panels[0].set_ylabel("Negative share (NEP)")
    panels[0].set_ylim(-0.03, None)
    canvas.legend(loc="outside upper left", ncols=3)
    return canvas.figure


def _base(result: NepStabilityResult) -> dict[str, float]:
    """Return the setting around which the others vary: the mode of each choice."""
    base = {}
    for key in ("batch_size", "tol"):
        values, counts = np.unique(getattr(result, key), return_counts=True)
        base[key] = values[counts.argmax()]
    others = (result.batch_size != base["batch_size"]) | (result.tol != base["tol"]) | result.mixup
    base["k"] = result.k[others][0] if others.any() else result.k[0]
    return base


def bn_policy(results: Mapping[str, BnPolicyResult]) -> Figure:
    """Draw the pooled top eigenvalues under running and under batch statistics."""
    canvas = new_canvas(COLUMN_WIDTH, 0.7 + 0.6 * len(results))
    axes = canvas.axes()
    labels = []
    for row, (name, result) in enumerate(results.items()):
        for side, policy in enumerate(("eval", "batch")):
            pooled = (result.eigenvalues_eval, result.eigenvalues_batch)[side].reshape(-1)
            axes.plot(pooled, np.full(len(pooled), 2 * row + side), "|", color=result_color(side), markersize=9)
            text = f"{name}, {STATISTICS[policy]}".removeprefix(", ")
            labels.append(f"{text}\n{len(pooled)} values, {100 * result.nep[side]:.0f}% < 0")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian max eigenvalue")
    return canvas.figure
