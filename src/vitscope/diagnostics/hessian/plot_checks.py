"""Figures of the questions behind a spectrum: critical point, split, stability of NEP, BatchNorm policy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.diagnostics.hessian.bn_policy import BnPolicyResult
from vitscope.diagnostics.hessian.nep_stability import NepStabilityResult
from vitscope.diagnostics.hessian.rayleigh_split import RayleighSplitResult

#: a kind has the same colour in every figure
_KINDS = ("stem", "conv", "msa", "mlp", "pool", "head", "unknown")


def rayleigh_split(results: Mapping[str, RayleighSplitResult]) -> Figure:
    """Draw each eigenvalue as the sum of its parts, and the eigenvectors' mass by kind; one row a result."""
    figure = Figure(figsize=(3.4, 0.4 + 2.2 * len(results)))
    for row, (name, result) in enumerate(results.items()):
        values, mass = (
            figure.add_subplot(len(results), 2, 2 * row + 1),
            figure.add_subplot(len(results), 2, 2 * row + 2),
        )
        order = np.argsort(-result.eigenvalues, kind="stable")
        ranks = np.arange(1, len(order) + 1)
        values.bar(ranks - 0.2, result.gauss_newton[order], 0.4, label="$v^TGv$" if row == 0 else None)
        values.bar(ranks + 0.2, result.remainder[order], 0.4, label="$v^T(H-G)v$" if row == 0 else None)
        values.plot(ranks, result.eigenvalues[order], "k_", label="eigenvalue" if row == 0 else None)
        values.axhline(0, color="0.6", linewidth=0.6)
        bottom = np.zeros(len(order))
        for kind, column in zip(result.kinds, result.mass[order].T):
            color = f"C{_KINDS.index(kind)}"
            mass.bar(ranks, column, 0.8, bottom=bottom, color=color, label=kind)
            bottom += column
        mass.set_ylim(0, 1)
        mass.legend(loc="upper center", bbox_to_anchor=(0.5, 1.28), ncols=3, fontsize=6, columnspacing=0.8)
        values.set_ylabel(f"{name}\nCurvature" if name else "Curvature")
        mass.set_ylabel("Squared mass")
        for axes in (values, mass):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("Eigenvector")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def nep_stability(results: Mapping[str, NepStabilityResult]) -> Figure:
    """Draw NEP over k, batch size and tolerance, one panel each; crosses are with mixup."""
    figure = Figure(figsize=(3.4, 2.0 + 0.14 * len(results)))
    panels = figure.subplots(1, 3, sharey=True)
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
                color=f"C{number}",
                label=name if axes is panels[0] else None,
            )
        mixed = np.flatnonzero(result.mixup)
        panels[0].plot(result.k[mixed], result.nep[mixed], "x", color=f"C{number}", markersize=6)
    for axes, label in zip(panels, ("$k$", "Batch size", "Tolerance")):
        axes.set_xlabel(label)
        axes.set_xscale("log", base=10 if label == "Tolerance" else 2)
        axes.tick_params(labelsize=6)
        axes.minorticks_off()
    panels[0].set_ylabel("NEP (cross: mixup)")
    panels[0].set_ylim(-0.03, None)
    if any(results):
        figure.legend(loc="outside upper left", ncols=3)
    return figure


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
    figure = Figure(figsize=(3.4, 0.7 + 0.55 * len(results)))
    axes = figure.subplots()
    labels = []
    for row, (name, result) in enumerate(results.items()):
        for side, policy in enumerate(("eval", "batch")):
            pooled = (result.eigenvalues_eval, result.eigenvalues_batch)[side].reshape(-1)
            axes.plot(pooled, np.full(len(pooled), 2 * row + side), "|", color=f"C{side}", markersize=9)
            labels.append(f"{name} {policy}".strip() + f"\nNEP {result.nep[side]:.2f}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_xlabel("Hessian max eigenvalue")
    return figure
