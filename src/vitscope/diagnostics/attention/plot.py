"""Figures of the attention measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.attention.attention_distance import AttentionDistanceResult
from vitscope.diagnostics.attention.plot_attention_maps import attention_maps
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, start_at_zero

__all__ = ["attention_distance", "attention_maps"]


def attention_distance(results: Mapping[str, AttentionDistanceResult]) -> Figure:
    """Draw each head as a point and their mean as a line: distance above, entropy as a share of its maximum below.

    Dotted lines are the distance that equal weights over the map (or window) would give.

    Args:
        results: One or more results by name.
    """
    canvas = new_canvas(COLUMN_WIDTH, 3.8)
    upper, lower = canvas.grid(2, 1, sharex=True)[:, 0]
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        share = [heads / np.log(keys) for heads, keys in zip(result.entropy, result.n_keys)]
        _heads(upper, result.depths, result.distance, color, name or "Mean over heads")
        _heads(lower, result.depths, share, color, name)
        label = "Equal weights" if index == 0 else None
        upper.plot(result.depths, result.uniform_distance, color=color, linestyle=":", label=label)
    upper.set(ylabel="Attention distance (pixels)")
    lower.set(ylabel="Entropy / ln(number of keys)", xlabel=DEPTH_LABEL, ylim=(0, 1.03))
    start_at_zero(upper)
    canvas.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return canvas.figure


def _heads(ax: Axes, depths: np.ndarray, values: Sequence[np.ndarray], color: str, label: str) -> None:
    heads = list(values)
    x = np.concatenate([np.full(len(v), depth) for depth, v in zip(depths, heads)])
    ax.plot(x, np.concatenate(heads), "o", color=color, markersize=2.5, alpha=0.5, markeredgewidth=0)
    ax.plot(depths, [v.mean() for v in heads], "-", color=color, label=label)
