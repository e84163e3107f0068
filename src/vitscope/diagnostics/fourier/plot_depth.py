"""What the room's figures over depth share: markers of the kinds, bands behind attention and pooling, the legend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: one marker and one colour of the style's cycle for each kind, the same in every figure
MARKERS = {"stem": "DC5", "conv": "sC0", "msa": "oC1", "mlp": "^C2", "pool": "vC4", "head": "XC6"}

#: grey behind attention, blue behind pooling and subsampling, as in the paper
BANDS = {"msa": ("0.85", "MSA"), "pool": ("#cfe3f5", "pooling, subsampling")}


def shade_bands(ax: Axes, depths: np.ndarray, kinds: Sequence[str], smaller: np.ndarray) -> None:
    """Shade from the tap before to the tap after each attention, pooling or subsampling.

    Args:
        ax: with depth as x.
        depths: (n_taps,) of the taps.
        kinds: (n_taps) of the taps.
        smaller: (n_taps,) whether a tap's map is smaller than that of the tap before.
    """
    for i in range(1, len(depths)):
        kind = "pool" if smaller[i] else kinds[i]
        if kind in BANDS:
            colour, label = BANDS[kind]
            ax.axvspan(depths[i - 1], depths[i], color=colour, linewidth=0, zorder=0, label=label)


def shared_legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Put one legend below the figure, each label once."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=len(handles), fontsize="small")
