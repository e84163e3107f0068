"""Effective rank and participation ratio by depth."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.diagnostics.rank.effective_rank import EffectiveRankResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, shade_bands, shared_legend, start_at_zero

QUANTITIES = {"effective_rank": "Effective rank", "participation_ratio": "Participation ratio"}


def effective_rank(results: Mapping[str, EffectiveRankResult], *, share: bool = True) -> Figure:
    """Draw both quantities over normalized depth, by default as a share of the number of channels.

    Bands mark attention (gray) and pooling (blue) where a single result is drawn.

    Args:
        results: One or more results by name.
        share: Whether to divide by the number of channels, so that stages of different widths compare.
    """
    canvas = new_canvas(COLUMN_WIDTH, 3.8)
    axes = canvas.grid(2, 1, sharex=True)[:, 0]
    for ax, (field, label) in zip(axes, QUANTITIES.items()):
        for index, (name, result) in enumerate(results.items()):
            values = getattr(result, field) / result.channels if share else getattr(result, field)
            ax.plot(result.depths, values, "o-", color=result_color(index), label=name or None)
            if len(results) == 1:
                _bands(ax, result)
        ax.set_ylabel(f"{label}\n(share of channels)" if share else label)
        start_at_zero(ax)
    axes[-1].set_xlabel(DEPTH_LABEL)
    shared_legend(canvas, axes[:1])
    return canvas.figure


def _bands(ax: Axes, result: EffectiveRankResult) -> None:
    """Shade from the tap before to the tap after each attention, pooling or first unit of a later stage."""
    stages = result.stages
    opens_stage = [False, *(after > before > 0 for before, after in pairwise(stages))]
    shade_bands(ax, result.depths, result.kinds, opens_stage, labels=True)
