"""Figures over the depth of a model: bands behind attention and pooling, points by kind, one legend below the axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.plotting.style import KIND_FORMATS

#: color and label of the bands: grey behind attention, blue behind pooling and subsampling, as in the paper
BANDS = {"msa": ("0.85", "MSA"), "pool": ("#cfe3f5", "pooling, subsampling")}


def shade_bands(
    ax: Axes, depths: np.ndarray, kinds: Sequence[str], subsampled: Sequence[bool] | np.ndarray, *, labels: bool = True
) -> None:
    """Shade from the tap before to the tap after each attention, pooling or subsampling.

    Args:
        ax: axes with depth as x.
        depths: (n_taps,) of the taps.
        kinds: (n_taps) of the taps.
        subsampled: (n_taps,) whether the map of a tap is smaller than that of the tap before.
        labels: whether the bands have an entry in the legend.
    """
    for i in range(1, len(depths)):
        kind = "pool" if subsampled[i] else kinds[i]
        if kind in BANDS:
            color, label = BANDS[kind]
            span = ax.axvspan(depths[i - 1], depths[i], color=color, linewidth=0, zorder=0)
            if labels:
                span.set_label(label)


def points_by_kind(
    ax: Axes, depths: np.ndarray, kinds: Sequence[str], values: np.ndarray, half_widths: np.ndarray
) -> None:
    """Draw finite values over depth with their intervals, in the format of each kind.

    Args:
        ax: axes with depth as x.
        depths: (n_taps,) of the taps.
        kinds: (n_taps) of the taps.
        values: (n_taps,) NaN for taps without a value.
        half_widths: (n_taps,) half the interval of each value.
    """
    for kind in dict.fromkeys(kinds):
        at = np.flatnonzero((np.array(kinds) == kind) & np.isfinite(values))
        if len(at):
            style = {"fmt": KIND_FORMATS[kind], "markersize": 3.5, "elinewidth": 0.8, "label": kind, "zorder": 3}
            ax.errorbar(depths[at], values[at], half_widths[at], **style)


def shared_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend below the figure, each label once."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=len(handles), fontsize="small")
