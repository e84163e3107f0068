"""Attention distance and entropy by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.attention.attention_distance import AttentionDistanceResult


def attention_distance(results: Mapping[str, AttentionDistanceResult]) -> Figure:
    """Draw each head as a point and their mean as a line: distance above, entropy as a share of its maximum below.

    Dotted lines are the distance that equal weights over the map (or window) would give.

    Args:
        results: one or more results by name.
    """
    figure = Figure(figsize=(3.4, 3.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for index, (name, result) in enumerate(results.items()):
        color = f"C{index}"
        share = [heads / np.log(keys) for heads, keys in zip(result.entropy, result.n_keys)]
        _heads(upper, result.depths, result.distance, color, name or "mean over heads")
        _heads(lower, result.depths, share, color, name)
        label = "equal weights" if index == 0 else None
        upper.plot(result.depths, result.uniform_distance, color=color, linestyle=":", label=label)
    upper.set(ylabel="Distance (pixels)")
    lower.set(ylabel="Entropy / ln(keys)", xlabel="Normalised depth", ylim=(0, 1.03))
    upper.set_ylim(0, 1.08 * max(upper.dataLim.y1, 1e-9))
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _heads(ax: Axes, depths: np.ndarray, values: Sequence[np.ndarray], color: str, label: str) -> None:
    heads = list(values)
    x = np.concatenate([np.full(len(v), depth) for depth, v in zip(depths, heads)])
    ax.plot(x, np.concatenate(heads), "o", color=color, markersize=2.5, alpha=0.5, markeredgewidth=0)
    ax.plot(depths, [v.mean() for v in heads], "-", color=color, label=label)
